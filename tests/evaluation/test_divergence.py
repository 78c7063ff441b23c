"""The metrics of LayerCast's section 3 on sequences made by hand."""

from __future__ import annotations

import math

import numpy
import pytest

from rlhf.evaluation.divergence import (
    AGREED,
    divergence,
    divergence_index,
    divergence_percent,
    mean_divergence_index,
    mean_std_length,
    mean_std_top1,
    std_accuracy,
)

SAME = [[5, 6, 7]] * 3
AT_TWO = [[5, 6, 7, 8], [5, 6, 9, 8], [5, 6, 7, 8]]
PREFIX = [[5, 6], [5, 6, 7, 8], [5, 6]]
AT_ONCE = [[1], [2], [1]]


@pytest.mark.parametrize(
    ("responses", "index"),
    [(SAME, AGREED), (AT_TWO, 2), (PREFIX, 2), (AT_ONCE, 0), ([[], []], AGREED), ([[], [1]], 0)],
)
def test_the_first_position_where_any_two_differ(responses: list[list[int]], index: int) -> None:
    assert divergence_index(responses) == index
    assert divergence_index(responses[::-1]) == index


@pytest.mark.parametrize("position", [0, 1, 17, 199])
def test_one_changed_token_is_found_where_it_is(position: int) -> None:
    responses = [list(range(200)) for _ in range(4)]
    responses[2][position] = -5
    assert divergence_index(responses) == position


def test_percent_and_mean_index_count_what_diverges() -> None:
    assert (divergence_percent([SAME, SAME]), mean_divergence_index([SAME, SAME])) == (0, -1)
    examples = [SAME, AT_TWO, PREFIX, AT_ONCE]
    assert divergence_percent(examples) == 75
    assert mean_divergence_index(examples) == pytest.approx(4 / 3)  # 2, 2 and 0; the agreeing one is no 4th


def test_deviations_are_those_of_samples() -> None:
    # sample variance of 0.4, 0.5, 0.6 is (0.01 + 0 + 0.01) / 2
    assert std_accuracy([0.4, 0.5, 0.6]) == pytest.approx(0.1)
    assert std_accuracy([0.3, 0.3]) == 0
    # lengths 2, 4, 2: deviations -2/3, 4/3, -2/3 give variance (4 + 16 + 4) / 9 / 2 = 4/3; SAME has 0
    assert mean_std_length([PREFIX, SAME]) == pytest.approx(math.sqrt(4 / 3) / 2)


def test_top1_is_compared_before_divergence_only() -> None:
    top1 = [
        [[0.9, 0.5, 0.1, 0.1], [0.7, 0.5, 0.9, 0.9], [0.8, 0.5, 0.2, 0.3]],  # stds 0.1 and 0, then diverged
        [[0.5] * 3, [0.5] * 3, [0.5] * 3],
        [[0.3], [0.9], [0.2]],  # no position is before divergence
    ]
    assert mean_std_top1([AT_TWO, SAME, AT_ONCE], top1) == pytest.approx((0.05 + 0) / 2)
    assert math.isnan(mean_std_top1([AT_ONCE], [top1[2]]))


def test_against_numpy_on_random_sequences() -> None:
    draw = numpy.random.default_rng(0)
    examples, top1 = [], []
    for _ in range(30):
        length, configurations = int(draw.integers(3, 20)), 4
        base = draw.integers(0, 50, length)
        rows = numpy.tile(base, (configurations, 1))
        rows[draw.integers(configurations), draw.integers(length)] += 1
        examples.append([row.tolist() for row in rows])
        top1.append(draw.random((configurations, length)).tolist())
    accuracies = draw.random(4).tolist()
    found = divergence(examples, top1, accuracies)
    firsts = [int((numpy.array(rows) != numpy.array(rows)[0]).any(0).argmax()) for rows in examples]
    spreads = [
        numpy.array(rows)[:, :first].std(0, ddof=1).mean() for rows, first in zip(top1, firsts) if first
    ]
    assert found.percent == 100
    assert found.index == pytest.approx(numpy.mean(firsts))
    assert found.std_top1 == pytest.approx(numpy.mean(spreads))
    assert found.std_accuracy == pytest.approx(numpy.std(accuracies, ddof=1))
    assert found.std_length == 0


def test_one_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="there are 1: give at least two"):
        divergence_index([[1, 2]])
    with pytest.raises(ValueError, match="there are 1: give at least two"):
        std_accuracy([0.5])
    with pytest.raises(ValueError, match="nothing to compare"):
        divergence([], [], [0.1, 0.2])
