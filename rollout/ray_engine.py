"""`RayEngine`: an engine in a Ray actor, on whatever node of the cluster that is.

The actor holds no vLLM but a `ChildEngine`, for the reasons that keep vLLM out of the learner's process: the
child has threads, preloaded libraries and variables of its own, which Ray's worker process cannot be given,
and the kernel kills it when the worker ends, however that happens. So an engine on Ray is the same program
in the same circumstances as a local one, and gives the same tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from rollout.child_engine import CLOSE_SECONDS, DOING, STACKS_SECONDS, ChildEngine
from rollout.engine import Completion, Request, Sampling
from rollout.engine_server import portable
from rollout.engine_spec import EngineSpec
from rollout.errors import LOADING, EngineDied, EngineError
from rollout.wire import pack_requests, unpack_completions
from trainer.parallel.ray_cluster import LOST, machine_identity, why_lost

Answer = tuple[bool, Any]
"""`(True, result)`, or `(False, (exception, its traceback))` as of `rollout.engine_server.portable`."""

CONCURRENT = 3
"""Calls that an actor serves at once: a round, new weights in its midst, and where its threads are."""


class EngineActor:
    """What runs in Ray's worker process: a child engine and the way to it."""

    def __init__(self) -> None:
        self._engine: ChildEngine | None = None

    def machine(self) -> str:
        """See `machine_identity`."""
        return machine_identity()

    def load(self, spec: EngineSpec) -> Answer:
        """Start the child; returns when its model is loaded."""
        try:
            self._engine = ChildEngine(spec)
            self._engine.wait()
            return True, self._engine.pid
        except Exception as error:
            return False, portable(error)

    def call(self, name: str, *arguments: Any) -> Answer:
        """Call one method of the engine."""
        try:
            return True, getattr(self._engine, name)(*arguments)
        except Exception as error:
            return False, portable(error)

    def close(self) -> None:
        """End the child."""
        if self._engine is not None:
            self._engine.close()


class RayEngine:
    """An engine in a Ray actor. Implements `rollout.engine.Engine`.

    Loads in the background like `ChildEngine` and raises what that raises; besides, `EngineDied` when the
    actor or its node is gone.
    """

    def __init__(self, actor: Any, spec: EngineSpec, *, index: int, node: str) -> None:
        """Have `actor`, the handle of an `EngineActor` that belongs to this engine from now on, load `spec`.

        `node`: address of its node; `index`: the engine's number, both for sentences.
        """
        self.spec = spec
        self.node = node
        self._actor = actor
        self._index = index
        self._version = 0
        self._pid = 0
        self._closed = False
        self._loading = actor.load.remote(spec)

    @property
    def label(self) -> str:
        """What it is called where its stacks are written."""
        return f"engine process {self._pid} on node {self.node}"

    @property
    def weight_version(self) -> int:
        """The version of the installed weights; 0 are those loaded from disk."""
        return self._version

    def wait(self) -> None:
        """Wait until the model is loaded; raises what loading it raised."""
        if not self._pid:
            self._pid = self._result(self._loading, LOADING)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `rollout.vllm_engine.VllmEngine.generate`; the round crosses the network as arrays."""
        return unpack_completions(self._call("generate_packed", pack_requests(requests), sampling))

    def score(self, sequences: Sequence[list[int]], temperature: float = 1.0) -> list[list[float]]:
        """See `rollout.vllm_engine.VllmEngine.score`."""
        return self._call("score", list(sequences), temperature)

    def effective_sampling(self, sampling: Sampling) -> dict[str, Any]:
        """See `rollout.vllm_engine.VllmEngine.effective_sampling`."""
        return self._call("effective_sampling", sampling)

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Open the weight channel that `spec.transport` names."""
        self._call("init_transfer", info)

    def receive_weights(self, info: dict[str, Any], version: int) -> dict[str, Any]:
        """See `rollout.vllm_engine.VllmEngine.receive_weights`."""
        report = self._call("receive_weights", info, version)
        self._version = version
        return report

    def pause(self) -> None:
        """See `rollout.vllm_engine.VllmEngine.pause`."""
        self._call("pause")

    def resume(self) -> None:
        """See `rollout.vllm_engine.VllmEngine.resume`."""
        self._call("resume")

    def sleep(self, level: int) -> None:
        """See `rollout.vllm_engine.VllmEngine.sleep`."""
        self._call("sleep", level)

    def memory(self) -> dict[str, float]:
        """Resident bytes of the child and bytes of its KV cache."""
        return self._call("memory")

    def stacks(self) -> str:
        """Where every Python thread of the child is, also while a call hangs; empty when it cannot say."""
        if not self._pid or self._closed:
            return ""
        try:
            stacks = self._actor.call.remote("stacks")
            succeeded, text = ray.get(stacks, timeout=2 * STACKS_SECONDS)
        except RayError:
            return ""
        return text if succeeded else ""

    def close(self) -> None:
        """End child and actor, by force when they do not answer. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RayError):
            ray.get(self._actor.close.remote(), timeout=CLOSE_SECONDS)
        with contextlib.suppress(RayError):
            ray.kill(self._actor)

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._closed:
            raise EngineError("The engine is closed.")
        self.wait()
        doing = DOING.get(name.removesuffix("_packed"), f"answering {name}")
        return self._result(self._actor.call.remote(name, *arguments), doing)

    def _result(self, answer: Any, doing: str) -> Any:
        """The value of an `Answer` on its way; raises what the engine raised, or that its actor is gone."""
        try:
            succeeded, value = ray.get(answer)
        except LOST as error:
            raise EngineDied(
                f"engine {self._index}, a Ray actor on node {self.node}, was lost while {doing}: "
                f"{why_lost(error)}."
            ) from None
        if succeeded:
            return value
        failure, lines = value
        raise self._raised(failure, lines, doing)

    def _raised(self, failure: Exception | str, lines: str, doing: str) -> Exception:
        """What the engine raised, with where that was."""
        if isinstance(failure, str):
            return EngineError(f"engine {self._index} on node {self.node} failed while {doing}: {failure}.")
        if isinstance(failure, EngineError):
            return type(failure)(f"{str(failure).rstrip('.')} on node {self.node}.")
        failure.add_note(f"On node {self.node}:\n{lines}")
        return failure
