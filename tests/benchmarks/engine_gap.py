"""How far engine and learner are apart under the same weights, in bfloat16, LayerCast and float32.

    python -m tests.benchmarks.engine_gap FOLDER_OF_MODEL

For each number format an engine process and a learner, one thread each. The publisher's own probe, eight
random sequences of 48 tokens, is scored by both after the first publish and after each of two updates.
Prints one table, for `docs/evaluation.md`.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import torch

from rollout.child_engine import ChildEngine
from rollout.engine_spec import EngineSpec, text_config
from rollout.weights.config import WeightsConfig
from rollout.weights.probe import probe_sequences
from rollout.weights.publisher import Publisher, PublishReport
from tests.benchmarks.measuring import markdown
from tests.trainer.samples import Reinforce, make_row
from trainer.config import Device, LearnerConfig, OptimizerConfig, Precision
from trainer.learner import Learner
from trainer.model import load_model

FORMATS = {
    "bfloat16": ("bfloat16", "standard"),
    "LayerCast": ("bfloat16", "layercast"),
    "float32": ("float32", "standard"),
}
"""Number format -> dtype and numerics."""


def gaps(model: Path, dtype: str, numerics: str, updates: int = 2) -> list[PublishReport]:
    """What each publish found: at once, and after every update."""
    probe = probe_sequences([], text_config(str(model))["vocab_size"], count=8, length=48)
    spec = EngineSpec(
        model=str(model), dtype=dtype, numerics=numerics, max_model_len=128, max_num_seqs=8, threads=1,
        eager=True, transport="shm",
    )  # fmt: skip
    cast = numerics == "layercast"
    settings = LearnerConfig(
        dtype=Precision(dtype), device=Device.cpu, optimizer=OptimizerConfig(lr=1e-5)
    )  # fmt: skip
    with closing(ChildEngine(spec)) as engine:
        learner = Learner(
            settings, load_model(model), loss=Reinforce(), temperature=1.0, total_steps=10, seed=0,
            layercast=cast,
        )  # fmt: skip
        engine.wait()
        computed = "float32" if cast else dtype
        publisher = Publisher(
            [engine], WeightsConfig(), probe, frozen=(), learner_dtype=computed, engine_dtype=computed
        )
        with closing(publisher):
            found = [publisher.publish(learner.weights(), learner.score)]
            for _ in range(updates):
                learner.update([[make_row(s[:16], s[16:32], n) for n, s in enumerate(probe[:4])]])
                found.append(publisher.publish(learner.weights(), learner.score))
    return found


def main() -> None:
    """Measure all formats and print the table."""
    torch.set_num_threads(1)
    rows = []
    for name, (dtype, numerics) in FORMATS.items():
        first, *later = gaps(Path(sys.argv[1]), dtype, numerics)
        rows.append([
            name, f"{first.gap_mean:.1e} ({first.gap_max:.1e})", *(f"{one.gap_mean:.1e}" for one in later),
            f"{first.size / 1e6:.0f}", f"{first.seconds['probe']:.1f}",
        ])  # fmt: skip
    columns = ["format", "gap at once, nats (largest)", "after an update", "after two", "MB", "probe, s"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
