"""Generating ahead: the bound, the order, whose turn it is, and how it ends. Engines are a loop in Python."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from rlhf.ahead import Ahead
from rlhf.algorithms.config import DynamicSamplingConfig, Surplus
from rlhf.algorithms.dynamic_sampling import Selector
from rlhf.clock import Clock
from rlhf.config import Config
from rlhf.data.cursor import Cursor
from rlhf.generation import Direct, Generation, Source
from rlhf.rewards.base import ScoreReport
from rollout.engine import Sampling
from rollout.pool import Draw
from rollout.turns import Turns
from rollout.types import Group, Prompt
from tests.loop.groups import trajectory

PROMPTS = [Prompt(id=f"sums:{i}", token_ids=[1, 2], text="?", answer="7", source="sums") for i in range(10)]


class Lines:
    """A pool, a scorer and a ledger in one: a third of the draws teach nothing, decided by their number."""

    def __init__(self) -> None:
        self.rounds: list[tuple[str, ...]] = []
        self.before_round: Callable[[], None] = lambda: None
        self.after_scoring: Callable[[], None] = lambda: None

    def generate(
        self, draws: Sequence[Draw], sampling: Sampling, born: int, decode: Any, again: Any
    ) -> list[Group]:
        self.rounds.append(tuple(draw.group_id for draw in draws))
        self.before_round()
        return [
            Group(id=draw.group_id, prompt=draw.prompt, trajectories=members(draw), born=born)
            for draw in draws
        ]

    def offload(self) -> None:
        """There is nothing to put away."""

    def drawn(self, step: int, groups: Sequence[str], samples: int) -> None:
        """Nothing is written."""

    def again(self, step: int, groups: Sequence[str]) -> None:
        """Nothing dies."""

    def score(self, groups: list[Group]) -> ScoreReport:
        self.after_scoring()
        return ScoreReport()


def members(draw: Draw) -> list[Any]:
    useful = int(draw.group_id) % 3 != 0
    return [trajectory(2, float(index == 0 and useful)) for index in range(draw.samples)]


class Trainer:
    """The other side: takes steps and publishes, as the loop does."""

    def __init__(self, lines: Lines, lead: int | None, last: int = 100, **sampling: Any) -> None:
        config = Config()
        config.loop.group_size, config.loop.prompts = 2, 2
        self.updates = 0
        self.turns = Turns()
        self.clock = Clock()
        generation = Generation(
            config=config,
            prompts={"sums": PROMPTS},
            cursor=Cursor({"sums": len(PROMPTS)}, seed=0),
            selector=Selector(DynamicSamplingConfig(enabled=True, **sampling), 2),
            pool=lines,  # type: ignore[arg-type]
            turns=self.turns,
            sampling=Sampling(max_tokens=4),
            scorer=lines,  # type: ignore[arg-type]
            learner=lines,  # type: ignore[arg-type]
            decode=str,
            updates=lambda: self.updates,
            ledger=lines,  # type: ignore[arg-type]
        )
        self.source: Source = (
            Direct(generation, self.clock)
            if lead is None
            else Ahead(generation, self.clock, lead=lead, last=last)
        )

    def step(self) -> Any:
        """Take a step's groups, and publish."""
        harvest = self.source.next(self.updates)
        with self.turns():
            self.updates += 1
        return harvest


@contextmanager
def closing(trainer: Trainer) -> Iterator[Trainer]:
    try:
        yield trainer
    finally:
        trainer.source.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "generation-ahead"]


def eventually(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.001)


@pytest.mark.parametrize("lead", [0, 1, 3])
def test_generation_is_never_further_ahead_than_the_bound(lead: int) -> None:
    lines = Lines()
    with closing(Trainer(lines, lead, oversample=1.5)) as trainer:
        for _ in range(4):
            trainer.step()
            at_rest(lines)
            drawn = max(int(name) for names in lines.rounds for name in names) + 1
            assert drawn == draws_of(trainer.updates + lead), "exactly what the bound allows"


def hold(entered: threading.Event, go_on: threading.Event) -> None:
    """A round that lasts until it is told to go on."""
    entered.set()
    go_on.wait(10)


def at_rest(lines: Lines) -> None:
    """Until no further round begins."""
    before = -1
    while before != len(lines.rounds):
        before = len(lines.rounds)
        time.sleep(0.05)


def draws_of(steps: int) -> int:
    """Prompts that so many synchronous steps draw."""
    alone = Trainer(Lines(), lead=None, oversample=1.5)
    harvest = [alone.step() for _ in range(steps)][-1]
    return int(harvest.cursor.consumed)


