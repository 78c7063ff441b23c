"""Advantages: closed forms, invariances, edge cases."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from rlhf.algorithms.advantages import ESTIMATORS, compute_advantages, register
from rlhf.algorithms.config import AdvantageConfig, Estimator


def advantages(estimator: str, rewards: list[float], groups: list[int]) -> list[float]:
    config = AdvantageConfig(estimator=Estimator(estimator))
    return compute_advantages(config, torch.tensor(rewards), torch.tensor(groups)).tolist()


@pytest.mark.parametrize("correct", range(1, 16))
def test_closed_form_of_group_mean_std(correct: int) -> None:
    size, p = 16, correct / 16
    rewards = [1.0] * correct + [-1.0] * (size - correct)
    got = advantages("group_mean_std", rewards, [0] * size)
    up = math.sqrt((1 - p) / p * (size - 1) / size)
    down = -math.sqrt(p / (1 - p) * (size - 1) / size)
    assert got[:correct] == pytest.approx([up] * correct, abs=1e-5)
    assert got[correct:] == pytest.approx([down] * (size - correct), abs=1e-5)


@pytest.mark.parametrize(
    ("correct", "up", "down"),
    [(1, 3.75, -0.25), (4, 1.6771, -0.5590), (8, 0.96825, -0.96825), (15, 0.25, -3.75)],
)
def test_values_of_the_sheet(correct: int, up: float, down: float) -> None:
    got = advantages("group_mean_std", [1.0] * correct + [-1.0] * (16 - correct), [0] * 16)
    assert (got[0], got[-1]) == (pytest.approx(up, abs=1e-4), pytest.approx(down, abs=1e-4))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 5.0), (0.5, 0.5), (7.0, -3.0)])
def test_group_mean_std_does_not_see_scale_and_shift(scale: float, shift: float) -> None:
    rewards = [0.0, 1.0, 1.0, -2.0, 0.5, 0.0, 3.0, 1.0]
    groups = [0, 0, 0, 0, 1, 1, 1, 1]
    moved = [scale * reward + shift for reward in rewards]
    assert advantages("group_mean_std", moved, groups) == pytest.approx(
        advantages("group_mean_std", rewards, groups), abs=2e-5
    )


@pytest.mark.parametrize(
    "estimator", ["group_mean_std", "group_mean", "rloo", "reinforce_plus_plus_baseline"]
)
@pytest.mark.parametrize("reward", [0.1, -1 / 3, 0.7])
def test_constant_groups_are_exactly_zero(estimator: str, reward: float) -> None:
    """Ten times 0.1 has a mean that differs from 0.1; divided by eps the residue would be an advantage."""
    assert advantages(estimator, [reward] * 10, [3] * 10) == [0.0] * 10


@pytest.mark.parametrize("estimator", ["group_mean_std", "group_mean", "rloo"])
def test_a_group_of_one_passes_its_reward_through(estimator: str) -> None:
    got = advantages(estimator, [0.7, 1.0, 0.0], [5, 9, 9])
    assert got[0] == pytest.approx(0.7)
    assert got[1] == pytest.approx(-got[2])


def test_groups_may_be_interleaved_and_of_any_size() -> None:
    rewards, groups = [1.0, 0.0, 4.0, 2.0, 0.0], [8, -2, 8, -2, -2]
    expected = []
    for reward, name in zip(rewards, groups):
        mates = [r for r, g in zip(rewards, groups) if g == name]
        expected.append((reward - statistics.mean(mates)) / (statistics.stdev(mates) + 1e-6))
    assert advantages("group_mean_std", rewards, groups) == pytest.approx(expected, abs=1e-5)


def test_group_mean_is_dr_grpo() -> None:
    assert advantages("group_mean", [1.0, 0.0, 0.0, 0.0], [0] * 4) == [0.75, -0.25, -0.25, -0.25]


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    assert advantages("rloo", [1.0, 0.0], [0, 0]) == [1.0, -1.0]
    rewards = [1.0, 0.0, 2.0, 5.0]
    expected = [reward - (sum(rewards) - reward) / 3 for reward in rewards]
    assert advantages("rloo", rewards, [0] * 4) == pytest.approx(expected)


def test_reinforce_plus_plus_normalizes_over_the_batch() -> None:
    rewards = [1.0, 0.0, 0.0, 3.0]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    expected = [(reward - mean) / (std + 1e-6) for reward in rewards]
    assert advantages("reinforce_plus_plus", rewards, [0, 0, 1, 1]) == pytest.approx(expected, abs=1e-6)


def test_reinforce_plus_plus_baseline_divides_every_group_by_the_same() -> None:
    rewards = [1.0, 0.0, 0.0, 3.0, 1.0, 1.0]
    centered = [0.5, -0.5, -1.5, 1.5, 0.0, 0.0]
    std = statistics.stdev(centered)
    got = advantages("reinforce_plus_plus_baseline", rewards, [0, 0, 1, 1, 2, 2])
    assert got == pytest.approx([value / (std + 1e-6) for value in centered], abs=1e-6)


def test_every_configurable_estimator_is_registered_and_names_are_unique() -> None:
    assert {member.value for member in Estimator} == set(ESTIMATORS)
    with pytest.raises(ValueError, match="'rloo' is already registered"):
        register("rloo")(lambda rewards, groups, eps: rewards)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        advantages("group_mean", [1.0, math.nan], [0, 0])
    with pytest.raises(ValueError, match=r"must both be \[B\]"):
        advantages("group_mean", [1.0, 2.0], [0])
