"""Whole runs that generate ahead of learning: equal to a synchronous one at a lead of 0, and whole at 1."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rlhf
from rlhf import pipeline
from rlhf.ahead import Ahead
from rlhf.checkpoint import Checkpoints
from rlhf.cli import main
from rlhf.clock import Clock
from rlhf.config import Config
from rlhf.errors import InterruptedRunError, RunStoppedError, UserError
from rlhf.generation import Generation
from rlhf.replay import replay
from rlhf.tracking.jsonl import read
from rollout import recorder
from rollout.child_engine import ChildEngine
from rollout.types import Group
from tests.integration.test_resumed_runs import assert_equal, outcome
from trainer.learner import Learner

TINY = "dapo/tiny"
FOLDER = Path("runs/dapo-tiny")
CHILD: dict[str, Any] = {
    "rollout.process": "child",
    "algorithm.dynamic_sampling.oversample": 2,
    "algorithm.dynamic_sampling.surplus": "carry",
    "algorithm.dynamic_sampling.max_age": 2,
    "learner.schedule.name": "linear",
    "tracking.completions_every": 1,
}
"""Refills, and groups that are carried over."""
AHEAD = {**CHILD, "loop.staleness": 1}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Whatever ends a run, its generation ends too."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "generation-ahead"] == []


# ---------------------------------------------------------------- a lead of 0


def test_a_lead_of_0_equals_the_synchronous_run_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 steps with refills, carried groups, evaluations and two engines: the machinery changes nothing."""
    overrides = {**CHILD, "loop.steps": 20, "rollout.engines": 2, "evaluation.every": 5}
    monkeypatch.setattr("tests.integration.test_resumed_runs.STEPS", 20)
    rlhf.train(TINY, {**overrides, "run.dir": "alone"})
    monkeypatch.setattr(pipeline, "_source", without_lead)
    rlhf.train(TINY, {**overrides, "run.dir": "threaded"})
    ours, theirs = outcome(Path("threaded")), outcome(Path("alone"))
    for row in (*ours["metrics"], *theirs["metrics"]):
        row.pop("ahead/ready", None)
    for found in (ours, theirs):
        found["state"]["counters"]["last_metrics"].pop("ahead/ready", None)
    assert_equal(ours, theirs)
    rows = read(Path("threaded/metrics.jsonl"))
    assert sum(row.get("selection/rounds", 0) for row in rows) > 25, "refills"
    assert sum(row.get("selection/carried_in", 0) for row in rows) > 0
    assert all(row["time/rollout"] for row in read(Path("alone/metrics.jsonl"))[1:])
    assert all("time/rollout" not in row and row["ahead/rollout_seconds"] for row in rows[1:])


def without_lead(config: Config, generation: Generation, clock: Clock) -> Ahead:
    """The asynchronous machinery, held to what a synchronous run does."""
    return Ahead(generation, clock, lead=0, last=config.loop.steps)


# ---------------------------------------------------------------- a lead of 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, one step ahead, every step saved."""
    folder = tmp_path_factory.mktemp("ahead") / "run"
    rlhf.train(
        TINY,
        {
            **AHEAD,
            "loop.steps": 8,
            "run.dir": str(folder),
            "checkpoint.every": 1,
            "checkpoint.keep": 9,
            "evaluation.every": 3,
        },
    )
    return folder


def groups_of(folder: Path) -> dict[int, list[Group]]:
    """Every recorded group by step."""
    return {step: recorder.read(folder / "rollouts", step) for step in recorder.steps(folder / "rollouts")}


def test_ages_and_times_of_a_run_one_step_ahead(finished: Path) -> None:
    rows = read(finished / "metrics.jsonl")[1:]
    assert [row["weights/version"] for row in rows] == list(range(2, 10))
    assert rows[0]["staleness/max"] == 0
    assert {row["staleness/max"] for row in rows} <= {0, 1, 2}
    assert max(row["staleness/max"] for row in rows) >= 1
    for row in rows:
        assert row["staleness/token_max"] == row["staleness/max"], "a round is generated under one version"
        phases = sum(
            v for k, v in row.items() if k.startswith("time/") and k not in ("time/step", "time/elapsed")
        )
        assert phases == pytest.approx(row["time/step"], rel=1e-6)
        assert "time/rollout" not in row
        assert row["ahead/rollout_seconds"] > 0
        assert row["throughput/generated"] == pytest.approx(
            row["length/mean"] * row["train/responses"] / row["ahead/rollout_seconds"]
        )


def test_every_draw_is_recorded_and_trained_at_most_once(finished: Path) -> None:
    account_for_every_draw(finished)


def account_for_every_draw(folder: Path) -> None:
    """By id, from the recorded rollouts: each draw has one end, but those that the last step carries on."""
    recorded = groups_of(folder)
    ends = Counter(g.id for groups in recorded.values() for g in groups if g.verdict != "carried")
    carried_on = {group.id for group in recorded[max(recorded)] if group.verdict == "carried"}
    drawn = int(read(folder / "metrics.jsonl")[-1]["train/prompts"])
    assert set(ends.values()) == {1}
    assert sorted({*ends} | carried_on) == [f"{number:08d}" for number in range(drawn)]
    assert not {*ends} & carried_on


