"""The algorithm's configuration: defaults, every refusal, OmegaConf, no torch."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
from omegaconf import OmegaConf

from rlhf.algorithms.config import (
    AdvantageConfig,
    Aggregation,
    AlgorithmConfig,
    ClipConfig,
    CorrectionConfig,
    CorrectionLevel,
    CorrectionMode,
    DynamicSamplingConfig,
    KlConfig,
    Objective,
    OldLogprobs,
    OverlongConfig,
    Surplus,
)

OFF = CorrectionConfig(level=CorrectionLevel.off)
CARRY = DynamicSamplingConfig(enabled=True, surplus=Surplus.carry)


def test_defaults_are_grpo_with_truncated_token_correction() -> None:
    config = AlgorithmConfig()
    assert config.check() == []
    assert (config.clip.low, config.clip.high, config.clip.dual) == (0.2, 0.2, 0.0)
    assert config.aggregation is Aggregation.seq_mean_token_mean
    assert (config.kl.coefficient, config.entropy_coefficient, config.overlong.buffer) == (0.0, 0.0, 0)
    assert not config.dynamic_sampling.enabled
    assert (config.correction.level, config.correction.mode, config.correction.high) == (
        "token",
        "truncate",
        2.0,
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            AlgorithmConfig(clip=ClipConfig(low=0.2, high=0.1)),
            "algorithm.clip.high=0.1 is below algorithm.clip.low=0.2: raise clip.high or lower clip.low.",
        ),
        (
            AlgorithmConfig(clip=ClipConfig(low=-0.1, high=0.2)),
            "algorithm.clip.low=-0.1 and clip.high=0.2 are distances from a ratio of 1: neither may be "
            "negative.",
        ),
        (
            AlgorithmConfig(clip=ClipConfig(low=1.5, high=2.0)),
            "algorithm.clip.low=1.5 puts the ratio's lower bound below zero: use a value in [0, 1].",
        ),
        (
            AlgorithmConfig(clip=ClipConfig(dual=1.1)),
            "algorithm.clip.dual=1.1 must be above 1 + clip.high = 1.2: raise it, or set 0 to turn it off.",
        ),
        (
            AlgorithmConfig(clip=ClipConfig(dual=10.0), objective=Objective.cispo),
            "algorithm.clip.dual=10 has no effect with objective=cispo: set clip.dual=0.",
        ),
        (
            AlgorithmConfig(advantage=AdvantageConfig(eps=-1e-6)),
            "algorithm.advantage.eps=-1e-06 is negative: use a small number such as 1e-6.",
        ),
        (
            AlgorithmConfig(kl=KlConfig(coefficient=-0.1)),
            "algorithm.kl.coefficient=-0.1 would push the policy away from the reference: use 0 (off) or a "
            "positive number.",
        ),
        (
            AlgorithmConfig(overlong=OverlongConfig(buffer=-4)),
            "algorithm.overlong.buffer=-4 is negative: use 0 (off) or a token count.",
        ),
        (
            AlgorithmConfig(overlong=OverlongConfig(buffer=4, penalty_factor=0.0)),
            "algorithm.overlong.penalty_factor=0 would not punish length: use a positive number, or "
            "overlong.buffer=0 to turn the penalty off.",
        ),
        (
            AlgorithmConfig(old_logprobs=OldLogprobs.rollout),
            "algorithm.old_logprobs=rollout already divides by the engine's log-probs, so "
            "algorithm.correction.level=token would count the mismatch twice: set correction.level=off, or "
            "old_logprobs=recompute.",
        ),
        (
            AlgorithmConfig(correction=CorrectionConfig(high=0.5)),
            "algorithm.correction.high=0.5 is below 1, where learner and engine agree: use 1 or more.",
        ),
        (
            AlgorithmConfig(correction=CorrectionConfig(mode=CorrectionMode.mask, low=1.5)),
            "algorithm.correction.low=1.5 must lie in [0, 1]: a weight of 1 is agreement and has to stay "
            "inside the bounds.",
        ),
        (
            AlgorithmConfig(correction=CorrectionConfig(low=0.5)),
            "algorithm.correction.low=0.5 has no effect with correction.mode=truncate: use mode=clip, or "
            "low=0.",
        ),
        (
            AlgorithmConfig(dynamic_sampling=DynamicSamplingConfig(max_rounds=0)),
            "algorithm.dynamic_sampling.max_rounds=0 generates nothing: use 1 or more.",
        ),
        (
            AlgorithmConfig(dynamic_sampling=DynamicSamplingConfig(oversample=0.5)),
            "algorithm.dynamic_sampling.oversample=0.5 cannot fill a batch: use a finite number of "
            "at least 1.",
        ),
        (
            AlgorithmConfig(dynamic_sampling=DynamicSamplingConfig(max_age=0)),
            "algorithm.dynamic_sampling.max_age=0 would make every carried group stale: use 1 or more, or "
            "surplus=drop.",
        ),
        (
            AlgorithmConfig(dynamic_sampling=CARRY, old_logprobs=OldLogprobs.current),
            "algorithm.old_logprobs=current is for fresh groups only, and "
            "algorithm.dynamic_sampling.surplus=carry trains on older ones: set old_logprobs=recompute, or "
            "surplus=drop.",
        ),
        (
            AlgorithmConfig(dynamic_sampling=CARRY, correction=OFF),
            "algorithm.dynamic_sampling.surplus=carry trains on groups of older weights, and with "
            "algorithm.correction.level=off nothing accounts for it: set correction.level=token, or "
            "surplus=drop.",
        ),
    ],
)
def test_refusals(config: AlgorithmConfig, sentence: str) -> None:
    assert config.check() == [sentence]


@pytest.mark.parametrize(
    "config",
    [
        AlgorithmConfig(clip=ClipConfig(low=0.2, high=0.28, dual=10.0), correction=OFF),
        AlgorithmConfig(clip=ClipConfig(low=10.0, high=0.2), objective=Objective.cispo),
        AlgorithmConfig(old_logprobs=OldLogprobs.rollout, correction=OFF),
        AlgorithmConfig(old_logprobs=OldLogprobs.rollout, correction=OFF, dynamic_sampling=CARRY),
        AlgorithmConfig(dynamic_sampling=CARRY),
        AlgorithmConfig(
            correction=CorrectionConfig(CorrectionLevel.geometric, CorrectionMode.mask, 0.999, 1.001)
        ),
        AlgorithmConfig(correction=CorrectionConfig(high=math.inf)),
    ],
)
def test_published_settings_pass(config: AlgorithmConfig) -> None:
    assert config.check() == []


def test_omegaconf_round_trip() -> None:
    text = "{clip: {high: 0.28, dual: 10}, aggregation: token_mean, correction: {level: 'off'}}"
    merged = OmegaConf.merge(OmegaConf.structured(AlgorithmConfig), OmegaConf.create(text))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, AlgorithmConfig)
    assert config.clip == ClipConfig(0.2, 0.28, 10.0)
    assert config.correction.level is CorrectionLevel.off
    assert config.aggregation is Aggregation.token_mean
    assert config.check() == []


def leaves(config: object) -> int:
    values = [getattr(config, item.name) for item in fields(config)]  # type: ignore[arg-type]
    return sum(leaves(value) if is_dataclass(value) else 1 for value in values)


def test_keys_stay_few() -> None:
    assert leaves(AlgorithmConfig()) == 26


def test_importing_the_configuration_does_not_import_torch() -> None:
    code = "import sys, rlhf.algorithms.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
