from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy.stats import binom, hypergeom

from rlhf.evaluation.estimators import (
    Estimate,
    avg_at_n,
    g_pass_at_k,
    maj_at_k,
    majority_chance,
    matrix,
    mg_pass_at_k,
    pass_at_k,
    pass_hat_k,
    vote_classes,
)

NAN = math.nan


def counted(n: int, *rights: int) -> np.ndarray:
    """A question of n samples for each number of right ones."""
    return np.array([[1.0] * right + [0.0] * (n - right) for right in rights])


def every_count(n: int) -> np.ndarray:
    return counted(n, *range(n + 1))


# ---------------------------------------------------------------- the matrix


def test_rows_of_different_lengths_are_padded() -> None:
    X = matrix([[1, 0, 1], [0.5], [None, 1]])
    expected = np.array([[1.0, 0.0, 1.0], [0.5, NAN, NAN], [NAN, 1.0, NAN]])
    assert np.array_equal(X, expected, equal_nan=True)


def test_avg_counts_questions_not_samples() -> None:
    estimate = avg_at_n(matrix([[1, 0, 0, 0], [1, None], [None], [0.5, 1.0]]))
    assert np.array_equal(estimate.per_question, [0.25, 1.0, NAN, 0.75], equal_nan=True)
    assert estimate.mean == pytest.approx(2 / 3)
    assert estimate.undefined == 1


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ([1.0, 0.0], r"shape \[questions, samples\], got \[2\]"),
        ([[NAN, NAN]], "No sample was scored"),
        (np.zeros((0, 4)), "No sample was scored"),
        ([[0.0, 1.5]], r"in \[0, 1\] .*got 0 to 1\.5"),
        ([[-1.0, 1.0]], "got -1 to 1"),
        ([[math.inf, 1.0]], "got 1 to inf"),
    ],
)
def test_bad_matrices_are_refused(X: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        avg_at_n(X)  # type: ignore[arg-type]


# ---------------------------------------------------------------- pass@k, pass^k


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (32, 1, 32, 1.0),
        (32, 1, 16, 0.5),
        (32, 16, 4, 0.949388),
        (64, 3, 8, 0.334677),
        (10, 0, 5, 0.0),
        (10, 10, 5, 1.0),
    ],
)
def test_pass_at_k_of_known_values(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(counted(n, c), k).mean == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 64])
def test_product_forms_equal_the_binomial_forms(n: int) -> None:
    for k in range(1, n + 1):
        subsets = math.comb(n, k)
        some = [1 - math.comb(n - c, k) / subsets for c in range(n + 1)]
        every = [math.comb(c, k) / subsets for c in range(n + 1)]
        np.testing.assert_allclose(pass_at_k(every_count(n), k).per_question, some, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(pass_hat_k(every_count(n), k).per_question, every, rtol=1e-12)


@pytest.mark.parametrize("p", [0.03, 0.5, 0.9])
@pytest.mark.parametrize(("n", "k"), [(4, 2), (16, 5), (32, 32), (64, 8)])
def test_unbiased_to_rounding(n: int, k: int, p: float) -> None:
    weights = binom.pmf(np.arange(n + 1), n, p)
    assert weights @ pass_at_k(every_count(n), k).per_question == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert weights @ pass_hat_k(every_count(n), k).per_question == pytest.approx(p**k, abs=1e-12)
    # The plug-in and the bootstrap with replacement ("best@k") are too low.
    plug_in = weights @ (1 - (1 - np.arange(n + 1) / n) ** k)
    assert k == 1 or plug_in < 1 - (1 - p) ** k


def test_nothing_overflows() -> None:
    n, k = 10_000, 5_000
    X = counted(n, 0, 1, 2, 5_000, 5_001, 10_000)
    # Two right ones: both in the half that is not drawn with chance (1/2) (4999/9999).
    expected = [0, 0.5, 1 - 0.5 * 4999 / 9999, 1, 1, 1]
    np.testing.assert_allclose(pass_at_k(X, k).per_question, expected, rtol=1e-10)
    all_right = pass_hat_k(X, k).per_question
    assert all_right[[0, 1, 2, 5]].tolist() == [0, 0, 0, 1]
    assert (all_right[3:5] < 1e-300).all()
    theirs = hypergeom.sf(2499, n, 5_000, k)
    assert g_pass_at_k(X, k, 0.5).per_question[3] == pytest.approx(theirs, rel=1e-9)
    assert mg_pass_at_k(X, k).per_question[5] == pytest.approx(1, rel=1e-12)


def test_order_of_the_metrics() -> None:
    X = every_count(12)
    average = avg_at_n(X).per_question
    some = np.array([pass_at_k(X, k).per_question for k in range(1, 13)])
    every = np.array([pass_hat_k(X, k).per_question for k in range(1, 13)])
    np.testing.assert_allclose(some[0], average, atol=1e-15)
    np.testing.assert_allclose(every[0], average, atol=1e-15)
    assert (np.diff(some, axis=0) >= -1e-15).all()
    assert (np.diff(every, axis=0) <= 1e-15).all()
    assert (every <= average + 1e-15).all()
    assert (average <= some + 1e-15).all()


# ---------------------------------------------------------------- G-Pass@k


@pytest.mark.parametrize(("threshold", "value"), [(0.25, 0.961538), (0.5, 0.715385), (1.0, 0.038462)])
def test_g_pass_of_known_values(threshold: float, value: float) -> None:
    assert g_pass_at_k(counted(16, 8), 4, threshold).mean == pytest.approx(value, abs=5e-7)


def test_mg_pass_of_known_values() -> None:
    assert mg_pass_at_k(counted(16, 8), 4).mean == pytest.approx(0.161538, abs=5e-7)
    assert mg_pass_at_k(counted(16, 16), 4).mean == pytest.approx(1.0)
    assert mg_pass_at_k(counted(16, 16), 5).mean == pytest.approx(4 / 5)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (9, 3), (16, 16), (40, 10)])
