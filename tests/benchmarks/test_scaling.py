"""The table of sync against async: its numbers by hand, and its quick form for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.scaling import ARMS, Timing, gained, main, table, timing


def rows(**values: float) -> list[dict[str, float]]:
    """Three steps of warm-up and two that count."""
    slow = {"step": 0.0, "time/step": 99.0, "time/wait": 99.0}
    return [{**slow, "step": float(step)} for step in range(4)] + [
        {"step": 4.0, **values},
        {"step": 5.0, **values},
    ]


def named(metrics: dict[str, float]) -> Timing:
    return timing([row | ({} if row["step"] < 4 else metrics) for row in rows()])


SYNCHRONOUS = named({"time/step": 10.0, "time/rollout": 5.0, "time/reward": 1.0, "time/wait": 0.0})
AHEAD = named(
    {
        "time/step": 7.0, "time/wait": 2.0, "ahead/rollout_seconds": 5.5, "ahead/reward_seconds": 1.0,
        "staleness/mean": 1.0,
    }
)  # fmt: skip


def test_where_the_seconds_are() -> None:
    assert Timing(step=10, generation=6, learner=4, wait=0, age=0) == SYNCHRONOUS
    assert Timing(step=7, generation=6.5, learner=5, wait=2, age=1) == AHEAD
    with pytest.raises(ValueError, match="leave nothing after 3 steps of warm-up: give more --steps"):
        timing(rows()[:4])


def test_the_overlap_against_the_ideal() -> None:
    assert gained(SYNCHRONOUS, AHEAD) == 0.75
    assert gained(SYNCHRONOUS, SYNCHRONOUS) == 0
    lines = table({"synchronous": SYNCHRONOUS, "ahead": AHEAD}).splitlines()
    assert lines[2] == "| synchronous | 10 | 6 | 4 | 0 | 0 | 1.00 x |  |"
    assert lines[3] == "| ahead | 7 | 6.5 | 5 | 2 | 1 | 1.43 x | 75% |"
    assert lines[-1] == "ideal step: 6 s (1.67 x)"


def test_the_quick_form(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path)])
    printed = capfd.readouterr().out.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in printed[2:5]] == [arm.name for arm in ARMS]
    assert printed[-1].startswith("ideal step: ")
