r"""What a score is: avg@n, pass@k, pass^k, G-Pass@k and maj@k of graded samples (rl-extras §3.1).

Fed with numbers, never with responses: a matrix `X` `[N, n]` of grades (N questions, n samples each), or for
voting the extracted answers. A sample that was not scored (engine or grader failed) is NaN in `X`; rows of
different lengths are padded with NaN (`matrix`). Every estimator is exact given the samples (no draws, no
seed), and hands back its value for each question, so that `rlhf.evaluation.statistics` can take error bars of
any of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Same = Callable[[str, str], bool]
"""Whether the second answer counts as the first: a grader's equality, gold first. Need not be symmetric."""

MOST_VOTES = 1000
"""Samples a question up to which maj@k counts subsets in float64: C(1000, 500) is 2.7e299."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric of every question, and its mean over those that have one."""

    per_question: Array
    """`[N]`; NaN where too few samples were scored."""
    mean: float = field(init=False)
    """Mean over the questions that have a value."""
    undefined: int = field(init=False)
    """Questions without a value. To be told beside the mean, for failures often hit the hard questions."""

    def __post_init__(self) -> None:
        defined = self.per_question[~np.isnan(self.per_question)]
        object.__setattr__(self, "mean", math.fsum(defined) / len(defined))
        object.__setattr__(self, "undefined", len(self.per_question) - len(defined))


@dataclass(frozen=True, slots=True)
class Majority(Estimate):
    """maj@k, and how many samples had nothing to vote with."""

    dropped: float
    """Share of all samples whose answer was None."""


# ---------------------------------------------------------------- the matrix


def matrix(rows: Sequence[Sequence[float | None]]) -> Array:
    """`[N, n]` from a row of grades a question, n the longest row; None and what is missing become NaN."""
    width = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), width), math.nan)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = [math.nan if grade is None else grade for grade in row]
    return padded


def check_matrix(X: npt.ArrayLike) -> Array:
    """`X` as float64 `[N, n]`. Raises `ValueError` unless it has a scored sample, all in [0, 1] or NaN."""
    grades = np.asarray(X, dtype=np.float64)
    if grades.ndim != 2:
        raise ValueError(
            f"Grades need shape [questions, samples], got {list(grades.shape)}: one row a question."
        )
    if not np.isfinite(grades).any():
        raise ValueError("No sample was scored: there is nothing to average.")
    least, most = np.nanmin(grades), np.nanmax(grades)
    if least < 0 or most > 1:
        raise ValueError(f"Grades need to be in [0, 1] (NaN: not scored), got {least:g} to {most:g}.")
    return grades


def avg_at_n(X: npt.ArrayLike) -> Estimate:
    r"""avg@n :math:`=\frac1N\sum_i\hat p_i`, "pass@1 over n samples": unbiased for any n, fractions allowed.

    A question counts once however many of its samples were scored; one without any has no value. Raises
    `ValueError` on a bad matrix (`check_matrix`).
    """
    grades = check_matrix(X)
    scored = (~np.isnan(grades)).sum(axis=1)
    sums = np.nansum(grades, axis=1)
    return Estimate(np.divide(sums, scored, out=np.full(len(grades), math.nan), where=scored > 0))


# ---------------------------------------------------------------- at k


def pass_at_k(X: npt.ArrayLike, k: int) -> Estimate:
    r"""pass@k: the chance that one of k samples is right, unbiased (Chen et al. 2107.03374, eq. 1).

    :math:`1-\binom{n-c}{k}/\binom nk = 1-\prod_{j=n-c+1}^{n}(1-k/j)`, from n scored samples, c of them right.
    Its variance is largest at k = n: report k up to n/2. NaN for a question with fewer than k scored samples.
    Raises `ValueError` on grades other than 0 and 1, and for k < 1 or above every question's n.
    """
    return _by_counts(X, k, lambda n, c: 1.0 - _share_of_subsets(n, n - c, k))


def pass_hat_k(X: npt.ArrayLike, k: int) -> Estimate:
    r"""pass^k: the chance that all of k samples are right, :math:`\binom ck/\binom nk`; unbiased for p^k.

    NaN and errors as `pass_at_k`.
    """
    return _by_counts(X, k, lambda n, c: _share_of_subsets(n, c, k))


