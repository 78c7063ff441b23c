"""`Run`: the one object that owns every part of a training run and all of its state."""

from __future__ import annotations

import logging
import typing
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf import randomness, state_file
from rlhf.algorithms.dynamic_sampling import Selector
from rlhf.checkpoint import STATE, Checkpoints
from rlhf.clock import Clock
from rlhf.config import Config
from rlhf.data.cursor import Cursor
from rlhf.evaluation.runner import Grader
from rlhf.evaluation.stamp import Stamp
from rlhf.generation import Generation, Source
from rlhf.interruption import Interruption
from rlhf.ledger import Ledger
from rlhf.memory import MemoryMonitor
from rlhf.resume import FolderLock
from rlhf.rewards.base import Scorer
from rlhf.tracking.base import Trackers
from rollout.engine import Sampling
from rollout.pool import Draw, LocalPool
from rollout.recorder import Recorder
from rollout.turns import Turns, paused
from rollout.types import Group, Prompt
from rollout.weights.publisher import Publisher
from trainer.learner import Learner
from trainer.model import WeightStream

logger = logging.getLogger(__name__)


_COUNTERS = ("step", "generated", "stopped", "shortages", "last_metrics", "accuracies")
"""Plain values of a `Run` that a checkpoint holds as they are."""


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that a run holds, built by `rlhf.pipeline` and driven by `rlhf.loop`."""

    config: Config
    folder: Path
    lock: FolderLock
    checkpoints: Checkpoints
    heldout: list[Prompt]
    """Prompts that evaluation answers (`evaluation.split`)."""
    generation: Generation
    """How groups come about; belongs to the thread of `source`."""
    source: Source
    """Where each step's groups come from."""
    cursor: Cursor
    """As it was when the groups of the step in progress were complete; generation may be further."""
    selector: Selector
    """Likewise: with the groups that are carried into the next step."""
    tokenizer: Any
    pool: LocalPool
    turns: Turns
    """Who may use the engines."""
    sampling: Sampling
    scorer: Scorer
    learner: Learner
    publisher: Publisher
    stamp: Stamp
    """What evaluations are measured with."""
    graders: dict[str, Grader]
    """Second opinions that evaluation reports beside the strict rule."""
    trackers: Trackers
    recorder: Recorder
    ledger: Ledger
    clock: Clock
    memory: MemoryMonitor
    interruption: Interruption = field(default_factory=Interruption)
    resumed: bool = False
    """Whether the run goes on from a checkpoint: what precedes its next step is logged already."""
    step: int = 0
    """Rollout steps finished."""
    generated: int = 0
    """Response tokens generated for training so far."""
    stopped: bool = False
    """Whether the run ended early for want of groups or data."""
    shortages: int = 0
    """Steps so far that found fewer groups than they wanted."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the step in progress has measured so far."""
    last_metrics: dict[str, float] = field(default_factory=dict)
    """What the last closed step measured."""
    accuracies: dict[int, float] = field(default_factory=dict)
    """Of all evaluations, by step."""

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        loop = self.config.loop
        return self.stopped or self.step >= loop.steps or 0 < loop.max_tokens <= self.generated

    @property
    def goes_on(self) -> bool:
        """Whether another step is to be made now: one is left and no signal has asked to end."""
        return not self.finished and self.interruption.received is None

    def between_rounds(self) -> AbstractContextManager[None]:
        """Wait until the engines have ended the round in progress; no other begins inside the block."""
        return self.turns(waiting=self.clock("wait"))

    def publishing(self) -> AbstractContextManager[None]:
        """When engines may take new weights: between rounds, with `loop.inflight_updates` in their midst."""
        return paused(self.pool.engines) if self.config.loop.inflight_updates else self.between_rounds()

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One response to each prompt, for evaluation; its group ids never meet training's."""
        draws = [Draw(prompt=p, group_id=f"eval/{self.step}/{p.id}", samples=1) for p in prompts]
        with self.between_rounds():
            self.learner.offload()
            return self.pool.generate(draws, sampling, born=self.step, decode=self.generation.decode)

    def weights(self) -> WeightStream:
        """The learner's weights in the engines' number format."""
        return self.learner.weights(self.engine_dtype)

    @property
    def engine_dtype(self) -> torch.dtype:
        """The number format that the engines hold weights in."""
        return typing.cast(torch.dtype, getattr(torch, self.config.rollout.dtype.value))

    def say(self, sentence: str) -> None:
        """Tell the user something that must not be missed."""
        logger.warning(sentence)

    def say_shortage(self, sentence: str, last: bool) -> None:
        """Count a step that is short of groups; the first is said, every tenth, and one that ends the run."""
        self.shortages += 1
        if self.shortages == 1 or last:
            self.say(sentence)
        elif self.shortages % 10 == 0:
            self.say(f"{self.shortages} of {self.step + 1} steps were short of groups, the last: {sentence}")

    def ran_dry(self, kept: Sequence[Group]) -> bool:
        """Whether a step kept nothing because the data ran out, as all later ones would; it is said."""
        dry = not kept and self.cursor.exhausted
        if dry:
            self.say(f"The training data ran out (data.epochs={self.config.data.epochs}): the run ends.")
        return dry

    def save(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder, and inside it what a resumed run needs."""
        self.learner.save(folder, self.tokenizer)
        state_file.write(folder / STATE, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside its configuration. Sampling has no state: seeds are hashes."""
        return {
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "version": self.publisher.version,
            "elapsed": self.clock.elapsed,
            "learner": self.learner.state_dict(),
            "cursor": self.cursor.state_dict(),
            "selector": self.selector.state_dict(),
            "trackers": self.trackers.run_ids(),
            "randomness": randomness.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of a run with the same configuration.

        The first publish brings these weights to the engines, under the version that they had. Generation has
        not begun: cursor and selector are its own.
        """
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.publisher.version = state["version"] - 1
        self.clock.elapsed = state["elapsed"]
        self.learner.load_state_dict(state["learner"])
        self.cursor.load_state_dict(state["cursor"])
        self.selector.load_state_dict(state["selector"])
        randomness.load_state_dict(state["randomness"])
        self.resumed = True

    def close(self) -> None:
        """Release engines, graders, trackers and other ranks, whatever happened before."""
        self.source.stop()
        parts = (self.trackers, self.publisher, self.pool, self.learner, self.scorer, self.source)
        for part in (*parts, self.ledger, self.lock):
            try:
                part.close()
            except Exception:
                logger.exception("Closing %s failed.", type(part).__name__)
