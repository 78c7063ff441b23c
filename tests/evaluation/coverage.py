"""Simulated evaluations of which the truth is known, and how often an interval holds it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.stats import betabinom, binom

from rlhf.evaluation.estimators import Array
from rlhf.evaluation.statistics import FEWEST_TO_TELL, question_ends, rerun_ends, spread_quantile


@dataclass(frozen=True)
class Population:
    """Questions with success rates p ~ Beta(a, b), of which a share is never solved; or with one rate."""

    name: str
    rate: float | tuple[float, float]
    """The rate of every question, or a and b."""
    unsolved: float = 0.0
    """Share of questions with p = 0."""

    @property
    def mean(self) -> float:
        """What the interval of "questions like these" should hold."""
        rate = self.rate if isinstance(self.rate, float) else self.rate[0] / sum(self.rate)
        return rate * (1 - self.unsolved)

    def draw(self, shape: tuple[int, ...], rng: Generator) -> Array:
        """Success rates of questions."""
        rates = np.full(shape, self.rate) if isinstance(self.rate, float) else rng.beta(*self.rate, shape)
        return np.where(rng.random(shape) < self.unsolved, 0.0, rates) if self.unsolved else rates

    def counts(self, samples: int) -> Array:
        """Chances `[n + 1]` of 0, 1, ... n right ones on a question."""
        right = np.arange(samples + 1)
        if isinstance(self.rate, float):
            chances = binom.pmf(right, samples, self.rate)
        else:
            chances = betabinom.pmf(right, samples, *self.rate)
        chances = chances * (1 - self.unsolved)
        chances[0] += self.unsolved
        return chances / chances.sum()


GRID = (
    Population("Beta(.5, .5)", (0.5, 0.5)),
    Population("Beta(2, 2)", (2.0, 2.0)),
    Population("all 0.2", 0.2),
    Population("Beta(.1, .9)", (0.1, 0.9)),
)
"""From a mid-sized model on mixed questions to a small one on AIME."""


def evaluations(
    population: Population, questions: int, samples: int, runs: int, rng: Generator
) -> tuple[Array, Array]:
    """True rates `[runs, N]` of the questions drawn, and the rates that n samples of each give."""
    rates = population.draw((runs, questions), rng)
    return rates, rng.binomial(samples, rates) / samples


def histograms(population: Population, questions: int, samples: int, runs: int, rng: Generator) -> Array:
    """`[runs, n + 1]` questions with 0, 1, ... n right samples, in independent evaluations."""
    return rng.multinomial(questions, population.counts(samples), runs).astype(float)


def question_intervals(histogram: Array) -> tuple[Array, Array]:
    """Ours, `[runs]` low and high ends, of `histograms`."""
    questions, values = int(histogram[0].sum()), np.linspace(0, 1, histogram.shape[1])
    rate = histogram @ values / questions
    squares = (values - rate[:, None]) ** 2
    second, fourth = (histogram * squares).sum(axis=1), (histogram * squares**2).sum(axis=1)
    agree = second < 1e-12
    kurtosis = np.where(agree, 1.0, questions * fourth / np.where(agree, 1.0, second) ** 2)
    se = np.where(agree, 0.0, np.sqrt(second / (questions * (questions - 1))))
    plain = histogram[:, 1:-1].sum(axis=1) == 0
    plain |= questions - np.maximum(histogram[:, 0], histogram[:, -1]) < FEWEST_TO_TELL
    return question_ends(rate, se, kurtosis, plain, questions)


def rerun_intervals(values: Array, samples: int) -> tuple[Array, Array]:
    """Ours, `[runs]` low and high ends, of rates `[runs, N]` that n samples gave."""
    questions = values.shape[1]
    variances = (values * (1 - values)).sum(axis=1) / (samples - 1)
    return rerun_ends(values.mean(axis=1), variances, questions, questions * samples)


def paired_intervals(differences: Array) -> tuple[Array, Array]:
    """Ours, `[runs]` low and high ends, of differences `[runs, N]`."""
    questions, center = differences.shape[1], differences.mean(axis=1)
    squares = (differences - center[:, None]) ** 2
    second, fourth = squares.sum(axis=1), (squares**2).sum(axis=1)
    agree = second < 1e-12
    kurtosis = np.where(agree, 1.0, questions * fourth / np.where(agree, 1.0, second) ** 2)
    reach = spread_quantile(0.95, questions, kurtosis) * np.sqrt(second / (questions * (questions - 1)))
    return center - reach, center + reach


def covered(low: Array, high: Array, truth: Array | float) -> float:
    """Percentage of intervals that hold the truth."""
    return 100 * float(np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high)))
