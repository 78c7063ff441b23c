"""Intervals hold the truth in 95 ± 1.5 % of simulated evaluations, in every cell for which that is claimed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from rlhf.evaluation.paired import paired
from rlhf.evaluation.statistics import question_interval, rerun_interval, wilson
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
@pytest.mark.parametrize("samples", [2, 4, 32])
@pytest.mark.parametrize("questions", QUESTIONS)
def test_questions_like_these(questions: int, samples: int, population: Population) -> None:
    counts = histograms(population, questions, samples, 4 * RUNS, np.random.default_rng(1))
    assert covered(*question_intervals(counts), population.mean) == pytest.approx(95, abs=1.5)


@pytest.mark.parametrize(
    ("questions", "rate", "percent"),
    [(30, 0.5, 95.7), (30, 0.2, 96.4), (30, 0.1, 97.4)]
    + [(100, 0.5, 94.3), (100, 0.2, 93.3), (100, 0.1, 93.6)]
    + [(500, 0.5, 94.6), (500, 0.2, 94.9), (500, 0.1, 95.0)],
)
def test_questions_like_these_with_one_sample(questions: int, rate: float, percent: float) -> None:
    """Exact: only the mean rate matters, and so few outcomes are possible that no interval hits 95 %."""
    chances = binom.pmf(np.arange(questions + 1), questions, rate)
    ends = np.array([wilson(right, questions) for right in range(questions + 1)])
    assert 100 * chances @ ((ends[:, 0] <= rate) & (rate <= ends[:, 1])) == pytest.approx(percent, abs=0.05)


@ids
@pytest.mark.parametrize("samples", [2, 4, 32])
@pytest.mark.parametrize("questions", [30, 100])
def test_these_questions_asked_again(questions: int, samples: int, population: Population) -> None:
    rates, values = evaluations(population, questions, samples, RUNS, np.random.default_rng(2))
    assert covered(*rerun_intervals(values, samples), rates.mean(axis=1)) == pytest.approx(95, abs=1.5)
