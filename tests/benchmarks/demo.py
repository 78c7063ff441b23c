"""The demo, measured: three seeds and a random-reward control, one after the other; prints one table.

    python -m tests.benchmarks.demo [--seeds 0 1 2] [--out runs/benchmark] [key=value ...]

Every run is `rlhf train dapo/arithmetic` in a process of its own, so start-up is paid as a user pays it.
Accuracy is greedy on the 200 held-out sums. Nothing is chosen on them: settings were chosen on validation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlhf.tracking.jsonl import read

RANDOM = [
    "reward.parts.exact.weight=0",
    "reward.accuracy_from=exact",
    "reward.parts.random.kind=function",
    "reward.parts.random.path=tests.benchmarks.demo:random_reward",
    "algorithm.overlong.buffer=0",
    "algorithm.dynamic_sampling.enabled=false",
]
"""Overrides of the control: a coin for a reward, every group learned from; the exact grader only measures."""
TARGET = 0.95


def random_reward(prompts: list[str], responses: list[str], *_: Any) -> list[float]:
    """A coin that depends on nothing but the text: the control that training on noise is compared with."""
    texts = zip(prompts, responses, strict=True)
    return [float(hashlib.blake2b(f"{p}/{r}".encode()).digest()[0] & 1) for p, r in texts]


def train(folder: Path, overrides: list[str]) -> float:
    """Run the demo into `folder`; returns wall-clock seconds, start-up included."""
    command = [sys.executable, "-m", "rlhf.cli", "train", "dapo/arithmetic", f"run.dir={folder}", *overrides]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.monotonic() - started


def row(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """The numbers of one run: first and last evaluation, time to the target."""
    steps = read(folder / "metrics.jsonl")
    evaluations = [step for step in steps if "eval/accuracy" in step]
    first, last = evaluations[0], evaluations[-1]
    reached = [step for step in evaluations if step["eval/accuracy"] >= TARGET]
    return {
        "run": name,
        "steps": int(last["step"]),
        "before": first["eval/accuracy"],
        "after": last["eval/accuracy"],
        "low": last["eval/accuracy_low"],
        "high": last["eval/accuracy_high"],
        "mention before": first["eval/any_mention"],
        "mention after": last["eval/any_mention"],
        "format before": first["eval/format"],
        "format after": last["eval/format"],
        "minutes": last["time/elapsed"] / 60,
        "minutes to 95 %": reached[0]["time/elapsed"] / 60 if reached else None,
        "wall": seconds / 60,
        "peak GB": max(step.get("memory/peak_pss", 0.0) for step in steps) / 1e9,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a run and the median of the seeds."""
    columns = ["run", "steps", "accuracy before", "after [95 % Wilson]", "any mention", "format"]
    columns += ["training min", "to 95 %", "with start-up", "peak GB"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cells(r)) + " |" for r in rows]
    seeds = [r["after"] for r in rows if r["run"].startswith("seed")]
    return "\n".join([*lines, "", f"median of {len(seeds)} seeds: {statistics.median(seeds):.1%}"])


def _cells(r: dict[str, Any]) -> list[str]:
    return [
        r["run"],
        str(r["steps"]),
        f"{r['before']:.1%}",
        f"{r['after']:.1%} [{r['low']:.1%}, {r['high']:.1%}]",
        f"{r['mention before']:.1%} -> {r['mention after']:.1%}",
        f"{r['format before']:.1%} -> {r['format after']:.1%}",
        f"{r['minutes']:.1f}",
        _minutes(r["minutes to 95 %"]),
        f"{r['wall']:.1f}",
        f"{r['peak GB']:.1f}",
    ]


def _minutes(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f} min"


def main() -> None:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--no-control", action="store_true", help="leave the random-reward run out")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, for every run")
    arguments = parser.parse_args()
    runs = [(f"seed {seed}", [f"run.seed={seed}"]) for seed in arguments.seeds]
    runs += [] if arguments.no_control else [("random reward", ["run.seed=0", *RANDOM])]
    rows = []
    for name, overrides in runs:
        folder = arguments.out / name.replace(" ", "-")
        seconds = train(folder, [*overrides, *arguments.overrides])
        rows.append(row(name, folder, seconds))
        print(json.dumps(rows[-1]), file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
