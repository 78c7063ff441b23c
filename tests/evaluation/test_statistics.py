from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap, sem, t
from scipy.stats import kurtosis as scipy_kurtosis

from rlhf.evaluation.estimators import avg_at_n, matrix, pass_at_k
from rlhf.evaluation.proportions import mean, standard_error, wilson
from rlhf.evaluation.statistics import (
    bootstrap_questions,
    kurtosis_of,
    macro_average,
    question_interval,
    question_se,
    rerun_interval,
    rerun_se,
    score,
    spread_quantile,
)

NAN = math.nan


def rates(questions: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).beta(0.5, 0.5, questions)


def graded(questions: int, samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((questions, samples)) < rates(questions, seed)[:, None]).astype(float)


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


def test_macro_average_adds_errors_in_squares() -> None:
    assert macro_average([0.2, 0.4, 0.9], [0.03, 0.04, 0.12]) == pytest.approx((0.5, 0.13 / 3))
    with pytest.raises(ValueError, match="got 1 for 2"):
        macro_average([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="no values"):
        macro_average([], [])


@pytest.mark.parametrize("units", [2, 30, 500])
def test_degrees_of_freedom_match_the_variance_of_a_variance(units: int) -> None:
    # Normal values leave G - 1; as many 0 as 1, whose spread is known, G (G - 1); one among zeros about 2.
    assert spread_quantile(0.9, units, 3.0) == pytest.approx(t.ppf(0.95, units - 1), rel=1e-12)
    assert spread_quantile(0.9, units, 1.0) == pytest.approx(t.ppf(0.95, units * (units - 1)), rel=1e-12)
    alone = np.eye(1, units)[0] - 1 / units
    assert spread_quantile(0.95, units, kurtosis_of(alone)) == pytest.approx(t.ppf(0.975, 2), rel=0.12)


def test_kurtosis_is_scipys() -> None:
    values = rates(31) ** 3
    ours = kurtosis_of(values - values.mean())
    assert ours == pytest.approx(scipy_kurtosis(values, fisher=False), rel=1e-12)
    assert kurtosis_of(np.zeros(4)) == 1.0


# ---------------------------------------------------------------- these questions, asked again


def test_rerun_se_by_hand() -> None:
    # rates 1/2 of 4, 1/4 of 4, 1 of 2: (1/4)/3 + (3/16)/3 + 0
    X = matrix([[1, 1, 0, 0], [0, 0, None, 0, 1], [1, 1], [None]])
    assert rerun_se(X) == pytest.approx(math.sqrt(1 / 12 + 1 / 16) / 3)


def test_rerun_se_of_samples_that_agree_is_zero() -> None:
    assert rerun_se([[1, 1, 1], [0, 0, 0]]) == 0


def test_one_sample_tells_nothing_of_a_rerun() -> None:
    assert math.isnan(rerun_se([[1], [0], [1]]))
    assert math.isnan(rerun_se([[1.0, NAN], [0.0, 1.0], [1.0, 1.0]]))
    assert all(map(math.isnan, rerun_interval([[1], [0], [1]])))


def test_rerun_se_of_partial_credit() -> None:
    X = np.random.default_rng(0).random((7, 5))
    assert rerun_se(X) == pytest.approx(math.sqrt((sem(X, axis=1) ** 2).sum()) / 7, rel=1e-12)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("n", [2, 4, 32])
def test_rerun_variance_is_unbiased(n: int, p: float) -> None:
    weights = binom.pmf(np.arange(n + 1), n, p)
    variances = [rerun_se([[1.0] * c + [0.0] * (n - c)]) ** 2 for c in range(n + 1)]
    assert weights @ np.array(variances) == pytest.approx(p * (1 - p) / n, rel=1e-12)


@pytest.mark.parametrize(("n", "points"), [(4, 4.56), (16, 2.28), (32, 1.61), (64, 1.14)])
def test_the_worst_case_on_thirty_questions(n: int, points: float) -> None:
    X = np.tile(np.arange(n) % 2, (30, 1)).astype(float)
    assert 100 * rerun_se(X) * math.sqrt((n - 1) / n) == pytest.approx(points, abs=0.005)


# ---------------------------------------------------------------- questions like these


def test_question_se_is_that_of_the_mean() -> None:
    values = rates(40)
    assert question_se(values) == pytest.approx(sem(values), rel=1e-12)
    assert question_se([0.25, NAN, 0.75, NAN]) == pytest.approx(0.25)
    assert math.isnan(question_se([0.5, NAN]))


def test_sampling_is_within_the_question_se() -> None:
    """Var(avg@n) = Var_q(p)/N + sampling, in expectation over 4 000 evaluations of p ~ Beta(.5, .5)."""
    rng, n, questions = np.random.default_rng(0), 4, 30
    p = rng.beta(0.5, 0.5, (4_000, questions))
    means = rng.binomial(n, p) / n
    spread = means.mean(axis=1).std()
    expected = math.sqrt((0.125 + 0.125 / n) / questions)
    assert expected == pytest.approx(0.0722, abs=5e-5)
    assert spread == pytest.approx(expected, rel=0.03)
    assert np.mean([question_se(row) ** 2 for row in means]) == pytest.approx(expected**2, rel=0.01)


def test_clusters_of_one_change_nothing() -> None:
    values = rates(25)
    assert question_se(values, range(25)) == pytest.approx(question_se(values), rel=1e-12)
    assert question_interval(values, range(25)) == pytest.approx(question_interval(values), rel=1e-12)


def test_clustered_se_is_the_double_sum() -> None:
    values, clusters = rates(30, seed=4), [index * index % 7 for index in range(30)]
    values[3] = NAN
    kept = [i for i in range(30) if i != 3]
    center = np.nanmean(values)
    cross = sum(
        (values[i] - center) * (values[j] - center)
        for i in kept
        for j in kept
        if i != j and clusters[i] == clusters[j]
    )
    expected = math.sqrt(sem(values[kept]) ** 2 + cross / 29**2)
    assert question_se(values, clusters) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_in_clusters_add_nothing(copies: int) -> None:
    values, questions = rates(60), 60
    tiled = np.tile(values, copies)
    clustered = question_se(tiled, list(range(questions)) * copies)
    assert clustered == pytest.approx(question_se(values), rel=1 / questions)
    assert question_se(tiled) == pytest.approx(question_se(values) / math.sqrt(copies), rel=1 / questions)
    # And with the degrees of freedom that the formula loses, exactly.
    own, more = ((values - values.mean()) ** 2).sum(), questions * copies
    exact = own / questions / (more - 1) + own * (copies - 1) / copies / questions**2
    assert clustered == pytest.approx(math.sqrt(exact), rel=1e-12)


def test_question_statistics_refuse_what_they_cannot_use() -> None:
    with pytest.raises(ValueError, match="No question has a value"):
        question_se([NAN, NAN])
    with pytest.raises(ValueError, match=r"one value a question, got shape \[1, 2\]"):
        question_se([[0.0, 1.0]])
    with pytest.raises(ValueError, match="a cluster a question, got 1 for 2"):
        question_se([0.0, 1.0], ["a"])
    with pytest.raises(ValueError, match=r"confidence in \(0, 1\), got 1\.5"):
        bootstrap_questions([0.0, 1.0], confidence=1.5)
    assert math.isnan(question_se([0.0, 1.0], ["a", "a"]))


# ---------------------------------------------------------------- bootstrap


def test_question_bootstrap_tends_to_its_closed_form() -> None:
    values, questions, draws = rates(30), 30, 100_000
    found = bootstrap_questions(values, draws=draws)
    exact = math.sqrt((questions - 1) / questions) * question_se(values)
    assert found.se == pytest.approx(exact, rel=4 / math.sqrt(2 * draws))
    # lighteval divides by the square root of the draws once more.
    assert found.se / math.sqrt(draws) < exact / 300


def test_question_bootstrap_equals_scipy() -> None:
    values, draws = rates(30), 20_000
    theirs = bootstrap(
        (values,), np.mean, n_resamples=draws, method="percentile", rng=np.random.default_rng(3)
    )
    ours = bootstrap_questions(values, draws=draws)
    assert ours.interval == pytest.approx(tuple(theirs.confidence_interval), abs=0.004)
    assert ours.se == pytest.approx(theirs.standard_error, rel=0.02)
    assert ours == bootstrap_questions(values, draws=draws)


def test_bootstrap_of_clusters_draws_them_whole() -> None:
    values = rates(40)
    tiled, clusters = np.tile(values, 3), list(range(40)) * 3
    assert bootstrap_questions(tiled, clusters, draws=20_000).se == pytest.approx(
        bootstrap_questions(values, draws=20_000).se, rel=1e-12
    )
    uneven = [0, 0, 0, *range(1, 38)]
    assert bootstrap_questions(values, uneven, draws=50_000).se == pytest.approx(
        question_se(values, uneven), rel=0.05
    )


# ---------------------------------------------------------------- intervals and the score


def test_one_sample_a_question_is_wilson() -> None:
    X = np.array([[1.0]] * 10 + [[0.0]] * 20)
    found = score(X)
    assert found.question_interval == wilson(10, 30)
    assert found.question_interval == pytest.approx((0.1923, 0.5122), abs=5e-5)
    assert (found.mean, found.questions, found.samples) == (1 / 3, 30, 30)
    assert all(map(math.isnan, [found.rerun_se, *found.rerun_interval]))


@pytest.mark.parametrize("samples", [1, 4, 32])
@pytest.mark.parametrize("right", [0, 1])
def test_all_alike_is_as_one_sample(right: int, samples: int) -> None:
    """Thirty questions without a hit bound the share of questions that have one, however often asked."""
    X = np.full((30, samples), float(right))
    assert question_interval(avg_at_n(X).per_question) == wilson(30 * right, 30)
    if samples > 1:
        assert rerun_interval(X) == wilson(30 * right * samples, 30 * samples)


@pytest.mark.parametrize("clusters", [None, range(30)])
def test_one_or_two_questions_do_not_speak_for_the_others(clusters: range | None) -> None:
    """A model that hits two of thirty questions once each is as good as unknown, as one that hits none."""
    values = np.zeros(30)
    values[:2] = 1 / 32
    for few in (values, values * [1, *[0] * 29]):
        assert question_interval(few, clusters) == wilson(few.sum(), 30)
        assert question_interval(1 - few, clusters) == pytest.approx(wilson(30 - few.sum(), 30), abs=1e-12)
    values[2] = 1 / 32
    assert question_interval(values, clusters).high < 0.03 < wilson(values.sum(), 30).high
    # Three questions of one cluster are one thing that was drawn.
    together = [0, 0, 0, *range(1, 28)]
    assert question_interval(values, together).high == pytest.approx(wilson(values.mean() * 28, 28).high)


def test_question_interval_by_hand() -> None:
    values = np.array([0.0, 0.25, 0.25, 0.5, 1.0])
    se = sem(values)
    assert se == pytest.approx(math.sqrt(0.575 / 4 / 5))
    effective = 0.4 * 0.6 / se**2
    e = values - 0.4
    freedom = 10 / (5 * (e**4).sum() / (e**2).sum() ** 2 - 2 / 4)
    low, high = question_interval(values, confidence=0.9)
    # Both ends solve the score equation.
    for end in (low, high):
        reach = t.ppf(0.95, freedom) * math.sqrt(end * (1 - end) / effective)
        assert abs(end - 0.4) == pytest.approx(reach, rel=1e-12)
    assert low < 0.4 < high


def test_rerun_interval_by_hand() -> None:
    X = matrix([[1, 1, 0, 0], [0, 0, None, 0, 1], [1, 1], [None]])
    variance = (1 / 12 + 1 / 16 + 1 / 8 / (10 / 3 - 1)) / 9
    rate = (1 / 2 + 1 / 4 + 1) / 3
    effective = max(rate * (1 - rate) / variance, 10)
    low, high = rerun_interval(X)
    for end in (low, high):
        reach = NormalDist().inv_cdf(0.975) * math.sqrt(end * (1 - end) / effective)
        assert abs(end - rate) == pytest.approx(reach, rel=1e-12)


def test_score_tells_both_statements_and_what_is_missing() -> None:
    X = graded(30, 8)
    X[3] = NAN
    X[5, 2:4] = NAN
    found = score(X)
    assert (found.questions, found.undefined, found.samples, found.unscored) == (29, 1, 230, 10)
    assert found.mean == avg_at_n(X).mean
    assert (found.rerun_se, found.rerun_interval) == (rerun_se(X), rerun_interval(X))
    assert found.question_se == question_se(avg_at_n(X).per_question)
    assert found.rerun_se < found.question_se
    rerun, question = found.rerun_interval, found.question_interval
    assert question.low < rerun.low < found.mean < rerun.high < question.high
    clusters = [index // 2 for index in range(30)]
    assert score(X, clusters).question_se == question_se(avg_at_n(X).per_question, clusters)
    assert score(X, confidence=0.5).question_interval.low > question.low


def test_error_bars_of_any_metric() -> None:
    X = graded(40, 16)
    passed = pass_at_k(X, 4)
    low, high = question_interval(passed.per_question)
    assert 0 < low < passed.mean < high < 1
    assert bootstrap_questions(passed.per_question).se == pytest.approx(
        question_se(passed.per_question) * math.sqrt(39 / 40), rel=0.03
    )
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 0 to 2"):
        question_interval([0.0, 2.0])
