from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from rlhf.tracking.config import TrackingConfig


def test_defaults_are_fine_and_compose() -> None:
    assert TrackingConfig().check() == []
    merged = OmegaConf.merge(
        OmegaConf.structured(TrackingConfig), {"names": ["wandb"], "completions_every": 5}
    )
    config = OmegaConf.to_object(merged)
    assert config == TrackingConfig(names=["wandb"], completions_every=5)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            TrackingConfig(completions_every=-1),
            "tracking.completions_every=-1 is negative: set a number of steps, or 0 to show none.",
        ),
        (
            TrackingConfig(completions_shown=0),
            "tracking.completions_shown=0 must be at least 1: raise it, or set tracking.completions_every=0 "
            "to show none.",
        ),
        (
            TrackingConfig(project=" "),
            "tracking.project is empty: give the project a name, for example whetstone.",
        ),
        (
            TrackingConfig(names=["wandb", "wandb"]),
            "tracking.names=['wandb', 'wandb'] names wandb twice: name each tracker once.",
        ),
    ],
)
def test_bad_values_say_what_to_do(config: TrackingConfig, sentence: str) -> None:
    assert config.check() == [sentence]


def test_light_modules_load_no_heavy_package() -> None:
    modules = (
        "rlhf.tracking.config, rlhf.tracking.base, rlhf.tracking.console, rlhf.tracking.jsonl, rlhf.metrics, "
        "rlhf.clock, rlhf.evaluation.config, rlhf.evaluation.runner, rlhf.environment, rlhf.memory, "
        "rlhf.figures, rlhf.report"
    )
    heavy = {
        "torch",
        "vllm",
        "transformers",
        "matplotlib",
        "tensorboard",
        "wandb",
        "mlflow",
        "trackio",
        "numpy",
    }
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