def g_pass_at_k(X: npt.ArrayLike, k: int, threshold: float) -> Estimate:
    r"""G-Pass@k: the chance that at least a share `threshold` of k samples is right (2412.13147).

    :math:`\sum_{j=\max(1,\lceil\tau k\rceil)}^{k}\binom cj\binom{n-c}{k-j}/\binom nk`. At a threshold near 0
    it is pass@k, at 1 pass^k. NaN and errors as `pass_at_k`; `ValueError` for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"G-Pass@k needs a threshold in (0, 1], got {threshold}: 0.5 asks for half of k.")
    # 0.07 * 100 is 7.000000000000001, which is no reason to ask for 8.
    least = max(1, math.ceil(threshold * k - 1e-9))
    return _by_counts(X, k, lambda n, c: float(_right_among(n, c, k)[least:].sum()))


def mg_pass_at_k(X: npt.ArrayLike, k: int) -> Estimate:
    r"""mG-Pass@k :math:`=\frac2k\sum_{i=\lceil k/2\rceil+1}^{k}\text{G-Pass@}k_{i/k}` (2412.13147).

    A model that is always right has 1 for an even k, but (k-1)/k for an odd one: prefer an even k. NaN and
    errors as `pass_at_k`; `ValueError` for k = 1, whose sum is empty.
    """
    if k < 2:
        raise ValueError(f"mG-Pass@k needs k >= 2, got k={k}: its sum over thresholds is empty.")
    # Summed over the thresholds, j right ones count once for each threshold i with half < i <= j.
    weights = np.maximum(np.arange(k + 1) - math.ceil(k / 2), 0) * (2 / k)
    return _by_counts(X, k, lambda n, c: float(weights @ _right_among(n, c, k)))


def _by_counts(X: npt.ArrayLike, k: int, value: Callable[[int, int], float]) -> Estimate:
    """`value(n, c)` of every question with at least k scored samples, computed once for each pair."""
    grades = check_matrix(X)
    scored = ~np.isnan(grades)
    if ((grades[scored] != 0) & (grades[scored] != 1)).any():
        raise ValueError("Metrics at k need grades of 0 and 1: give partial credit a threshold first.")
    samples = scored.sum(axis=1)
    _check_k(k, int(samples.max()))
    pairs = list(zip(samples.tolist(), np.nansum(grades, axis=1).astype(int).tolist()))
    values = {(n, c): value(n, c) for n, c in set(pairs) if n >= k}
    return Estimate(np.array([values.get(pair, math.nan) for pair in pairs]))


def _check_k(k: int, most: int) -> None:
    if not 1 <= k <= most:
        raise ValueError(f"Metrics at k need 1 <= k <= samples a question, got k={k}, samples={most}.")


def _share_of_subsets(n: int, among: int, k: int) -> float:
    r"""Share of the k-subsets of n that lie within `among` of them: :math:`\prod_{j=among+1}^{n}(1-k/j)`."""
    if among < k:
        return 0.0
    return float(np.prod(1.0 - k / np.arange(among + 1, n + 1)))


def _right_among(n: int, c: int, k: int) -> Array:
    """Chances `[k + 1]` of j right ones among k drawn from n with c right ones: hypergeometric.

    From the ratios of neighbours, scaled to sum to 1: no factorial, so nothing overflows at any n.
    """
    least, most = max(0, k - (n - c)), min(c, k)
    j = np.arange(least, most)
    logs = np.concatenate([[0.0], np.cumsum(np.log((c - j) * (k - j) / ((j + 1.0) * (n - c - k + j + 1))))])
    weights = np.exp(logs - logs.max())
    chances = np.zeros(k + 1)
    chances[least : most + 1] = weights / weights.sum()
    return chances


# ---------------------------------------------------------------- votes


def maj_at_k(
    answers: Sequence[Sequence[str | None]], gold: Sequence[str], k: int, same: Same | None = None
) -> Majority:
    """maj@k (cons@k): the chance that the majority of k samples, drawn without replacement, is right.

    A fair draw settles ties. None does not vote; a draw in which nobody votes is wrong. Exact: all subsets
    are counted, none is drawn (`majority_chance`).

    Args:
        answers: extracted answers as normalised keys, `[N]` rows of n each; leave out samples that failed.
        gold: `[N]` keys.
        k: samples that vote. NaN for a question with fewer answers.
        same: a grader's equality, which merges keys into classes (`vote_classes`); None: equal keys only.

    Raises:
        ValueError: `gold` has another length; k < 1 or above every question's n; above `MOST_VOTES` samples.
    """
    if len(answers) != len(gold):
        raise ValueError(f"maj@k needs gold for each question, got {len(gold)} for {len(answers)} questions.")
    _check_k(k, max((len(row) for row in answers), default=0))
    values = [
        majority_chance(vote_classes(row, key, same), k) if len(row) >= k else math.nan
        for row, key in zip(answers, gold)
    ]
    silent = sum(answer is None for row in answers for answer in row)
    return Majority(np.array(values), silent / sum(map(len, answers)))


def vote_classes(answers: Sequence[str | None], gold: str, same: Same | None = None) -> list[int | None]:
    """The class of every answer: 0 for gold's, then 1, 2, ... in no meaningful order; None for None.

    Equal keys share a class. With `same`, a key joins the first class whose representative counts as equal to
    it in either direction, for graders are neither symmetric nor transitive. Gold represents its class; keys
    come in order of their number, then by name, so that the order of the samples does not matter. `same` is
    called at most twice for each pair of key and class.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    representatives, classes = [gold], {gold: 0}
    for key in sorted(counts, key=lambda key: (-counts[key], key)):
        if key in classes:
            continue
        equal = (i for i, other in enumerate(representatives) if same and _either_way(same, other, key))
        classes[key] = next(equal, len(representatives))
        if classes[key] == len(representatives):
            representatives.append(key)
    return [None if answer is None else classes[answer] for answer in answers]


