"""Length penalty and masks."""

from __future__ import annotations

from itertools import pairwise

import pytest

from rlhf.algorithms.config import OverlongConfig
from rlhf.algorithms.overlong import learn_mask, penalty, shape_rewards
from rollout.types import FinishReason
from tests.algorithms.toy import group


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 0.0), (16384, 0.0), (16385, -0.000244140625), (18432, -0.5), (20480, -1.0), (20481, -1.0)],
)
def test_values_of_the_sheet(length: int, expected: float) -> None:
    assert penalty(length, limit=20480, buffer=4096) == expected


def test_falls_with_slope_one_over_buffer() -> None:
    values = [penalty(length, limit=100, buffer=20) for length in range(121)]
    assert all(b <= a for a, b in pairwise(values))
    assert [values[n] - values[n + 1] for n in range(80, 100)] == pytest.approx([1 / 20] * 20)
    assert values[:81] == [0.0] * 81
    assert values[100:] == [-1.0] * 21


def test_factor_scales_and_zero_buffer_is_off() -> None:
    assert penalty(90, limit=100, buffer=20, factor=3.0) == pytest.approx(-1.5)
    assert penalty(1000, limit=100, buffer=0) == 0.0


def test_rewards_are_shaped_once_and_accuracy_never() -> None:
    shaped = group("a", [1, 0, 1], lengths=[5, 9, 10])
    shape_rewards([shaped], OverlongConfig(buffer=4), limit=10)
    assert [t.reward for t in shaped.trajectories] == [1.0, -0.75, 0.0]
    assert [t.rewards["overlong"] for t in shaped.trajectories] == [0.0, -0.75, -1.0]
    assert [t.accuracy for t in shaped.trajectories] == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="already carries the overlong penalty"):
        shape_rewards([shaped], OverlongConfig(buffer=4), limit=10)


def test_off_adds_no_part_and_a_buffer_beyond_the_limit_is_refused() -> None:
    plain = group("a", [1, 0])
    shape_rewards([plain], OverlongConfig(), limit=10)
    assert "overlong" not in plain.trajectories[0].rewards
    with pytest.raises(ValueError, match=r"buffer=40 is longer than the response limit of 10 tokens"):
        shape_rewards([plain], OverlongConfig(buffer=40), limit=10)


def test_masks_go_by_the_finish_reason_not_the_length() -> None:
    finished, cut, aborted = group("a", [1, 0, 0], lengths=[4, 4, 4]).trajectories
    cut.finish_reason, aborted.finish_reason = FinishReason.LENGTH, FinishReason.ABORT
    assert [learn_mask(t, mask_truncated=True) for t in (finished, cut)] == [[True] * 4, [False] * 4]
    assert learn_mask(cut, mask_truncated=False) == [True] * 4
    assert learn_mask(aborted, mask_truncated=False) == [False] * 4
