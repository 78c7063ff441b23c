"""Correction of the mismatch between the engine that sampled and the learner that learns.

`rho = pi_old(learner) / pi_rollout(engine)` is an importance weight on the policy term, without gradient.
Level says over what it is taken, mode what happens out of bounds; the two are free of each other:
token x truncate is TIS, token x mask is IcePop/MIS, sequence x mask is sequence-MIS, geometric x mask is
Geo-RS, which unlike the plain product does not reject long responses first.

A masked token keeps its place in the denominator: zero is the value of its weight, not the absence of
a sample, so the estimate stays that of one importance-weighted mean.
"""

from __future__ import annotations

import torch

from rlhf.algorithms.aggregation import row_mean, row_sum
from rlhf.algorithms.config import CorrectionConfig, CorrectionLevel, CorrectionMode
from rlhf.algorithms.kl import LOG_RATIO_LIMIT


@torch.no_grad()
def correction_weights(
    config: CorrectionConfig,
    log_ratio: torch.Tensor,
    row_ids: torch.Tensor,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights to multiply token losses by, and which of them the bounds changed.

    log_ratio: `[M]` log-probs of the old policy (learner) minus those of the rollout (engine).
    row_ids: `[M]`, which response a token belongs to, below `rows`. Whole responses only.
    Returns `[M]` float weights and `[M]` bool; all ones and all False when the level is off.
    """
    if config.level is CorrectionLevel.off:
        return torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool)
    raw = _level(config.level, log_ratio, row_ids, rows).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    weights = _bounded(config, raw)
    return weights, weights != raw


def _level(level: CorrectionLevel, log_ratio: torch.Tensor, row_ids: torch.Tensor, rows: int) -> torch.Tensor:
    """The log weight of each token, `[M]`."""
    match level:
        case CorrectionLevel.sequence:
            return row_sum(log_ratio, row_ids, rows)[row_ids]
        case CorrectionLevel.geometric:
            return row_mean(log_ratio, row_ids, rows)[row_ids]
        case _:
            return log_ratio


def _bounded(config: CorrectionConfig, weights: torch.Tensor) -> torch.Tensor:
    match config.mode:
        case CorrectionMode.truncate:
            return weights.clamp(max=config.high)
        case CorrectionMode.clip:
            return weights.clamp(config.low, config.high)
        case CorrectionMode.mask:
            inside = (weights >= config.low) & (weights <= config.high)
            return torch.where(inside, weights, torch.zeros_like(weights))
