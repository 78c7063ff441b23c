"""Correction weights: closed forms of every level and mode, and what they do to the loss."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algorithms.config import (
    AlgorithmConfig,
    ClipConfig,
    CorrectionConfig,
    CorrectionLevel,
    CorrectionMode,
)
from rlhf.algorithms.correction import correction_weights
from rlhf.algorithms.losses import build_loss
from tests.algorithms.toy import grpo, micro_batch

LOG_RATIO = torch.tensor([1.0, -0.4, 0.3, -2.0, -1.0], dtype=torch.float64)
ROWS = torch.tensor([0, 0, 0, 1, 1])


def weights(level: str, mode: str, low: float, high: float) -> tuple[list[float], list[bool]]:
    config = CorrectionConfig(CorrectionLevel(level), CorrectionMode(mode), low, high)
    got, bounded = correction_weights(config, LOG_RATIO, ROWS, 2)
    return got.tolist(), bounded.tolist()


RAW = {
    "token": [math.exp(x) for x in (1.0, -0.4, 0.3, -2.0, -1.0)],
    "sequence": [math.exp(0.9)] * 3 + [math.exp(-3.0)] * 2,
    "geometric": [math.exp(0.3)] * 3 + [math.exp(-1.5)] * 2,
}


@pytest.mark.parametrize("level", list(RAW))
def test_levels_without_bounds_are_importance_sampling(level: str) -> None:
    """Truncation, clipping and masking alike, once the bounds are 0 and infinity."""
    for mode in CorrectionMode:
        got, bounded = weights(level, mode, 0.0, math.inf)
        assert got == pytest.approx(RAW[level])
        assert not any(bounded)


@pytest.mark.parametrize("level", list(RAW))
@pytest.mark.parametrize(
    ("mode", "rule"),
    [
        ("truncate", lambda w: min(w, 1.2)),
        ("clip", lambda w: min(max(w, 0.3), 1.2)),
        ("mask", lambda w: w if 0.3 <= w <= 1.2 else 0.0),
    ],
)
def test_modes(level: str, mode: str, rule: object) -> None:
    got, bounded = weights(level, mode, 0.3 if mode != "truncate" else 0.0, 1.2)
    expected = [rule(w) for w in RAW[level]]  # type: ignore[operator]
    assert got == pytest.approx(expected)
    assert bounded == [value != raw for value, raw in zip(expected, RAW[level])]


def test_off_is_one_everywhere() -> None:
    assert weights("off", "mask", 0.9, 1.1) == ([1.0] * 5, [False] * 5)


def test_exponents_are_clamped() -> None:
    """A product over a long response overflows; the exponent stops at 20."""
    config = CorrectionConfig(CorrectionLevel.sequence, CorrectionMode.clip, 0.0, math.inf)
    gap = torch.tensor([400.0, 400.0, -300.0, -600.0])
    got, _ = correction_weights(config, gap, torch.tensor([0, 0, 1, 1]), 2)
    assert got.tolist() == pytest.approx([math.exp(20)] * 2 + [math.exp(-20)] * 2, rel=1e-6)


def loss_and_gradient(config: AlgorithmConfig, rollout: torch.Tensor) -> tuple[float, torch.Tensor]:
    logprobs = torch.tensor([-1.0, -0.2, -2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.1, -0.9, -1.9], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64)
    out = build_loss(config)(micro_batch(logprobs, old=old, rollout=rollout, advantages=advantages))
    out.loss.backward()
    assert logprobs.grad is not None
    return float(out.loss.detach()), logprobs.grad


def test_agreement_leaves_loss_and_gradient_unchanged() -> None:
    rollout = torch.tensor([-1.1, -0.9, -1.9], dtype=torch.float64)
    plain, corrected = loss_and_gradient(grpo(), rollout), loss_and_gradient(AlgorithmConfig(), rollout)
    assert plain[0] == corrected[0]
    assert torch.equal(plain[1], corrected[1])


def test_truncated_weights_multiply_the_clipped_loss_and_carry_no_gradient() -> None:
    """TIS: `min(rho, C)` times the gradient of the clipped term, token by token; ratios e^.1, e^.7, e^-.1."""
    rollout = torch.tensor([-1.6, -1.0, -3.9], dtype=torch.float64)
    rho = [math.exp(0.5), math.exp(0.1), 2.0]
    _, gradient = loss_and_gradient(AlgorithmConfig(clip=ClipConfig(0.2, 0.2)), rollout)
    plain = [-math.exp(0.1), 0.0, 0.5 * math.exp(-0.1)]
    assert gradient.tolist() == pytest.approx([w * g / 3 for w, g in zip(rho, plain)])


def test_masking_zeroes_a_token_and_keeps_its_place_in_the_denominator() -> None:
    rollout = torch.tensor([-1.1, -0.9, -3.9], dtype=torch.float64)
    config = grpo(correction=CorrectionConfig(CorrectionLevel.token, CorrectionMode.mask, 0.5, 5.0))
    _, gradient = loss_and_gradient(config, rollout)
    assert gradient.tolist() == pytest.approx([-math.exp(0.1) / 3, 0.0, 0.0])
