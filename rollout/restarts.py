"""`RestartingEngine`: an engine that is started again when its process, its actor or its node is gone.

It is an `Engine` over another one, so neither the pool nor the publisher knows of it, save that the publisher
gives the new one the weights of now. A call that an engine died in is made again from its beginning: seeds
are part of the requests and a round depends on weights and requests alone, so the answer is that of an
undisturbed run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rollout.engine import Completion, Engine, OwnProcess, Request, Sampling
from rollout.errors import EngineDied
from rollout.host import StartingEngine

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Restarts:
    """How many restarts the engines of a run have left, all together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        """Restarts so far."""
        self._lock = threading.Lock()

    def take(self, error: EngineDied) -> None:
        """Count a restart; the first is said. Raises `error` itself when none is left."""
        with self._lock:
            if self.count >= self.limit:
                raise error
            self.count += 1
            if self.count == 1:
                logger.warning(
                    "An engine is started again: %s Further restarts are counted in rollout/engine_restarts, "
                    "at most rollout.restarts=%d.",
                    error,
                    self.limit,
                )


class RestartingEngine:
    """An engine over one that may die. Implements `rollout.engine.Engine`.

    Calls raise what the engine raises; `EngineDied` only when no restart is left.
    """

    def __init__(self, start: Callable[[], StartingEngine], restarts: Restarts) -> None:
        """`start` begins to start the engine, now and after its end. `restarts`: shared by all engines."""
        self._start = start
        self.restarts = restarts
        self.renew: Callable[[Engine], None] = _nothing_published
        """Brings the weights of now to an engine that has just loaded its model; the publisher sets it."""
        self.starts = 0
        """How often it was started again."""
        self._engine = start()

    @property
    def label(self) -> str:
        """What it is called where its stacks are written."""
        return self._engine.label if isinstance(self._engine, OwnProcess) else "engine"

    @property
    def weight_version(self) -> int:
        """The version of the installed weights; 0 are those loaded from disk."""
        return self._engine.weight_version

    def wait(self) -> None:
        """Wait until the model is loaded; raises what loading it raised."""
        self._answer(lambda engine: engine.wait())

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine.generate`; all of the round anew when the engine died in it."""
        return self._answer(lambda engine: engine.generate(requests, sampling))

    def score(self, sequences: Sequence[list[int]], temperature: float = 1.0) -> list[list[float]]:
        """See `Engine.score`."""
        return self._answer(lambda engine: engine.score(sequences, temperature))

    def effective_sampling(self, sampling: Sampling) -> dict[str, Any]:
        """See `Engine.effective_sampling`."""
        return self._answer(lambda engine: engine.effective_sampling(sampling))

    def init_transfer(self, info: dict[str, Any]) -> None:
        """See `Engine.init_transfer`."""
        self._answer(lambda engine: engine.init_transfer(info))

    def receive_weights(self, info: dict[str, Any], version: int) -> dict[str, Any]:
        """See `Engine.receive_weights`."""
        return self._answer(lambda engine: engine.receive_weights(info, version))

    def memory(self) -> dict[str, float]:
        """See `Engine.memory`."""
        return self._answer(lambda engine: engine.memory())

    def stacks(self) -> str:
        """Where every Python thread of its process is; empty when it cannot say."""
        return self._engine.stacks() if isinstance(self._engine, OwnProcess) else ""

    def close(self) -> None:
        """Release the engine for good; safe to call twice."""
        self._engine.close()

    def _answer(self, call: Callable[[StartingEngine], Answer]) -> Answer:
        while True:
            try:
                return call(self._engine)
            except EngineDied as error:
                self._start_again(error)

    def _start_again(self, error: EngineDied) -> None:
        """A new engine with the weights of now; it may die as well, while a restart is left."""
        while True:
            self.restarts.take(error)
            self.starts += 1
            self._engine.close()
            try:
                self._engine = self._start()
                self._engine.wait()
                self.renew(self._engine)
                return
            except EngineDied as again:
                error = again


def _nothing_published(engine: Engine) -> None:
    """Before a publisher is there, the model on disk is what every engine has."""
