"""`rlhf explain`'s memory estimate against measured peaks, on the demo and three other configurations.

    python -m tests.benchmarks.memory_estimate [--out runs/memory]

Each configuration trains in a process of its own, for 40 steps, because what malloc keeps grows at first; the
peak is the proportional set size (PSS) of the whole process tree. The constants in
`trainer/memory/estimate.py` were fitted on the demo only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rlhf.compose import load
from rlhf.memory_plan import plan_memory
from rlhf.tracking.jsonl import read

CASES = {
    "demo": ["dapo/arithmetic"],
    "demo in float32": ["dapo/arithmetic", "learner.dtype=float32", "rollout.dtype=float32"],
    "demo, LoRA": ["dapo/arithmetic_lora"],
    "64 new tokens, checkpointing": [
        "dapo/arithmetic",
        "rollout.max_new_tokens=64",
        "algorithm.overlong.buffer=0",
        "learner.memory.activation_checkpointing=full",
        "loop.prompts=8",
    ],
}
SHORT = ["loop.steps=40"]


def peak(folder: Path, recipe: list[str]) -> float:
    """Bytes at the highest point of a run of 40 steps."""
    command = [sys.executable, "-m", "rlhf.cli", "train", *recipe, *SHORT, f"run.dir={folder}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return max(row["memory/peak_pss"] for row in read(folder / "metrics.jsonl"))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    arguments = parser.parse_args()
    print("| configuration | estimate GB | measured peak GB | error |\n|---|---|---|---|")
    for index, (name, recipe) in enumerate(CASES.items()):
        estimate = plan_memory(load(recipe[0], [*recipe[1:], *SHORT])).total
        measured = peak(arguments.out / str(index), recipe)
        error = estimate / measured - 1
        print(f"| {name} | {estimate / 1e9:.2f} | {measured / 1e9:.2f} | {error:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