def _either_way(same: Same, first: str, second: str) -> bool:
    return same(first, second) or same(second, first)


def majority_chance(votes: Sequence[int | None], k: int) -> float:
    r"""The chance that class 0 wins among k of the votes, drawn without replacement; exact.

    With :math:`a_c` votes for class c and :math:`a_\varnothing` silent samples: subsets in which gold has
    g votes, no class more and t others as many, score 1/(t + 1), and the coefficient of :math:`x^k y^t` in
    :math:`\binom{a_0}{g}x^g\,(1+x)^{a_\varnothing}\prod_{c>0}\big(\sum_{j<g}\binom{a_c}{j}x^j
    +y\binom{a_c}{g}x^g\big)` is their number.

    Raises `ValueError` above `MOST_VOTES` votes, and for k < 1 or above their number.
    """
    _check_k(k, len(votes))
    if len(votes) > MOST_VOTES:
        raise ValueError(f"maj@k takes up to {MOST_VOTES} samples a question, got {len(votes)}.")
    counts = Counter(votes)
    silent, right = counts.pop(None, 0), counts.pop(0, 0)
    abstain = np.array([float(math.comb(silent, j)) for j in range(k + 1)])
    rivals = list(counts.values())
    wins = [math.comb(right, g) * _won_with(g, k, rivals, abstain) for g in range(1, min(right, k) + 1)]
    return math.fsum(wins) / math.comb(len(votes), k)


def _won_with(g: int, k: int, rivals: list[int], abstain: Array) -> float:
    """Ways to fill up k samples when gold has g votes and no rival more, each times 1 / (its winners)."""
    room = k - g
    ways = np.zeros((room + 1, room // g + 1))  # [samples drawn, rivals with g votes]
    ways[:, 0] = abstain[: room + 1]
    for size in rivals:
        filled = ways.copy()  # none of this rival's votes was drawn
        for j in range(1, min(size, g - 1, room) + 1):
            filled[j:] += math.comb(size, j) * ways[: room + 1 - j]
        if g <= min(size, room):
            filled[g:, 1:] += math.comb(size, g) * ways[: room + 1 - g, :-1]
        ways = filled
    return float((ways[room] / np.arange(1, ways.shape[1] + 1)).sum())