@pytest.mark.parametrize("lead", [0, 2])
def test_steps_come_in_order_with_the_groups_and_the_state_of_a_synchronous_run(lead: int) -> None:
    options: dict[str, Any] = {"oversample": 2, "surplus": Surplus.carry, "max_age": 9}
    alone = Trainer(Lines(), lead=None, **options)
    with closing(Trainer(Lines(), lead, **options)) as trainer:
        for _ in range(6):
            ours, theirs = trainer.step(), alone.step()
            assert [group.id for group in ours.selection.groups] == [g.id for g in theirs.selection.groups]
            assert ours.cursor.state_dict() == theirs.cursor.state_dict()
            assert [group.verdict for group in ours.generated] == [g.verdict for g in theirs.generated]
            at_rest_state = ours.selector.state_dict()["carried"]
            assert [plain["id"] for plain in at_rest_state] == [g.id for g in ours.selection.carried]
            assert {plain["verdict"] for plain in at_rest_state} <= {"carried"}


@pytest.mark.parametrize("max_age", [1, 2])
def test_ages_stay_within_the_bounds_and_what_is_older_is_dropped_and_counted(max_age: int) -> None:
    options: dict[str, Any] = {"oversample": 4, "surplus": Surplus.carry, "max_age": max_age}
    found, stale = [], 0.0
    with closing(Trainer(Lines(), 1, **options)) as trainer:
        for step in range(8):
            harvest = trainer.step()
            found += [step - group.born for group in harvest.selection.groups]
            stale += harvest.selection.counts["selection/dropped_stale"]
            time.sleep(0.02)
    assert max(found) == max_age, "one step ahead, and where it may be carried one step more"
    assert (stale > 0) == (max_age == 1)


def test_a_publish_waits_for_the_round_and_the_next_round_for_the_publish() -> None:
    lines, entered, go_on = Lines(), threading.Event(), threading.Event()
    with closing(Trainer(lines, 1)) as trainer:
        trainer.step()
        at_rest(lines)
        lines.before_round = functools.partial(hold, entered, go_on)
        trainer.source.next(1)
        assert entered.wait(10)
        published: list[int] = []

        def publish() -> None:
            with trainer.turns():
                published.append(len(lines.rounds))

        thread = threading.Thread(target=publish)
        thread.start()
        eventually(lambda: len(trainer.turns._queue) == 2)
        time.sleep(0.05)
        rounds = len(lines.rounds)
        assert published == []
        go_on.set()
        thread.join(10)
        assert published == [rounds], "no round between its end and the publish"


def test_a_failure_comes_after_the_steps_that_were_complete_and_again() -> None:
    lines = Lines()

    def fail_at_third_round() -> None:
        if len(lines.rounds) == 3:
            raise KeyError("gold")

    lines.after_scoring = fail_at_third_round
    with closing(Trainer(lines, 5, max_rounds=1)) as trainer:
        trainer.step()
        eventually(lambda: len(lines.rounds) == 3)
        trainer.step()
        for _ in range(2):
            with pytest.raises(KeyError, match="gold"):
                trainer.step()
    assert trainer.clock.failed == "wait"


def test_the_last_step_is_the_last_that_is_generated() -> None:
    lines = Lines()
    with closing(Trainer(lines, 5, last=3, max_rounds=1)) as trainer:
        for _ in range(3):
            trainer.step()
    assert len(lines.rounds) == 3


def test_stopping_returns_at_once_and_closing_waits_for_the_round() -> None:
    lines, entered, go_on = Lines(), threading.Event(), threading.Event()
    with closing(Trainer(lines, 1, max_rounds=1)) as trainer:
        trainer.step()
        at_rest(lines)
        lines.before_round = functools.partial(hold, entered, go_on)
        trainer.step()
        assert entered.wait(10)
        trainer.source.stop()
        threading.Timer(0.05, go_on.set).start()
    assert go_on.is_set()
    assert len(lines.rounds) == 3


def test_waiting_and_generating_have_clocks_of_their_own() -> None:
    lines = Lines()
    lines.before_round = lambda: time.sleep(0.03)
    with closing(Trainer(lines, 1)) as trainer:
        first = trainer.step()
        time.sleep(0.3)  # learning
        second = trainer.step()
    assert first.metrics["ahead/rollout_seconds"] >= 0.03 * first.selection.counts["selection/rounds"]
    assert second.metrics["ahead/rollout_seconds"] >= 0.03 * second.selection.counts["selection/rounds"]
    times = trainer.clock.metrics()
    assert times["time/wait"] < first.metrics["ahead/rollout_seconds"] + 0.1, "the second one was ready"
    assert "time/rollout" not in times
