from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from scipy.stats import binom, binomtest

from rlhf.evaluation.statistics import mean, standard_error, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(10, 30, 0.1923, 0.5122), (0, 30, 0.0, 0.1135), (30, 30, 0.8865, 1.0), (190, 200, 0.9104, 0.9726)],
)
def test_wilson_of_known_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 7, 30, 200])
def test_wilson_equals_scipy(n: int, confidence: float) -> None:
    for successes in range(n + 1):
        theirs = binomtest(successes, n).proportion_ci(confidence, method="wilson")
        assert wilson(successes, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_ends_solve_the_score_equation() -> None:
    z = NormalDist().inv_cdf(0.975)
    for end in wilson(37, 120):
        assert abs(37 / 120 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 120), rel=1e-12)


def test_wilson_covers_what_it_says_on_average() -> None:
    n, covered = 30, []
    intervals = [wilson(k, n) for k in range(n + 1)]
    for percent in range(1, 100):
        p = percent / 100
        covered.append(
            sum(binom.pmf(k, n, p) for k in range(n + 1) if intervals[k].low <= p <= intervals[k].high)
        )
    assert mean(covered) == pytest.approx(0.95, abs=0.01)


def test_wilson_refuses_what_has_no_interval() -> None:
    with pytest.raises(ValueError, match="n >= 1, got n=0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="successes=4, n=3"):
        wilson(4, 3)
    with pytest.raises(ValueError, match=r"got 95: 0\.95 is usual"):
        wilson(1, 3, 95)


def test_mean_and_standard_error_by_hand() -> None:
    assert mean([1.0, 2.0, 6.0]) == 3.0
    # sd with ddof=1 of 1, 2, 6 is sqrt((4 + 1 + 9) / 2) = sqrt(7)
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(standard_error([1.0]))
    with pytest.raises(ValueError, match="no values"):
        mean([])


def test_standard_error_of_zeros_and_ones() -> None:
    # p = 0.3 of n = 10: sqrt(p (1 - p) / (n - 1))
    assert standard_error([1.0] * 3 + [0.0] * 7) == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