def test_behaviour_logprobs_are_those_of_the_version_that_wrote_each_token(finished: Path) -> None:
    """Version v + 1 is the checkpoint of step v: its model gives what the engine recorded, others do not."""
    old = [
        (step, group)
        for step, groups in groups_of(finished).items()
        for group in groups
        if group.verdict == "kept" and 1 <= group.born < step - 1
    ]
    assert old, "groups that were trained one step or more after their version"
    for step, group in old[:4]:
        response = group.trajectories[0]
        (span,) = response.version_spans
        assert span.version == group.born + 1
        assert (span.start, span.end) == (0, len(response.response_ids))
        own, newer = (logprobs(finished, saved, response) for saved in (group.born, step - 1))
        assert response.logprobs == pytest.approx(own, abs=1e-4)
        assert response.logprobs != pytest.approx(newer, abs=1e-4)
    weights = [row["mismatch/weight_square"] for row in read(finished / "metrics.jsonl")[1:]]
    assert max(abs(weight - 1) for weight in weights) > 1e-4, "the correction takes it into account"


def logprobs(folder: Path, step: int, response: Any) -> list[float]:
    """Log-probs of a response under the checkpoint of `step`, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(Checkpoints(folder).path(step), dtype=torch.float32)
    ids = torch.tensor([response.prompt_ids + response.response_ids])
    with torch.no_grad():
        table = model(ids).logits[0].log_softmax(-1)
    start = len(response.prompt_ids) - 1
    return [float(table[start + index, token]) for index, token in enumerate(response.response_ids)]


@pytest.mark.parametrize("step", [2, 7])
def test_a_step_is_replayed_bit_for_bit(step: int, finished: Path) -> None:
    found = replay(f"{finished}@{step}")
    assert found.different == []
    assert found.saved["weights"].equal
    assert found.status == 0


def test_weights_are_published_in_the_midst_of_rounds() -> None:
    """Rounds of many tokens beside short steps: every publish is proven, and spans tell what wrote what."""
    overrides = {**AHEAD, "loop.inflight_updates": True, "rollout.max_new_tokens": 64, "loop.steps": 4}
    rlhf.train(TINY, {**overrides, "evaluation.every": 2})
    account_for_every_draw(FOLDER)
    rows = read(FOLDER / "metrics.jsonl")[1:]
    assert [row["weights/version"] for row in rows] == [2, 3, 4, 5]
    assert all(row["staleness/token_max"] <= row["staleness/max"] <= 2 for row in rows)
    for groups in groups_of(FOLDER).values():
        for response in (t for group in groups for t in group.trajectories):
            spans = response.version_spans
            assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
            assert spans[-1].end == len(response.response_ids)
            assert [span.version for span in spans] == sorted({span.version for span in spans})


# ---------------------------------------------------------------- ended and gone on with


def test_no_sample_is_lost_or_trained_twice_over_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by the first signal in step 3 with a further step generated, and gone on with."""
    update = Learner.update

    def signalled(self: Learner, batches: Any) -> Any:
        if self.rollout_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batches)

    monkeypatch.setattr(Learner, "update", signalled)
    overrides = {**AHEAD, "loop.steps": 6, "evaluation.every": 0, "evaluation.at_end": False}
    with pytest.raises(InterruptedRunError):
        rlhf.train(TINY, overrides)
    assert Checkpoints(FOLDER).steps() == [3]
    monkeypatch.setattr(Learner, "update", update)
    assert rlhf.train(TINY, {**overrides, "resume": "auto"}).steps == 6
    account_for_every_draw(FOLDER)
    rows = read(FOLDER / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert {row["staleness/max"] for row in rows[1:]} <= {0, 1, 2}


# ---------------------------------------------------------------- what goes wrong beside the learner


def odd_lengths(prompts: Any, responses: list[str], answers: Any, rows: Any) -> list[float]:
    """A reward that disagrees within most groups."""
    return [float(len(response) % 2) for response in responses]


def test_a_reward_that_raises_ends_the_run_as_it_does_a_synchronous_one() -> None:
    calls: list[int] = []

    def raising(prompts: Any, responses: list[str], answers: Any, rows: Any) -> list[float]:
        calls.append(len(responses))
        if len(calls) > 2:
            raise KeyError("gold")
        return odd_lengths(prompts, responses, answers, rows)

    overrides = {**AHEAD, "loop.steps": 9, "evaluation.every": 0}
    with pytest.raises(UserError, match=r"raised KeyError: 'gold' .* Its traceback is in .*error\.txt"):
        rlhf.train(TINY, overrides, reward=raising)
    assert "KeyError: 'gold'" in (FOLDER / "error.txt").read_text()
    steps = recorder.steps(FOLDER / "rollouts")
    assert [row["step"] for row in read(FOLDER / "metrics.jsonl")] == [0, *steps], (
        "complete steps were trained"
    )


def test_an_engine_that_dies_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = ChildEngine.generate
    rounds: list[int] = []

    def killed(self: ChildEngine, requests: Any, sampling: Any) -> Any:
        rounds.append(len(requests))
        if len(rounds) == 4:
            os.kill(self.pid, signal.SIGKILL)
        return generate(self, requests, sampling)

    monkeypatch.setattr(ChildEngine, "generate", killed)
    overrides = {**AHEAD, "loop.steps": 50, "evaluation.every": 0, "evaluation.at_end": False}
    with pytest.raises(
        RunStoppedError, match=r"the run stopped .*: the engine's process \d+ ended by SIGKILL"
    ):
        rlhf.train(TINY, overrides)
    assert (FOLDER / "report.md").is_file()


def test_a_second_signal_stops_at_once_while_a_round_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = Learner.update

    def impatient(self: Learner, batches: Any) -> Any:
        if self.rollout_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batches)

    monkeypatch.setattr(Learner, "update", impatient)
    arguments = [f"{key}={value}" for key, value in AHEAD.items()]
    assert main(["train", TINY, *arguments, "loop.steps=5", "checkpoint.every=1"]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"rlhf: interrupted in step 2: the same command with run.dir={FOLDER} resume=auto goes on after "
        f"step 1."
    )
    assert Checkpoints(FOLDER).problem(1) == ""
