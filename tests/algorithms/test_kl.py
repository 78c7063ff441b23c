"""KL estimators against exact divergences."""

from __future__ import annotations

import pytest
import torch

from rlhf.algorithms.config import KlConfig, KlEstimator, KlPlace
from rlhf.algorithms.kl import estimate, response_penalty

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.1065306597)], ids=["k1", "k2", "k3"]
)
def test_values(estimator: str, expected: float) -> None:
    """`d = 0.5`: d, d^2 / 2 and exp(-d) + d - 1."""
    assert float(estimate(torch.tensor(-1.0), torch.tensor(-1.5), KlEstimator(estimator))) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    exact = float((POLICY * (POLICY / REFERENCE).log()).sum())
    values = estimate(POLICY.log(), REFERENCE.log(), KlEstimator(estimator))
    assert float((POLICY * values).sum()) == pytest.approx(exact)


def test_mean_gradients_on_policy() -> None:
    """k1: zero. k2: that of KL(pi || ref). k3: that of KL(ref || pi). Exact sums over the vocabulary."""
    logits = POLICY.log().clone().requires_grad_()

    def mean_gradient(estimator: str) -> torch.Tensor:
        logprobs = torch.log_softmax(logits, 0)
        values = estimate(logprobs, REFERENCE.log(), KlEstimator(estimator))
        return torch.autograd.grad((POLICY * values).sum(), logits)[0]

    logprobs = torch.log_softmax(logits, 0)
    reverse = torch.autograd.grad((logprobs.exp() * (logprobs - REFERENCE.log())).sum(), logits)[0]
    logprobs = torch.log_softmax(logits, 0)
    forward = torch.autograd.grad((REFERENCE * (REFERENCE.log() - logprobs)).sum(), logits)[0]
    assert mean_gradient("k1").abs().max() < 1e-12
    assert torch.allclose(mean_gradient("k2"), reverse, atol=1e-12)
    assert torch.allclose(mean_gradient("k3"), forward, atol=1e-12)


def test_penalty_in_the_reward() -> None:
    """Two tokens, `d` = 0.5 and -0.2: minus 0.1 times their sum; k3 never pays the policy back."""
    k1 = KlConfig(coefficient=0.1, estimator=KlEstimator.k1, place=KlPlace.reward)
    assert response_penalty(k1, [-1.0, -2.0], [-1.5, -1.8]) == pytest.approx(-0.03)
    k3 = KlConfig(coefficient=0.1, estimator=KlEstimator.k3, place=KlPlace.reward)
    assert response_penalty(k3, [-1.0, -2.0], [-1.5, -1.8]) == pytest.approx(
        -0.1 * (0.1065306597 + 0.0214027582)
    )


def test_far_apart_stays_finite() -> None:
    assert float(estimate(torch.tensor(-500.0), torch.tensor(0.0), KlEstimator.k3)) < 5e8
