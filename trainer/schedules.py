"""The learning rate as a function of the rollout step."""

from __future__ import annotations

import math

from trainer.config import ScheduleConfig, ScheduleName


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """What `lr` is multiplied by in rollout step `step` (from 0) of `total_steps`.

    Warm-up rises linearly: `(step + 1) / warmup_steps`. After it `linear` and `cosine` go from 1 to
    `final_ratio`, which the step after the last would reach; `constant` stays at 1.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.name is ScheduleName.constant:
        return 1.0
    left = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / left)
    shape = 1 - progress if config.name is ScheduleName.linear else (1 + math.cos(math.pi * progress)) / 2
    return config.final_ratio + (1 - config.final_ratio) * shape
