"""The table of sync against async: its numbers by hand, and its quick form for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.scaling import QUICK, Arm, Timing, gained, main, table, timing


def rows(**values: float) -> list[dict[str, float]]:
    """Three steps of warm-up and two that count."""
    slow = {"time/step": 99.0, "time/wait": 99.0, "time/publish": 9.0, "weights/bytes": 9e9}
    usual = {"time/publish": 0.5, "weights/bytes": 3e6}
    steps = [{**(slow if step < 4 else usual | values), "step": float(step)} for step in range(6)]
    before = {"step": 0.0, "eval/accuracy": 0.1}
    return [before, *(row | {"train/tokens": 100.0 * row["step"]} for row in steps)]


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
    common = {"publish": 0.5, "megabytes": 3.0}
    assert Timing(step=10, generation=6, learner=4, wait=0, tokens=10, age=0, **common) == SYNCHRONOUS
    assert Timing(step=7, generation=6.5, learner=5, wait=2, tokens=200 / 14, age=1, **common) == AHEAD
    with pytest.raises(ValueError, match="leave nothing after 3 steps of warm-up: give more --steps"):
        timing(rows()[:5])


def test_the_overlap_against_the_ideal() -> None:
    assert gained(SYNCHRONOUS, AHEAD) == 0.75
    assert gained(SYNCHRONOUS, SYNCHRONOUS) == 0
    lines = table({"synchronous": SYNCHRONOUS, "ahead": AHEAD}).splitlines()
    assert lines[2] == "| synchronous | 10 | 6 | 4 | 0 | 0.5 | 3 | 10 | 0 | 1.00 x | 1.00 x |  |"
    assert lines[3] == "| ahead | 7 | 6.5 | 5 | 2 | 0.5 | 3 | 14.3 | 1 | 1.43 x | 1.43 x | 75% |"
    assert lines[-1] == "ideal step: 6 s (1.67 x)"


def test_what_an_arm_runs() -> None:
    arm = Arm(name="both", engines=2, ranks=2, share=0.5)
    command = arm.command("dapo/tiny", Path("out"), cores=8)
    assert command[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rlhf.cli", "train",
        "dapo/tiny", "run.dir=out", "rollout.engines=2", "rollout.threads=2",
    ]  # fmt: skip


def test_the_quick_form(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path)])
    printed = capfd.readouterr().out.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in printed[2:4]] == [arm.name for arm in QUICK]
    assert printed[-1].startswith("ideal step: ")
