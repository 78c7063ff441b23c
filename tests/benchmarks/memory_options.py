"""What each option of `learner.memory`, and 8-bit optimizer states, saves and costs.

    python -m tests.benchmarks.memory_options [--repeats 3]

A Llama of 88 million random weights learns three steps on one CPU thread, in a process of its own for each
line; of several runs the least seconds (other work on the machine only adds) and the median bytes. Peaks are
the kernel's (VmHWM). "Held" is what is resident while engines would generate.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from rlhf.memory_plan import STATE_BYTES
from tests.trainer.memory.measured import SHAPE, TOKENS, measured
from trainer.config import OptimizerName
from trainer.memory.config import ActivationCheckpointing
from trainer.memory.estimate import Estimate, learner_memory, rank_memory

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "nothing": (1, {}),
    "`activation_checkpointing=selective`": (1, {"checkpointing": "selective"}),
    "`activation_checkpointing=full`": (1, {"checkpointing": "full"}),
    "`optimizer.name=adamw_8bit`": (1, {"optimizer": "adamw_8bit"}),
    "`offload_state=disk`": (1, {"offload_state": "disk", "folder": "."}),
    "full, 8 bits, disk": (
        1,
        {"checkpointing": "full", "optimizer": "adamw_8bit", "offload_state": "disk", "folder": "."},
    ),
    "two ranks, each": (2, {}),
    "two ranks, full and disk, each": (2, {"checkpointing": "full", "offload_state": "disk", "folder": "."}),
}


def estimate(settings: dict[str, Any], ranks: int) -> Estimate:
    """What `rlhf explain` would say of each rank."""
    options: dict[str, Any] = {
        "tokens": TOKENS,
        "compute_bytes": 4 if settings.get("dtype") == "float32" else 2,
        "state_bytes": STATE_BYTES[OptimizerName(settings.get("optimizer", "adamw"))],
        "checkpointing": ActivationCheckpointing(settings.get("checkpointing", "none")),
    }
    if ranks > 1:
        return rank_memory(SHAPE, shards=ranks, **options)
    return learner_memory(SHAPE, master=options["compute_bytes"] == 2, **options)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print("| option | peak, GB | estimate, GB | held, GB | seconds a step |\n|---|---|---|---|---|")
    for name, (ranks, settings) in CASES.items():
        runs = [measured(settings, ranks) for _ in range(arguments.repeats)]
        peak = statistics.median(run[0].peak for run in runs) / 1e9
        held = statistics.median(run[0].held for run in runs) / 1e9
        seconds = min(run[0].seconds for run in runs)
        expected = estimate(settings, ranks).total / 1e9
        print(f"| {name} | {peak:.2f} | {expected:.2f} | {held:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
