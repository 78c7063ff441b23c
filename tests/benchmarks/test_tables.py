"""The pure parts of the race and of the curves: work, medians, tables, charts. TRL is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import cost_growth, versus_trl
from tests.benchmarks.learner_side import groups_of


def a_run(seconds: list[float], peak: float) -> dict[str, Any]:
    rollouts = [
        {"seconds": s, "generation": s / 4, "learner": s / 2, "samples": 128, "tokens": 1000} for s in seconds
    ]
    tensors = {"weights": 5e8, "gradient": 4e8, "adam": 8e8}
    return {
        "rollouts": rollouts,
        "optimizer_steps": 4,
        "peak": peak,
        "looks_per_second": 19.6,
        "bytes": tensors,
    }


def test_medians_of_rollouts_and_of_repetitions() -> None:
    found = versus_trl.summary([a_run([8, 4, 100], 5e9), a_run([10], 6e9), a_run([40, 40], 9e9)])
    assert found == {
        "seconds_a_step": 2.5,
        "samples_a_second": 12.8,
        "generated_a_second": 400.0,
        "learned_a_second": 200.0,
        "peak": 6e9,
        "spread": pytest.approx((16 - 3.2) / 12.8),
    }


def test_race_table() -> None:
    runs = {"Whetstone": [a_run([4.0], 5e9)], "TRL, fastest": [a_run([32.0], 1e10)]}
    lines = versus_trl.table({"whole": runs, "learners": runs}).splitlines()
    assert lines[2] == "| Whetstone | 1.00 | 32.00 | 0% | 1000 | 500 | 5.00 |"
    assert lines[3] == "| TRL, fastest | 8.00 | 4.00 | 0% | 125 | 62 | 10.00 |"
    assert lines[7] == "| Whetstone | 1.00 | 32.00 | 0% | 500 | 5.00 | 1.70 | 3.30 |"
    assert lines[-3] == "Whetstone / TRL, fastest: 8.0 x samples/s, 0.50 x peak memory."
    assert lines[-1] == "Memory was looked at 20 times a second or more often."


def test_contestants_alternate() -> None:
    order: list[str] = []

    def contestant(name: str) -> Any:
        def run(file: str) -> dict[str, Any]:
            order.append(file)
            return a_run([1.0], 1.0)

        return run

    runs = versus_trl.alternate({name: contestant(name) for name in ("A", "B, lean")}, 3, "x")
    assert order == ["x-a-0", "x-b-lean-0", "x-b-lean-1", "x-a-1", "x-a-2", "x-b-lean-2"]
    assert {name: len(repeated) for name, repeated in runs.items()} == {"A": 3, "B, lean": 3}


def test_recorded_samples_become_groups() -> None:
    samples = [
        {"group": g, "prompt_ids": [g], "response_ids": [7, 8], "logprobs": [-1.0, -2.0], "advantage": a}
        for g, a in [(0, 1.0), (0, -1.0), (1, 0.5)]
    ]
    groups = groups_of(samples)
    assert [[t.advantage for t in group.trajectories] for group in groups] == [[1.0, -1.0], [0.5]]
    assert groups[0].trajectories[1].logprobs == [-1.0, -2.0]
    assert groups[1].prompt.token_ids == groups[1].trajectories[0].prompt_ids == [1]


def growing(name: str, axis: str, x: list[float], power: float, memory: bool = True) -> dict[str, Any]:
    values = [{"seconds": 2 * at**power} | ({"step": 1e6 * at} if memory else {}) for at in x]
    return {"name": name, "axis": axis, "x": x, "values": values}


def test_growth_table_and_charts() -> None:
    series = [
        growing("learner", "group size", [4, 8, 16], 0.5),
        growing("generation", "group size", [4, 8, 16], 0.25, memory=False),
        growing("learner", "parameters", [1e6, 1e8], 1.0),
        growing("sliced head", "vocabulary", [4096, 16384], 1.0),
    ]
    lines = cost_growth.table({"series": series}).splitlines()
    assert lines[2] == "| learner | group size | 4 - 16 | 4.00 - 8.00 | 0.50 | 0% | 4 - 16 | 1.00 | 0% |"
    assert lines[3] == "| generation | group size | 4 - 16 | 2.83 - 4.00 | 0.25 | 0% | - | - | - |"
    assert lines[4].startswith("| learner | parameters | 1M - 100M |")
    titles = [(chart.title, len(chart.curves)) for chart in cost_growth.charts({"series": series})]
    assert titles == [
        ("Seconds over group size", 2),
        ("Seconds over parameters", 1),
        ("Step memory over group size", 1),
        ("Step memory over parameters", 1),
        ("Step memory over vocabulary", 1),
    ]


def test_axes_reach_where_they_should() -> None:
    spans = {(s.name, s.axis): (s.x[0], s.x[-1]) for s in cost_growth.all_series() if s.x}
    for name in ("learner", "generation"):
        assert spans[name, "group size"] == (4, 32)
        assert spans[name, "response limit"] == (64, 1024)
        assert spans[name, "prompt"] == (32, 1024)
    assert spans["sliced head", "vocabulary"] == spans["plain log-softmax", "vocabulary"] == (4096, 151_936)
    for series in cost_growth.all_series():
        assert len(series.points) == len(series.x or series.points)


@pytest.mark.skipif(sys.platform != "linux", reason="PSS is known on Linux only")
def test_a_point_measures_itself_and_the_head_holds_no_logits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.cost_growth", "--quick", "--threads", "1"]
    command += [
        "--only",
        "vocabulary",
        "--out",
        str(tmp_path / "x.json"),
        "--picture",
        str(tmp_path / "x.png"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "x.json").read_text())
    steps = {s["name"]: [value["step"] for value in s["values"]] for s in result["series"]}
    logits = cost_growth.HEAD_TOKENS * 16_384 * 4
    assert steps["plain log-softmax"][1] > 2 * logits
    assert steps["sliced head"][1] < logits
    assert (tmp_path / "x.png").stat().st_size > 10_000
