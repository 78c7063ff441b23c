r"""Two models on the same questions: the difference, its error, and whether it can be luck (rl-extras §3.2).

Questions differ in difficulty far more than models do, and both models meet the same ones: what is compared
is :math:`d_i=\hat p^A_i-\hat p^B_i`, question by question. Two separate intervals that overlap prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf.evaluation.estimators import Array
from rlhf.evaluation.proportions import Interval
from rlhf.evaluation.statistics import cluster_sums, kurtosis_of, question_se, spread_quantile

MOST_FLIPPED = 16
"""Units with a difference up to which all 2^m sign flips are counted."""
_CHUNK = 1 << 22
"""Signs drawn at once: 32 MiB."""


@dataclass(frozen=True, slots=True)
class Paired:
    """A minus B over the questions that both have a value for. Swapping A and B changes signs only."""

    difference: float
    """Mean of the differences, one question one vote."""
    se: float
    """Standard error for questions like these: the paired (or clustered) one. NaN for a single unit."""
    interval: Interval
    """Student-t interval of the difference, for questions like these."""
    p_value: float
    """Two-sided sign-flip p-value: how often chance alone gives as large a difference."""
    exact: bool
    """Whether all flips were counted; else the p-value comes from `draws` seeded ones."""
    questions: int
    """Questions compared."""
    left_out: int
    """Questions that A or B has no value for."""


def paired(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    draws: int = 100_000,
    seed: int = 0,
) -> Paired:
    r"""Two models on the same questions: :math:`\bar d\pm t\,\mathrm{SE}(d)` and a permutation test.

    t has the degrees of freedom that the spread of the differences leaves (`spread_quantile`): few questions
    that tell the models apart make a wide interval. Simulated: 95 % hold the truth in 94.2 to 96.6 % of
    comparisons, for N of 30, 100, 500, n of 1, 4, 32, rates from Beta(.5, .5), Beta(2, 2) and all 0.2; with
    Beta(.1, .9) in 91 (one sample of 30 questions, a few of which B loses) to 99 %.

    Args:
        a: `[N]` values of A in [0, 1], one a question (`Estimate.per_question`); NaN: none.
        b: `[N]` of B, the same questions in the same order. The numbers of samples may differ.
        clusters: `[N]` names of the clusters that questions belong to; the standard error is then the
            clustered one, t counts clusters, and the test flips whole clusters.
        confidence: of the interval.
        draws: sign flips drawn when there are too many to count all.
        seed: of those draws.

    Raises:
        ValueError: shapes differ, or no question has both values.
    """
    differences, kept = _differences(a, b)
    groups = None if clusters is None else [name for name, keep in zip(clusters, kept, strict=True) if keep]
    sums = differences if groups is None else cluster_sums(differences, groups)
    center, se = math.fsum(differences) / len(differences), question_se(differences, groups)
    spread = differences - center if groups is None else cluster_sums(differences - center, groups)
    reach = math.nan
    if len(sums) > 1:
        reach = se * float(spread_quantile(confidence, len(sums), kurtosis_of(spread)))
    p_value, exact = sign_flip_p_value(sums, draws, seed)
    return Paired(
        difference=center,
        se=se,
        interval=Interval(center - reach, center + reach),
        p_value=p_value,
        exact=exact,
        questions=len(differences),
        left_out=len(kept) - len(differences),
    )


def _differences(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
    """The differences of the questions with both values, and which these are `[N]`."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"A paired comparison needs one value a question of the same questions, "
            f"got shapes {list(first.shape)} and {list(second.shape)}."
        )
    every = first - second
    kept = ~np.isnan(every)
    if not kept.any():
        raise ValueError("A paired comparison needs a question that both have a value for, got none.")
    return every[kept], kept


def sign_flip_p_value(sums: npt.ArrayLike, draws: int = 100_000, seed: int = 0) -> tuple[float, bool]:
    r"""Two-sided p-value of "A is B": share of sign flips with :math:`|\sum\pm d_i|\ge|\sum d_i|`.

    `sums` `[G]`: the differences of what flips, questions or summed clusters. Zeros flip to themselves and
    drop out. With up to `MOST_FLIPPED` others all flips are counted (second value True); else `draws` are
    drawn and the observed one is counted in, (hits + 1) / (draws + 1), which keeps the test valid.
    """
    values = np.asarray(sums, dtype=np.float64)
    sizes, observed = np.abs(values[values != 0]), abs(math.fsum(values))
    # The same sum in another order is no smaller difference.
    least = observed - 1e-9 * max(1.0, float(sizes.sum()))
    if len(sizes) <= MOST_FLIPPED:
        totals = np.zeros(1)
        for size in sizes:
            totals = np.concatenate([totals - size, totals + size])
        return float((np.abs(totals) >= least).mean()), True
    generator, hits = np.random.default_rng(seed), 0
    step = max(1, _CHUNK // len(sizes))
    for start in range(0, draws, step):
        signs = generator.integers(0, 2, (min(step, draws - start), len(sizes)), dtype=np.int8)
        totals = signs @ (2 * sizes) - sizes.sum()
        hits += int((np.abs(totals) >= least).sum())
    return (hits + 1) / (draws + 1), False