def test_g_pass_equals_scipy_and_has_its_limits(n: int, k: int) -> None:
    X, c = every_count(n), np.arange(n + 1)
    for least in range(1, k + 1):
        theirs = hypergeom.sf(least - 1, n, c, k)
        np.testing.assert_allclose(g_pass_at_k(X, k, least / k).per_question, theirs, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(
        g_pass_at_k(X, k, 1e-6).per_question, pass_at_k(X, k).per_question, rtol=1e-12, atol=1e-15
    )
    np.testing.assert_allclose(
        g_pass_at_k(X, k, 1.0).per_question, pass_hat_k(X, k).per_question, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("k", [2, 3, 8, 9])
def test_mg_pass_is_the_sum_of_its_thresholds(k: int) -> None:
    X = every_count(12)
    thresholds = [i / k for i in range(math.ceil(k / 2) + 1, k + 1)]
    total = sum((g_pass_at_k(X, k, threshold).per_question for threshold in thresholds), np.zeros(13))
    np.testing.assert_allclose(mg_pass_at_k(X, k).per_question, 2 / k * total, atol=1e-14)


def test_a_threshold_is_not_raised_by_rounding() -> None:
    assert 0.07 * 100 > 7
    assert g_pass_at_k(counted(100, 7), 100, 0.07).mean == 1.0


# ---------------------------------------------------------------- what has no value


@pytest.mark.parametrize("metric", [pass_at_k, pass_hat_k, mg_pass_at_k, lambda X, k: g_pass_at_k(X, k, 0.5)])
def test_too_few_scored_samples_give_no_value(metric: Callable[[np.ndarray, int], Estimate]) -> None:
    X = matrix([[1, 1, 1, 1], [1, None, 1, 1], [0, None, None, None]])
    estimate = metric(X, 3)
    assert estimate.per_question[0] == estimate.per_question[1]
    assert math.isnan(estimate.per_question[2])
    assert (estimate.mean, estimate.undefined) == (estimate.per_question[0], 1)
    with pytest.raises(ValueError, match="got k=5, samples=4"):
        metric(X, 5)
    with pytest.raises(ValueError, match="k=0"):
        metric(X, 0)
    with pytest.raises(ValueError, match="grades of 0 and 1"):
        metric(np.array([[0.5, 1.0]]), 2)


def test_bad_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold in \(0, 1\], got 0"):
        g_pass_at_k(counted(4, 2), 2, 0)
    with pytest.raises(ValueError, match="k >= 2, got k=1"):
        mg_pass_at_k(counted(4, 2), 1)


# ---------------------------------------------------------------- maj@k


def slow_majority(votes: Sequence[int | None], k: int) -> float:
    """Every subset, one after the other."""
    scores = []
    for subset in itertools.combinations(votes, k):
        tally = Counter(vote for vote in subset if vote is not None)
        top = [vote for vote, count in tally.items() if count == max(tally.values())]
        scores.append((0 in top) / max(1, len(top)))
    return math.fsum(scores) / len(scores)


@pytest.mark.parametrize(
    ("answers", "k", "value"),
    [("AABBC", 1, 0.4), ("AABBC", 3, 0.433333), ("AABBC", 5, 0.5), ("AAB", 2, 0.666667), ("BCD", 2, 0.0)],
)
def test_maj_of_known_values(answers: str, k: int, value: float) -> None:
    assert maj_at_k([list(answers)], ["A"], k).mean == pytest.approx(value, abs=5e-7)


def test_maj_equals_every_subset() -> None:
    rng = random.Random(3)
    for _ in range(150):
        votes = [rng.choice([None, 0, 0, 1, 1, 2, 3]) for _ in range(rng.randint(1, 10))]
        for k in range(1, len(votes) + 1):
            assert majority_chance(votes, k) == pytest.approx(slow_majority(votes, k), abs=1e-12)


def test_maj_equals_drawn_subsets_when_they_are_many() -> None:
    votes: list[int | None] = [0] * 20 + [1] * 17 + [2] * 9 + [3] * 6 + list(range(4, 10)) + [None] * 6
    rng, draws = random.Random(0), 4_000
    drawn = [slow_majority(rng.sample(votes, 16), 16) for _ in range(draws)]
    error = float(np.std(drawn)) / math.sqrt(draws)
    assert majority_chance(votes, 16) == pytest.approx(math.fsum(drawn) / draws, abs=3 * error)
    assert error < 0.008


def test_maj_of_many_samples_does_not_overflow() -> None:
    # Two classes of as many votes: by symmetry each wins half of the time.
    assert majority_chance([0] * 500 + [1] * 500, 500) == pytest.approx(0.5, abs=1e-12)
    assert majority_chance([0] * 600 + [1] * 200 + [None] * 200, 501) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="up to 1000 samples a question, got 1001"):
        majority_chance([0] * 1001, 10)


def test_maj_does_not_see_order_or_names() -> None:
    rng = random.Random(1)
    answers = [*"AAAABBBBCCD", None, None]
    value = maj_at_k([answers], ["A"], 7).mean
    for _ in range(10):
        rng.shuffle(answers)
        names = dict(zip("ABCD", rng.sample("UVWXYZ", 4)))
        renamed = [names[answer] if answer else None for answer in answers]
        assert maj_at_k([renamed], [names["A"]], 7).mean == pytest.approx(value, abs=1e-15)


def test_who_says_nothing_does_not_vote() -> None:
    estimate = maj_at_k([[None, None, "7", None], [None] * 4, ["7", "7", "8"]], ["7", "7", "7"], 3)
    # One of four answers, and three draw it with chance 3/4; nobody votes; two against one.
    assert estimate.per_question.tolist() == pytest.approx([0.75, 0.0, 1.0])
    assert estimate.dropped == pytest.approx(7 / 11)
    assert estimate.undefined == 0


def test_maj_of_questions_with_too_few_answers() -> None:
    estimate = maj_at_k([["1", "1"], ["1"]], ["1", "1"], 2)
    assert np.array_equal(estimate.per_question, [1.0, NAN], equal_nan=True)
    assert (estimate.mean, estimate.undefined) == (1.0, 1)
    with pytest.raises(ValueError, match="k=3, samples=2"):
        maj_at_k([["1", "1"], ["1"]], ["1", "1"], 3)
    with pytest.raises(ValueError, match="got 1 for 2 questions"):
        maj_at_k([["1"], ["1"]], ["1"], 1)
    with pytest.raises(ValueError, match="samples=0"):
        maj_at_k([[]], ["1"], 1)


def test_equality_merges_classes_in_both_directions() -> None:
    def one_way(gold: str, other: str) -> bool:
        return (gold, other) in {("0.5", "1/2"), ("2/4", "0.5"), ("3", "x=3")}

    answers = ["1/2", "2/4", "0.5", "3", "x=3", "x=3", None]
    # Without an equality: by number, then by name.
    assert vote_classes(answers, "0.5") == [2, 3, 0, 4, 1, 1, None]
    merged = vote_classes(answers, "0.5", one_way)
    # x=3 comes first, being more frequent; 3 joins it although only the other direction counts them as equal.
    assert merged == [0, 0, 0, 1, 1, 1, None]
    assert maj_at_k([answers], ["0.5"], 7).mean == 0.0
    assert maj_at_k([answers], ["0.5"], 7, one_way).mean == 0.5


def test_classes_do_not_chain_and_do_not_see_order() -> None:
    def close(first: str, second: str) -> bool:
        return abs(float(first) - float(second)) <= 1

    # 1 is close to gold, 2 only to 1: classes are made against representatives, so 2 stays outside.
    answers = ["2", "1", "3", "2", "2.5", "1"]
    classes = vote_classes(answers, "0", close)
    assert classes == [1, 0, 1, 1, 1, 0]
    for order in itertools.permutations(range(6)):
        assert vote_classes([answers[i] for i in order], "0", close) == [classes[i] for i in order]


def test_equality_is_asked_at_most_twice_a_pair_of_key_and_class() -> None:
    asked: list[tuple[str, str]] = []

    def never(first: str, second: str) -> bool:
        asked.append((first, second))
        return False

    vote_classes(["a", "b", "a", "c", "gold", "b"], "gold", never)
    assert sorted(asked) == sorted(
        pair
        for first, second in itertools.combinations(["gold", "a", "b", "c"], 2)
        for pair in [(first, second), (second, first)]
    )
