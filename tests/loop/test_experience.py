"""What a step's experience looked like, by hand."""

from __future__ import annotations

import pytest

from rlhf.experience import experience_metrics, mean_updates, throughput
from rollout.types import FinishReason, VersionSpan
from tests.loop.groups import group, trajectory


def test_metrics_are_over_everything_generated() -> None:
    kept = group([trajectory(2, 1.0), trajectory(6, 0.0)], "a", born=3)
    dropped = group([trajectory(4, 0.0), trajectory(8, 0.0, finish=FinishReason.LENGTH)], "b", born=4)
    found = experience_metrics([kept, dropped], [kept], step=4, version=5)
    assert found["train/accuracy"] == 0.25
    assert found["train/responses"] == 4
    assert found["train/format"] == 0.75
    assert found["reward/exact_mean"] == 0.25
    assert found["reward/exact_std"] == pytest.approx(0.1875**0.5)
    assert found["length/mean"] == 5
    assert found["length/truncated"] == 0.25
    assert found["length/right_mean"] == 2
    assert found["length/wrong_mean"] == 6
    assert (found["staleness/mean"], found["staleness/max"]) == (1, 1)
    assert (found["staleness/token_mean"], found["staleness/token_max"]) == (4, 4)


def test_ages_of_tokens_are_those_of_the_versions_that_wrote_them() -> None:
    updated_in_flight, fresh = trajectory(6), trajectory(2)
    updated_in_flight.version_spans = [
        VersionSpan(start=0, end=4, version=3), VersionSpan(start=4, end=6, version=4)
    ]  # fmt: skip
    fresh.version_spans = [VersionSpan(start=0, end=2, version=4)]
    kept = [group([updated_in_flight, fresh], born=2)]
    found = experience_metrics(kept, kept, step=3, version=4)
    assert (found["staleness/mean"], found["staleness/max"]) == (1, 1)
    assert (found["staleness/token_mean"], found["staleness/token_max"]) == (0.5, 1)


def test_a_step_that_generated_nothing_has_no_metrics() -> None:
    assert experience_metrics([], [], step=0, version=1) == {}


def test_updates_are_averaged_except_maxima_and_counters() -> None:
    updates = [
        {"policy/loss": 1.0, "policy/ratio_max": 2.0, "learner/optimizer_steps": 1, "learner/tokens": 10},
        {"policy/loss": 3.0, "policy/ratio_max": 1.5, "learner/optimizer_steps": 2, "learner/tokens": 20},
    ]
    assert mean_updates(updates) == {
        "policy/loss": 2.0,
        "policy/ratio_max": 2.0,
        "learner/optimizer_steps": 2,
        "learner/tokens": 30,
    }


def test_throughput() -> None:
    metrics = {"length/mean": 5.0, "train/responses": 20.0, "learner/tokens": 300.0}
    times = {"time/rollout": 2.0, "time/update": 3.0, "time/step": 10.0}
    assert throughput(metrics, times) == {
        "throughput/generated": 50.0,
        "throughput/learned": 100.0,
        "throughput/total": 10.0,
    }
    assert throughput({}, times) == {}
