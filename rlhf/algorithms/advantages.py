"""Advantages: pure functions `(rewards [B], groups [B], eps) -> [B]`, found by name.

A group of one has nothing to be compared with, so its reward passes through; a group whose rewards are
all equal gets exactly zero (no rounding residue divided by eps). Sums run in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf.algorithms.config import AdvantageConfig

AdvantageFunction = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

ESTIMATORS: dict[str, AdvantageFunction] = {}
"""Every registered estimator by name."""


def register(name: str) -> Callable[[AdvantageFunction], AdvantageFunction]:
    """Make an estimator known as `name`. Raises ValueError when the name is taken."""

    def add(function: AdvantageFunction) -> AdvantageFunction:
        if name in ESTIMATORS:
            raise ValueError(f"an advantage estimator named {name!r} is already registered: rename yours.")
        ESTIMATORS[name] = function
        return function

    return add


def compute_advantages(config: AdvantageConfig, rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Advantages of one rollout step, one a response.

    rewards: `[B]` shaped rewards. groups: `[B]` integers, equal for responses to one draw of a prompt.
    Returns `[B]` float32. Raises ValueError when shapes differ or a reward is not finite.
    """
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {list(rewards.shape)} and groups {list(groups.shape)} must both be [B].")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("a reward is NaN or infinite: the reward function must return finite numbers.")
    return ESTIMATORS[config.estimator](rewards.double(), groups, config.eps).float()


@register("group_mean_std")
def group_mean_std(rewards: torch.Tensor, groups: torch.Tensor, eps: float) -> torch.Tensor:
    """GRPO: `(R - mean) / (std + eps)`, sample standard deviation of the group (ddof = 1)."""
    index, sizes = _index(groups)
    centered = _centered(rewards, index, sizes)
    variance = _sum(centered.square(), index, sizes) / (sizes - 1).clamp(min=1)
    scaled = centered / (variance.sqrt() + eps)[index]
    return torch.where(sizes[index] == 1, rewards, scaled)


@register("group_mean")
def group_mean(rewards: torch.Tensor, groups: torch.Tensor, eps: float) -> torch.Tensor:
    """Dr. GRPO: `R - mean`. Not dividing keeps very easy and very hard prompts from being amplified."""
    index, sizes = _index(groups)
    return torch.where(sizes[index] == 1, rewards, _centered(rewards, index, sizes))


@register("rloo")
def rloo(rewards: torch.Tensor, groups: torch.Tensor, eps: float) -> torch.Tensor:
    """RLOO: `R_i - mean of R_j, j != i`, which is `n / (n - 1) * (R_i - mean)`: an unbiased baseline."""
    index, sizes = _index(groups)
    factor = sizes / (sizes - 1).clamp(min=1)
    return torch.where(sizes[index] == 1, rewards, _centered(rewards, index, sizes) * factor[index])


@register("reinforce_plus_plus")
def reinforce_plus_plus(rewards: torch.Tensor, groups: torch.Tensor, eps: float) -> torch.Tensor:
    """REINFORCE++: `(R - mean) / (std + eps)` over the whole step's responses, groups ignored.

    The paper normalizes token advantages, which carry a KL reward-to-go; here the reward is one number a
    response (a KL in the reward is its sum), and each response counts once whatever its length.
    """
    return group_mean_std(rewards, torch.zeros_like(groups), eps)


@register("reinforce_plus_plus_baseline")
def reinforce_plus_plus_baseline(rewards: torch.Tensor, groups: torch.Tensor, eps: float) -> torch.Tensor:
    """REINFORCE++ with baseline: take off the group's mean, then normalize what is left over the step.

    Unlike GRPO every group is divided by the same number, so zero-variance groups stay at zero unless
    groups of one shift the mean.
    """
    return reinforce_plus_plus(group_mean(rewards, groups, eps), groups, eps)


def _index(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense group number of each response `[B]`, and the groups' sizes `[P]`."""
    _, index, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    return index, sizes


def _sum(values: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Sum of each group, `[P]`."""
    return values.new_zeros(len(sizes)).index_add_(0, index, values)


def _centered(rewards: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Rewards minus their group's mean, exactly zero in constant groups, `[B]`."""
    centered = rewards - (_sum(rewards, index, sizes) / sizes)[index]
    highest = rewards.new_zeros(len(sizes)).scatter_reduce_(0, index, rewards, "amax", include_self=False)
    lowest = rewards.new_zeros(len(sizes)).scatter_reduce_(0, index, rewards, "amin", include_self=False)
    return torch.where((highest == lowest)[index], torch.zeros_like(centered), centered)
