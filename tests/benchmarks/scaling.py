"""What more engines, more ranks, another pool, another transport and overlapping bring on one machine.

    python -m tests.benchmarks.scaling [--steps 12] [--repeats 3] [--out FOLDER] [--quick] [key=value ...]

The arms are whole `rlhf train` runs in processes of their own, in turn. The first is synchronous, of one
engine and one rank, which has every core in each phase; of two engines or two ranks each has half of them.
Of the asynchronous ones the first gives engine and learner every core too, the second half of them each.
`--quick` is `dapo/tiny` for a few steps on one core, and a few of the arms: it shows that this works,
not what it gains.

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
    ranks: int = 1
    """Of the learner, by torchrun."""
    engines: int = 1
    share: float = 1.0
    """Of the cores, for all engines together and for all ranks together."""

    def command(self, recipe: str, folder: Path, cores: int) -> list[str]:
        """What trains it, but for what all arms share."""
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", "-m"]
        launcher = [sys.executable, "-m", *(torchrun if self.ranks > 1 else [])]
        settings = [f"run.dir={folder}", f"rollout.engines={self.engines}", *self.overrides]
        settings.append(f"rollout.threads={self.threads(cores, self.engines)}")
        return [*launcher, "rlhf.cli", "train", recipe, *settings]

    def threads(self, cores: int, parts: int) -> int:
        """Of each part, where there are so many."""
        return max(1, int(cores * self.share / parts))


ARMS = (
    Arm(name="synchronous"),
    Arm(name="staleness 1, all cores each", overrides=AHEAD),
    Arm(name="staleness 1, half of them each", overrides=AHEAD, share=0.5),
    Arm(name="two engines", engines=2),
    Arm(name="two ranks, sharded", ranks=2),
    Arm(
        name="two ranks, replicated",
        ranks=2,
        overrides=("learner.parallel.replicate=2", "learner.parallel.shard=1"),
    ),
    Arm(name="two engines, two ranks", engines=2, ranks=2),
    Arm(name="engine on Ray", overrides=("rollout.pool=ray",)),
    Arm(name="weights by TCP", overrides=("weights.transport=tcp",)),
)
QUICK = (ARMS[0], ARMS[6])


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
    publish: float
    megabytes: float
    """That a publish transfers."""
    tokens: float
    """Response tokens generated a second, over all steps together."""
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
        publish=statistics.median(row["time/publish"] for row in steady),
        megabytes=statistics.median(row["weights/bytes"] for row in steady) / 1e6,
        tokens=_tokens(rows) / sum(row["time/step"] for row in steady),
        age=statistics.mean(row.get("staleness/mean", 0.0) for row in steady),
    )


def _tokens(rows: Sequence[Mapping[str, float]]) -> float:
    """Generated after the warm-up."""
    counted = [row for row in rows if "train/tokens" in row]  # not where only an evaluation was logged
    return counted[-1]["train/tokens"] - max(r["train/tokens"] for r in counted if r["step"] <= WARM_UP)


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
        "publish s",
        "MB",
        "tokens/s",
        "age",
        "step, ratio",
        "tokens/s, ratio",
        "of the ideal overlap",
    ]
    rows = [
        [
            name,
            *(f"{value:.3g}" for value in (one.step, one.generation, one.learner, one.wait)),
            *(f"{value:.3g}" for value in (one.publish, one.megabytes, one.tokens, one.age)),
            f"{base.step / one.step:.2f} x",
            f"{one.tokens / base.tokens:.2f} x",
            f"{gained(base, one):.0%}" if one.age else "",
        ]
        for name, one in found.items()
    ]
    ideal = max(base.generation, base.learner)
    return f"{markdown(columns, rows)}\n\nideal step: {ideal:.3g} s ({base.step / ideal:.2f} x)"


def run(arm: Arm, recipe: str, overrides: Sequence[str], folder: Path, cores: int) -> list[dict[str, float]]:
    """Train one arm into `folder`; its rows of metrics."""
    subprocess.run(
        [*arm.command(recipe, folder, cores), *COMMON, *overrides],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "OMP_NUM_THREADS": str(arm.threads(cores, arm.ranks))},
    )
    return read(folder / "metrics.jsonl")


def measure(
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    repeats: int,
    cores: int,
    arms: Sequence[Arm],
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
    cores, arms = len(os.sched_getaffinity(0)), list(ARMS)
    if given.quick:
        recipe, steps, repeats, cores, arms = "dapo/tiny", WARM_UP + 1, 1, 1, list(QUICK)
    found = measure(recipe, [f"loop.steps={steps}", *given.overrides], given.out, repeats, cores, arms)
    print(table(found))


if __name__ == "__main__":
    main()
