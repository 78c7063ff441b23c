"""`Generation`: what turns the order of prompts into the groups of a step: draw, generate, score, select.

It belongs to one thread, that of its `Source`: the loop's own, which generates when a step asks for it
(`Direct`), or one that runs ahead (`rlhf.ahead`). What the loop needs of it travels in a `Harvest`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from rlhf.algorithms import overlong
from rlhf.algorithms.config import KlPlace
from rlhf.algorithms.dynamic_sampling import Selection, Selector
from rlhf.algorithms.kl import response_penalty
from rlhf.batching import plain_rows
from rlhf.clock import Clock
from rlhf.config import Config
from rlhf.data.cursor import Cursor, Pick
from rlhf.ledger import Ledger
from rlhf.rewards.base import Scorer
from rollout.engine import Sampling
from rollout.pool import Decode, Draw, LocalPool
from rollout.turns import Turns
from rollout.types import Group, Prompt
from trainer.learner import Learner


@dataclass(slots=True, kw_only=True)
class Harvest:
    """What generation brings to one step."""

    selection: Selection
    generated: list[Group]
    """Every group of the step's rounds, in order."""
    failures: dict[str, float]
    """Responses without a proper verdict, by part (`ScoreReport.failures`), over all rounds."""
    cursor: Cursor
    """As it stood when the selection was complete: a checkpoint of the step saves it and `selector`."""
    selector: Selector
    metrics: dict[str, float] = field(default_factory=dict)
    """What generating ahead measured of itself, `ahead/...`."""

    @property
    def tokens(self) -> int:
        """Response tokens generated."""
        return sum(len(t.response_ids) for group in self.generated for t in group.trajectories)


class Source(Protocol):
    """Where a step's experience comes from."""

    def next(self, step: int) -> Harvest:
        """What step `step` (so many updates are published) learns from. Raises what generating it raised."""
        ...

    def stop(self) -> None:
        """Begin no further round; returns at once, safe to call twice."""
        ...

    def close(self) -> None:
        """Wait for the end of what `stop` stopped, after the engines are closed; safe to call twice."""
        ...


@dataclass(slots=True, kw_only=True)
class Generation:
    """Everything between a draw and a selection, and its state: the cursor and the selector."""

    config: Config
    prompts: dict[str, list[Prompt]]
    """Training prompts by source."""
    cursor: Cursor
    selector: Selector
    pool: LocalPool
    turns: Turns
    """Who may use the engines: one round at a time is generated, under one version."""
    sampling: Sampling
    scorer: Scorer
    learner: Learner
    """Told to free its memory before a round, and asked for log-probs when the reward holds a KL term;
    generation ahead refuses both."""
    decode: Decode
    updates: Callable[[], int]
    """Updates that the engines have installed."""
    ledger: Ledger
    """Told of every draw."""

    def harvest(self, step: int, clock: Clock) -> Harvest:
        """Draw prompts, generate and score whole groups until selection has enough for `step`."""
        generated: list[Group] = []
        failures: Counter[str] = Counter()
        self.selector.start(step)
        while self.selector.missing():
            picks = self.cursor.draw(self.selector.draws())
            if not picks:
                self.selector.exhaust("the training data ran out")
                break
            with self.turns(waiting=clock("wait")), clock("rollout"):
                groups = self.generate(picks, step)
            with clock("reward"):
                failures.update(self.score(groups))
            self.selector.offer(groups)
            generated += groups
        return Harvest(
            selection=self.selector.finish(),
            generated=[
                replace(group) for group in generated
            ],  # later steps say what becomes of those carried
            failures=dict(failures),
            cursor=self.cursor.copy(),
            selector=self.selector.copy(),
        )

    def generate(self, picks: Sequence[Pick], step: int) -> list[Group]:
        """One group of `loop.group_size` responses to each pick, seeded by the pick's serial number, for the
        step that `step` published updates precede."""
        draws = [
            Draw(
                prompt=self.prompts[pick.source][pick.index],
                group_id=f"{pick.serial:08d}",
                samples=self.config.loop.group_size,
            )
            for pick in picks
        ]
        self.learner.offload()
        self.ledger.drawn(step + 1, [draw.group_id for draw in draws], self.config.loop.group_size)
        again = functools.partial(self.ledger.again, step + 1)
        return self.pool.generate(draws, self.sampling, born=self.updates(), decode=self.decode, again=again)

    def score(self, groups: list[Group]) -> dict[str, float]:
        """Grade, then shape: raw accuracy stays what it was, the reward takes length and KL. Counts of
        failures."""
        failures = self.scorer.score(groups).failures()
        algorithm = self.config.algorithm
        overlong.shape_rewards(groups, algorithm.overlong, self.sampling.max_tokens)
        if algorithm.kl.coefficient and algorithm.kl.place is KlPlace.reward:
            trajectories = [t for group in groups for t in group.trajectories]
            rows = plain_rows(groups)
            old, reference = self.learner.logprobs(rows), self.learner.reference_logprobs(rows)
            for trajectory, now, then in zip(trajectories, old, reference, strict=True):
                trajectory.rewards["kl"] = response_penalty(algorithm.kl, now, then)
                trajectory.reward += trajectory.rewards["kl"]
        return failures


@dataclass(slots=True, frozen=True)
class Resting:
    """A source whose engines sleep once a step has its groups, until they are called again."""

    source: Source
    pool: LocalPool
    level: int
    """Of vLLM's sleep mode."""
    clock: Clock

    def next(self, step: int) -> Harvest:
        """See `Source.next`."""
        harvest = self.source.next(step)
        with self.clock("rollout"):
            self.pool.sleep(self.level)
        return harvest

    def stop(self) -> None:
        """See `Source.stop`."""
        self.source.stop()

    def close(self) -> None:
        """See `Source.close`."""
        self.source.close()


@dataclass(slots=True, frozen=True)
class Direct:
    """The synchronous source: a step generates when it asks."""

    generation: Generation
    clock: Clock

    def next(self, step: int) -> Harvest:
        """See `Source.next`."""
        return self.generation.harvest(step, self.clock)

    def stop(self) -> None:
        """Nothing runs between two calls."""

    def close(self) -> None:
        """Nothing to wait for."""
