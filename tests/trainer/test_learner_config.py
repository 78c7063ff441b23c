"""Range checks of the learner's settings, and that they need no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.config import LearnerConfig, LoraConfig, OptimizerConfig, ProfileConfig, ScheduleConfig


def test_defaults_are_valid() -> None:
    assert LearnerConfig().check() == []


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            LearnerConfig(optimizer=OptimizerConfig(lr=-1e-6)),
            "learner.optimizer.lr=-1e-06 must be at least 0: raise it.",
        ),
        (LearnerConfig(token_budget=0), "learner.token_budget=0 must be at least 1: raise it."),
        (
            LearnerConfig(schedule=ScheduleConfig(final_ratio=1.5)),
            "learner.schedule.final_ratio=1.5 must be at most 1: lower it.",
        ),
        (
            LearnerConfig(optimizer=OptimizerConfig(betas=[0.9])),
            "learner.optimizer.betas=[0.9] must be two numbers from 0 to below 1: give [0.9, 0.999].",
        ),
        (
            LearnerConfig(lora=LoraConfig(rank=8, targets=[])),
            "learner.lora.targets is empty: name linear layers, or give [all-linear].",
        ),
        (
            LearnerConfig(lora=LoraConfig(rank=8), freeze=["*norm*"]),
            "learner.freeze=['*norm*'] has no effect with learner.lora.rank=8, which freezes the whole "
            "model: leave learner.freeze empty.",
        ),
        (
            LearnerConfig(profile=ProfileConfig(steps=[-1])),
            "learner.profile.steps=[-1] counts from 0: leave out negative steps.",
        ),
    ],
)
def test_one_sentence_each(config: LearnerConfig, sentence: str) -> None:
    assert config.check() == [sentence]


def test_importing_the_settings_imports_no_torch() -> None:
    code = "import sys, trainer.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
