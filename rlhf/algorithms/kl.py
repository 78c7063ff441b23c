"""Distance to the reference policy, estimated from the sampled token (Schulman, "Approximating KL").

With `d = log pi - log pi_ref` of a token drawn from `pi`, all three estimate `KL(pi || pi_ref)`:
`k1 = d` (unbiased, can be negative), `k2 = d^2 / 2` (biased, small spread),
`k3 = exp(-d) + d - 1` (unbiased, never negative).

As a *loss* they differ by their gradients. On policy, k1's is `grad log pi`, whose mean is zero: it does
nothing but add noise. k2's is `d * grad log pi`, the true gradient of the reverse KL. k3's is
`(1 - exp(-d)) * grad log pi`, whose mean is that of the forward `KL(pi_ref || pi)`; near the reference
the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.algorithms.config import KlConfig, KlEstimator

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus or minus this before they are exponentiated."""


def estimate(logprobs: torch.Tensor, reference: torch.Tensor, estimator: KlEstimator) -> torch.Tensor:
    """Per-token estimate of `KL(pi || reference)`, any shape, with gradient to `logprobs`."""
    difference = (logprobs - reference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    match estimator:
        case KlEstimator.k1:
            return difference
        case KlEstimator.k2:
            return difference.square() / 2
        case KlEstimator.k3:
            return torch.expm1(-difference) + difference


def response_penalty(config: KlConfig, old: Sequence[float], reference: Sequence[float]) -> float:
    """What `kl.place=reward` adds to a response's reward: `-coefficient * sum of the token estimates`.

    old, reference: log-probs of the response's tokens under the old policy and the reference.
    """
    tokens = estimate(
        torch.tensor(old, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64), config.estimator
    )
    return -config.coefficient * float(tokens.sum())
