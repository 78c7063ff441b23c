"""Synchronous against asynchronous at staleness 1: what overlapping generation with learning gains.

    python -m tests.benchmarks.scaling [--steps 12] [--repeats 3] [--out FOLDER] [--quick] [key=value ...]

The arms are whole `rlhf train` runs in processes of their own, in turn. The synchronous one has every core in
each phase. Of the asynchronous ones the first gives engine and learner every core too, the second half of
them each. `--quick` is `dapo/tiny` for a few steps on one core: it shows that this works, not what it gains.

The ideal is that of the synchronous run's own phases: a step as long as the longer of generation (rollout and
reward) and of the rest. It takes for granted that neither slows the other down, so that on shared cores,
where each of the two has used them all, it cannot be reached.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.tracking.jsonl import read
from tests.benchmarks.measuring import markdown

WARM_UP = 3
"""Steps that are left out: pages, caches, the first rollout that nothing can overlap."""

COMMON = (
    "rollout.process=child", "evaluation.every=0", "evaluation.at_end=false", "tracking.completions_every=0"
)  # fmt: skip
AHEAD = ("loop.staleness=1",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to run."""

    name: str
    overrides: tuple[str, ...] = ()
    share: float = 1.0
    """Of the cores, for the engine and for the learner each."""


ARMS = (
    Arm(name="synchronous"),
    Arm(name="staleness 1, all cores each", overrides=AHEAD),
    Arm(name="staleness 1, half of them each", overrides=AHEAD, share=0.5),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Medians over the steps of an arm, seconds."""

    step: float
    generation: float
    """Rollout and reward, wherever they ran."""
    learner: float
    """The loop's other phases, but waiting."""
    wait: float
    """The loop's waiting for groups and for engines."""
    age: float
    """Mean age of what was learned from, in versions."""


def timing(rows: Sequence[Mapping[str, float]]) -> Timing:
    """Of rows of `metrics.jsonl`. Raises ValueError when none is left after the warm-up."""
    steady = [row for row in rows if row["step"] > WARM_UP]
    if not steady:
        raise ValueError(
            f"{len(rows)} rows leave nothing after {WARM_UP} steps of warm-up: give more --steps."
        )
    waits = [row.get("time/wait", 0.0) for row in steady]
    alone = [row.get("time/rollout", 0.0) + row.get("time/reward", 0.0) for row in steady]
    beside = [row.get("ahead/rollout_seconds", 0.0) + row.get("ahead/reward_seconds", 0.0) for row in steady]
    return Timing(
        step=statistics.median(row["time/step"] for row in steady),
        generation=statistics.median(map(sum, zip(alone, beside))),
        learner=statistics.median(row["time/step"] - w - a for row, w, a in zip(steady, waits, alone)),
        wait=statistics.median(waits),
        age=statistics.mean(row.get("staleness/mean", 0.0) for row in steady),
    )


def gained(synchronous: Timing, other: Timing) -> float:
    """Share of the ideal overlap: 0 as slow as the synchronous run, 1 the longer of its two halves."""
    ideal = max(synchronous.generation, synchronous.learner)
    possible = synchronous.step - ideal
    return (synchronous.step - other.step) / possible if possible > 0 else 0.0


def table(found: Mapping[str, Timing]) -> str:
    """Markdown; the first arm is the synchronous one."""
    base = next(iter(found.values()))
    columns = [
        "arm",
        "s a step",
        "generation s",
        "learner s",
        "waiting s",
        "age",
        "speed-up",
        "of the ideal overlap",
    ]
    rows = [
        [
            name,
            *(f"{value:.3g}" for value in (one.step, one.generation, one.learner, one.wait, one.age)),
            f"{base.step / one.step:.2f} x",
            "" if one is base else f"{gained(base, one):.0%}",
        ]
        for name, one in found.items()
    ]
    ideal = max(base.generation, base.learner)
    return f"{markdown(columns, rows)}\n\nideal step: {ideal:.3g} s ({base.step / ideal:.2f} x)"


def run(arm: Arm, recipe: str, overrides: Sequence[str], folder: Path, cores: int) -> list[dict[str, float]]:
    """Train one arm into `folder`; its rows of metrics."""
    threads = max(1, int(cores * arm.share))
    command = [
        sys.executable,
        "-m",
        "rlhf.cli",
        "train",
        recipe,
        f"run.dir={folder}",
        *COMMON,
        *arm.overrides,
    ]
    subprocess.run(
        [*command, f"rollout.threads={threads}", *overrides],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return read(folder / "metrics.jsonl")


def measure(
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    repeats: int,
    cores: int,
    arms: Sequence[Arm] = ARMS,
) -> dict[str, Timing]:
    """Every arm `repeats` times in turn; the median of its runs by step time."""
    runs: dict[str, list[Timing]] = {arm.name: [] for arm in arms}
    for repeat in range(repeats):
        for index, arm in enumerate(arms):
            rows = run(arm, recipe, overrides, out / f"arm-{index}-{repeat}", cores)
            runs[arm.name].append(timing(rows))
    return {name: sorted(found, key=lambda one: one.step)[len(found) // 2] for name, found in runs.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    recipe, steps, repeats = "dapo/arithmetic", given.steps, given.repeats
    cores = len(os.sched_getaffinity(0))
    if given.quick:
        recipe, steps, repeats, cores = "dapo/tiny", WARM_UP + 1, 1, 1
    found = measure(recipe, [f"loop.steps={steps}", *given.overrides], given.out, repeats, cores)
    print(table(found))


if __name__ == "__main__":
    main()
