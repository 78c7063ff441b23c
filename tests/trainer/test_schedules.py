"""The rate by rollout step, by hand."""

from __future__ import annotations

import math

import pytest

from trainer.config import ScheduleConfig, ScheduleName
from trainer.schedules import lr_factor


def test_warmup_rises_from_its_first_share() -> None:
    config = ScheduleConfig(warmup_steps=4)
    assert [lr_factor(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_reaches_the_final_ratio_after_the_last_step() -> None:
    config = ScheduleConfig(name=ScheduleName.linear, warmup_steps=2, final_ratio=0.2)
    values = [lr_factor(config, step, 6) for step in range(8)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_is_half_way_in_the_middle() -> None:
    config = ScheduleConfig(name=ScheduleName.cosine, final_ratio=0.1)
    assert lr_factor(config, 0, 8) == pytest.approx(1.0)
    assert lr_factor(config, 4, 8) == pytest.approx(0.55)
    assert lr_factor(config, 2, 8) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(config, 8, 8) == pytest.approx(0.1)
