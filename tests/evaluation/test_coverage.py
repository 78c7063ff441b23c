"""Intervals hold the truth in 95 ± 1.5 % of simulated evaluations, wherever that is claimed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from rlhf.evaluation.paired import paired
from rlhf.evaluation.proportions import wilson
from rlhf.evaluation.statistics import question_interval, rerun_interval
from tests.evaluation.coverage import (
    GRID,
    Population,
    covered,
    evaluations,
    histograms,
    paired_intervals,
    question_intervals,
    rerun_intervals,
)

RUNS = 5_000
QUESTIONS = (30, 100, 500)
ids = pytest.mark.parametrize("population", GRID, ids=lambda population: population.name)


def test_what_is_simulated_is_what_is_reported() -> None:
    """The simulations compute many evaluations at once: row by row it is the library's interval."""
    rng = np.random.default_rng(0)
    for population in (*GRID, Population("hard", (0.05, 0.95))):
        _, values = evaluations(population, 12, 4, 40, rng)
        counts = (values[:, :, None] == np.linspace(0, 1, 5)).sum(axis=1).astype(float)
        questions, reruns = question_intervals(counts), rerun_intervals(values, 4)
        differences = paired_intervals(values - values[:, ::-1])
        for row, rates in enumerate(values):
            samples = (np.arange(4) < 4 * rates[:, None]).astype(float)
            ours = question_interval(rates), rerun_interval(samples), paired(rates, rates[::-1]).interval
            for found, ends in zip(ours, (questions, reruns, differences)):
                assert found == pytest.approx((ends[0][row], ends[1][row]), abs=1e-12)


def test_simulated_counts_are_those_of_drawn_rates() -> None:
    rng = np.random.default_rng(0)
    for population in (*GRID, Population("half unsolved", (2.0, 2.0), unsolved=0.5)):
        rates, values = evaluations(population, 100, 4, 2_000, rng)
        shares = [(values == count / 4).mean() for count in range(5)]
        np.testing.assert_allclose(population.counts(4), shares, atol=0.005)
        assert rates.mean() == pytest.approx(population.mean, abs=0.005)


@ids
@pytest.mark.parametrize("samples", [4, 32])
@pytest.mark.parametrize("questions", QUESTIONS)
def test_questions_like_these(questions: int, samples: int, population: Population) -> None:
    counts = histograms(population, questions, samples, 4 * RUNS, np.random.default_rng(1))
    assert covered(*question_intervals(counts), population.mean) == pytest.approx(95, abs=1.5)


@pytest.mark.parametrize(
    ("questions", "rate", "percent"),
    [
        (30, 0.5, 95.7),
        (30, 0.2, 96.4),
        (30, 0.1, 97.4),
        (100, 0.5, 94.3),
        (100, 0.2, 94.1),
        (100, 0.1, 93.6),
        (500, 0.5, 94.6),
        (500, 0.2, 95.0),
        (500, 0.1, 95.6),
    ],
)
def test_questions_like_these_with_one_sample(questions: int, rate: float, percent: float) -> None:
    """Exact: only the mean rate matters. 30 questions have too few outcomes to come near 95 % everywhere."""
    chances = binom.pmf(np.arange(questions + 1), questions, rate)
    ends = np.array([wilson(right, questions) for right in range(questions + 1)])
    held = (ends[:, 0] <= rate) & (rate <= ends[:, 1])
    assert 100 * chances @ held == pytest.approx(percent, abs=0.06)
    # Of the sets of outcomes that an interval could hold the truth for, none is nearer.
    assert percent <= 96.5 or 100 * chances[1:] @ held[1:] < 93.5


@ids
@pytest.mark.parametrize("samples", [4, 32])
@pytest.mark.parametrize("questions", [30, 100])
def test_these_questions_asked_again(questions: int, samples: int, population: Population) -> None:
    rates, values = evaluations(population, questions, samples, RUNS, np.random.default_rng(2))
    assert covered(*rerun_intervals(values, samples), rates.mean(axis=1)) == pytest.approx(95, abs=1.5)


@ids
@pytest.mark.parametrize("samples", [1, 4, 32])
def test_two_models_on_one_set(samples: int, population: Population) -> None:
    """B is A, but for 30 % of the questions, of which it solves others: no true difference on the whole."""
    rng = np.random.default_rng(3)
    rates, a = evaluations(population, 100, samples, RUNS, rng)
    others = population.draw(rates.shape, rng)
    b = rng.binomial(samples, np.where(rng.random(rates.shape) < 0.3, others, rates)) / samples
    found = covered(*paired_intervals(a - b), 0.0)
    # Where hardly a question is ever solved, the interval is rather too wide.
    assert found == pytest.approx(95, abs=1.5) or (population is GRID[3] and 95 < found < 97.5)


def test_clusters_count_as_wholes() -> None:
    """Five paraphrases of each of 40 questions are 40 questions."""
    rng = np.random.default_rng(4)
    names = np.repeat(np.arange(40), 5).tolist()
    rates = np.repeat(GRID[0].draw((RUNS, 40), rng), 5, axis=1)
    values = rng.binomial(4, rates) / 4
    clustered = np.array([question_interval(row, names) for row in values])
    assert covered(clustered[:, 0], clustered[:, 1], 0.5) == pytest.approx(95, abs=1.5)
    plain = np.array([question_interval(row) for row in values[:500]])
    assert covered(plain[:, 0], plain[:, 1], 0.5) < 75
