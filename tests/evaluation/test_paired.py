from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, kurtosis, permutation_test, sem, t, ttest_rel

from rlhf.evaluation.paired import paired, sign_flip_p_value
from rlhf.evaluation.statistics import question_se

NAN = math.nan


def two_models(questions: int, samples: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rates of two models that agree on what is hard."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.5, 0.5, questions)
    return rng.binomial(samples, p) / samples, rng.binomial(2 * samples, p**0.7) / (2 * samples)


def test_a_model_equals_itself() -> None:
    a, _ = two_models(30)
    same = paired(a, a)
    assert (same.difference, same.se, same.interval, same.p_value, same.exact) == (0, 0, (0, 0), 1, True)


@pytest.mark.parametrize("clusters", [None, [index // 3 for index in range(60)]])
@pytest.mark.parametrize("questions", [12, 60])
def test_swapping_changes_signs_only(questions: int, clusters: list[int] | None) -> None:
    a, b = two_models(questions)
    groups = clusters and clusters[:questions]
    forth, back = paired(a, b, groups), paired(b, a, groups)
    assert back.difference == -forth.difference
    assert back.se == pytest.approx(forth.se, rel=1e-12)
    assert back.interval == pytest.approx((-forth.interval.high, -forth.interval.low), rel=1e-12)
    assert (back.p_value, back.exact) == (forth.p_value, forth.exact)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_scipys_with_the_degrees_of_freedom_of_the_spread(confidence: float) -> None:
    a, b = two_models(40)
    d = a - b
    ours = paired(a, b, confidence=confidence)
    assert ours.difference == pytest.approx(d.mean(), abs=1e-15)
    assert ours.se == pytest.approx(ttest_rel(a, b).statistic ** -1 * d.mean(), rel=1e-12)
    freedom = 2 * 40 / (kurtosis(d, fisher=False) - 37 / 39)
    assert freedom == pytest.approx(39, rel=0.4)
    theirs = t.interval(confidence, freedom, d.mean(), sem(d))
    assert ours.interval == pytest.approx(theirs, rel=1e-10)
    # What both have in common is gone: two separate errors would say twice as much.
    assert ours.se < 0.5 * math.hypot(question_se(a), question_se(b))


@pytest.mark.parametrize("seed", range(4))
def test_all_flips_equal_scipys_permutations(seed: int) -> None:
    a, b = two_models(11, seed=seed)
    theirs = permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    ours = paired(a, b)
    assert ours.exact
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=1e-12)


def test_drawn_flips_are_near_the_exact_ones() -> None:
    """Differences of 0 and ±1 are the sign test, whose p-value is a binomial one."""
    d = np.array([1.0] * 30 + [-1.0] * 15 + [0.0] * 100)
    p_value, exact = sign_flip_p_value(d)
    truth = binomtest(30, 45).pvalue
    assert not exact
    assert p_value == pytest.approx(truth, abs=4 * math.sqrt(truth / 100_000))
    assert sign_flip_p_value(d) == (p_value, False)
    assert sign_flip_p_value(d[20:50]) == (pytest.approx(binomtest(10, 25).pvalue, abs=0.01), False)
    assert sign_flip_p_value(np.zeros(50)) == (1.0, True)


def test_a_drawn_p_value_is_never_zero() -> None:
    assert sign_flip_p_value(np.ones(100), draws=999) == (1 / 1000, False)


def test_flips_by_hand() -> None:
    # Of the eight sums of ±1 ±2 ±3, only ±6 are as large as 6, and ±6, ±4 as large as 4.
    assert sign_flip_p_value([1, 2, 3, 0]) == (0.25, True)
    assert sign_flip_p_value([-1, 2, 3]) == (0.5, True)
    # Rounding of the order of summation does not lose the observed one.
    assert sign_flip_p_value([0.1, 0.2, 0.3, 0.7]) == (1 / 8, True)


@pytest.mark.parametrize(("difference", "least", "most"), [(0.0, 0.03, 0.055), (0.1, 0.25, 0.45)])
def test_the_test_keeps_its_level_and_has_power(difference: float, least: float, most: float) -> None:
    rng, questions, samples, runs = np.random.default_rng(5), 30, 4, 2_000
    p = rng.beta(2, 2, (runs, questions)) * (1 - difference)
    a, b = rng.binomial(samples, p + difference) / samples, rng.binomial(samples, p) / samples
    rejected = np.mean([sign_flip_p_value(row, draws=400)[0] <= 0.05 for row in a - b])
    assert least < rejected < most


def test_clusters_flip_whole() -> None:
    a, b = two_models(36)
    clusters = [index // 3 for index in range(36)]
    ours = paired(a, b, clusters)
    assert ours.se == question_se(a - b, clusters)
    sums = (a - b).reshape(12, 3).sum(axis=1)
    assert (ours.p_value, ours.exact) == sign_flip_p_value(sums)
    # Copies of every question add nothing.
    once = paired(a, b)
    copied = paired(np.tile(a, 4), np.tile(b, 4), list(range(36)) * 4)
    assert copied.difference == pytest.approx(once.difference)
    assert copied.se == pytest.approx(once.se, rel=0.03)
    assert copied.p_value == pytest.approx(once.p_value, abs=0.01)


def test_questions_without_both_values_are_told() -> None:
    ours = paired([0.5, NAN, 1.0, 0.25], [0.25, 1.0, NAN, 0.5], ["a", "b", "c", "a"])
    assert (ours.questions, ours.left_out, ours.difference) == (2, 2, 0.0)
    assert math.isnan(ours.se)
    assert all(map(math.isnan, ours.interval))
    with pytest.raises(ValueError, match="both have a value"):
        paired([NAN, 1.0], [1.0, NAN])
    with pytest.raises(ValueError, match=r"shapes \[2\] and \[3\]"):
        paired([0.0, 1.0], [0.0, 1.0, 1.0])
