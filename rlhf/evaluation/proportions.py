"""Means and proportions of single numbers: what training needs of the statistics, without numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """A confidence interval `[low, high]`."""

    low: float
    high: float


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    r"""Wilson score interval of a proportion: well covered for small `n` and near 0 and 1.

    With :math:`z` the normal quantile and :math:`\hat p = s/n`, the ends are
    :math:`\big(\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}\big) / (1 + z^2/n)` (Wilson 1927).
    `successes` may be fractional when a grader gives partial credit. For one response a question this is the
    statement about "this model on questions like these". Raises `ValueError` when there is nothing to count.
    """
    if n < 1:
        raise ValueError(f"wilson needs n >= 1, got n={n}: an empty evaluation has no interval.")
    if not 0 <= successes <= n:
        raise ValueError(f"wilson needs 0 <= successes <= n, got successes={successes}, n={n}.")
    low, high = wilson_ends(successes / n, float(n), normal_quantile(confidence))
    # At rate 0 and 1 one end is exactly 0 or 1, which rounding would miss.
    return Interval(0.0 if successes == 0 else low, 1.0 if successes == n else high)


def wilson_ends(rate: Any, n: Any, quantile: Any) -> tuple[Any, Any]:
    """Wilson's two ends, of numbers or elementwise of arrays; `n` and `rate * n` need not be whole."""
    square = quantile * quantile
    center = rate + square / (2 * n)
    spread = quantile * (rate * (1 - rate) / n + square / (4 * n * n)) ** 0.5
    scale = 1 + square / n
    return (center - spread) / scale, (center + spread) / scale


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, exactly rounded. Raises `ValueError` on an empty sequence."""
    if not values:
        raise ValueError("mean of no values: there was nothing to average.")
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    r"""Standard error of the mean, :math:`\mathrm{sd}_{ddof=1}/\sqrt n`: which questions, and sampling.

    NaN for a single value: one observation says nothing of its spread.
    """
    n = len(values)
    center = mean(values)
    if n < 2:
        return math.nan
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (n - 1) / n)


def normal_quantile(confidence: float) -> float:
    """Two-sided normal quantile: 1.96 for 0.95. Raises `ValueError` unless 0 < confidence < 1."""
    check_confidence(confidence)
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def check_confidence(confidence: float) -> None:
    """Raises `ValueError` unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"An interval needs a confidence in (0, 1), got {confidence}: 0.95 is usual.")
