"""How often 95 % intervals hold the truth: `python -m tests.benchmarks.interval_coverage [simulations]`.

Prints Markdown: a percentage for each cell and method, in brackets the mean width of ours in points; bold is
further than 1.5 from 95. The methods of others are what evaluation tools print, among them:

- *two-stage*: a bootstrap of questions and of samples within them, which counts sampling twice (by its sd);
- *lighteval*: the sd of bootstrap means over the square root of the 1 000 draws, as its `bootstrap_stderr`;
- *pooled*: a normal interval over all samples, as if each had a question of its own;
- *unpaired*: a normal interval from the standard errors of two scores, as if they shared no questions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from scipy.special import betaln, expit
from scipy.stats import norm, t

from rlhf.evaluation.estimators import Array
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
DRAWS = 1_000
HARD = (
    Population("Beta(1, 19)", (1.0, 19.0)),
    Population("Beta(.5, 4.5)", (0.5, 4.5)),
    Population("Beta(.9, .1)", (0.9, 0.1)),
    Population("80 % never, else Beta(2, 2)", (2.0, 2.0), unsolved=0.8),
    Population("Beta(.05, .95)", (0.05, 0.95)),
    Population("Beta(.02, .98)", (0.02, 0.98)),
    Population("all 0.02", 0.02),
)
"""Near or past the end of what 30 questions can tell."""
_Z = norm.ppf(0.975)

Ends = tuple[Array, Array]


# ---------------------------------------------------------------- methods of others, questions like these


def values_of(histogram: Array) -> Array:
    """`[runs, N]` per-question rates, sorted, from counts `[runs, n + 1]`."""
    runs, outcomes = histogram.shape
    rates = np.tile(np.linspace(0, 1, outcomes), runs)
    return np.repeat(rates, histogram.astype(int).ravel()).reshape(runs, -1)


def around(center: Array, reach: Array) -> Ends:
    return center - reach, center + reach


def errors(values: Array) -> Array:
    return values.std(axis=1, ddof=1) / np.sqrt(values.shape[1])


def wald(values: Array) -> Ends:
    return around(values.mean(axis=1), _Z * errors(values))


def student(values: Array) -> Ends:
    return around(values.mean(axis=1), t.ppf(0.975, values.shape[1] - 1) * errors(values))


def logit(values: Array) -> Ends:
    """t on the logit scale; a point at 0 and 1."""
    rate = values.mean(axis=1)
    variance = np.where((rate > 0) & (rate < 1), rate * (1 - rate), 1.0)
    center = np.log(np.clip(rate, 1e-12, None) / np.clip(1 - rate, 1e-12, None))
    low, high = around(center, t.ppf(0.975, values.shape[1] - 1) * errors(values) / variance)
    return expit(low), expit(high)


def bootstraps(values: Array, rng: Generator) -> tuple[Ends, Ends]:
    """Percentile and bootstrap-t intervals; every evaluation is resampled with the same draws."""
    questions = values.shape[1]
    weights = rng.multinomial(questions, np.full(questions, 1 / questions), DRAWS) / questions
    means, squares = weights @ values.T, weights @ (values**2).T
    spread = np.sqrt(np.maximum(squares - means**2, 0) / (questions - 1))
    off = means - values.mean(axis=1)
    ratios = np.where(spread > 1e-9, off / np.where(spread > 1e-9, spread, 1), np.sign(off) * 1e9)
    percentile, studentized = (np.quantile(draws, [0.025, 0.975], axis=0) for draws in (means, ratios))
    reach = studentized * errors(values)
    rate = values.mean(axis=1)
    return (percentile[0], percentile[1]), (np.maximum(rate - reach[1], 0), np.minimum(rate - reach[0], 1))


def two_stage(values: Array, samples: int) -> Ends:
    questions = values.shape[1]
    within = (values * (1 - values)).sum(axis=1) / samples / questions**2
    sd = np.sqrt(errors(values) ** 2 * (questions - 1) / questions + within)
    return around(values.mean(axis=1), _Z * sd)


def lighteval(values: Array) -> Ends:
    questions = values.shape[1]
    sd = errors(values) * np.sqrt((questions - 1) / questions)
    return around(values.mean(axis=1), _Z * sd / np.sqrt(DRAWS))


def beta_bernoulli(histogram: Array) -> Ends:
    """Credible interval under p ~ Beta(a, b), its mean and the root of 1 / (1 + a + b) flat, on a grid."""
    samples = histogram.shape[1] - 1
    means, spreads = (np.arange(400) + 0.5) / 400, ((np.arange(15) + 0.5) / 15) ** 2
    a, b = np.outer(means, 1 / spreads - 1), np.outer(1 - means, 1 / spreads - 1)
    right = np.arange(samples + 1)[:, None, None]
    logs = betaln(right + a, samples - right + b) - betaln(a, b)
    likelihood = histogram @ logs.reshape(samples + 1, -1)
    posterior = np.exp(likelihood - likelihood.max(axis=1, keepdims=True)).reshape(-1, 400, 15).sum(axis=2)
    chances = np.cumsum(np.pad(posterior, ((0, 0), (1, 0))), axis=1) / posterior.sum(axis=1, keepdims=True)
    edges = np.arange(401) / 400
    ends = np.array([np.interp([0.025, 0.975], row, edges) for row in chances])
    return ends[:, 0], ends[:, 1]


# ---------------------------------------------------------------- tables


def percent(ends: Ends, truth: Array | float, width: bool = False) -> str:
    """Coverage, bold where further than 1.5 from 95."""
    found = covered(*ends, truth)
    text = f"{found:.1f}" if abs(found - 95) <= 1.5 else f"**{found:.1f}**"
    if not width:
        return text
    points = 100 * float(np.mean(np.minimum(ends[1], 1) - np.maximum(ends[0], -1)))
    return f"{text} ({points:.1f})"


def table(head: Sequence[str], rows: list[list[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def question_table(runs: int, rng: Generator, questions: Sequence[int] = (30, 100, 500)) -> str:
    """Questions like these."""
    rows = []
    for population in GRID:
        for n in questions:
            for samples in (1, 4, 32):
                counts = histograms(population, n, samples, runs, rng)
                values = values_of(counts)
                percentile, studentized = bootstraps(values, rng)
                others: list[Ends] = [
                    wald(values),
                    student(values),
                    logit(values),
                    percentile,
                    studentized,
                    beta_bernoulli(counts),
                    two_stage(values, samples),
                    lighteval(values),
                ]
                ours = percent(question_intervals(counts), population.mean, width=True)
                cells = [percent(ends, population.mean) for ends in others]
                rows.append([population.name, str(n), str(samples), ours, *cells])
    names = ["normal", "t", "logit t", "bootstrap", "bootstrap-t", "Beta-Bernoulli", "two-stage", "lighteval"]
    return table(["p", "N", "n", "ours", *names], rows)


def hard_table(runs: int, rng: Generator) -> str:
    """Questions like these, where it gets hard: few questions, few of them solved (ours)."""
    rows = []
    for population in (*GRID, *HARD):
        for questions in (10, 20, 30, 100):
            row = [population.name, str(questions)]
            for samples in (1, 2, 4, 32):
                counts = histograms(population, questions, samples, runs, rng)
                row.append(percent(question_intervals(counts), population.mean, width=True))
            rows.append(row)
    return table(["p", "N", "n = 1", "n = 2", "n = 4", "n = 32"], rows)


def rerun_table(runs: int, rng: Generator, questions: Sequence[int] = (30, 100, 500)) -> str:
    """These questions, asked again."""
    rows = []
    for population in (*GRID, HARD[3], HARD[5]):
        for n in questions:
            for samples in (2, 4, 32):
                rates, values = evaluations(population, n, samples, runs, rng)
                truth, center = rates.mean(axis=1), values.mean(axis=1)
                spread = np.sqrt((values * (1 - values)).sum(axis=1) / (samples - 1)) / n
                all_alike = np.sqrt(center * (1 - center) / (n * samples))
                ours = percent(rerun_intervals(values, samples), truth, width=True)
                others = [percent(around(center, _Z * se), truth) for se in (spread, all_alike)]
                rows.append([population.name, str(n), str(samples), ours, *others])
    return table(["p", "N", "n", "ours", "normal", "pooled"], rows)


SECOND: dict[str, Callable[[Array], Array]] = {"B is A": lambda p: p, "B has p²": lambda p: p**2}


def paired_table(runs: int, rng: Generator) -> str:
    """The difference of two models on the same questions, for questions like these."""
    rows = []
    for population in GRID:
        for name, second in SECOND.items():
            for n in (30, 100, 500):
                for samples in (1, 4, 32):
                    rates, a = evaluations(population, n, samples, runs, rng)
                    b = rng.binomial(samples, second(rates)) / samples
                    # counts(2)[2] is the chance that both of two samples are right: the mean of p².
                    truth = 0.0 if name == "B is A" else population.mean - population.counts(2)[2]
                    separate = np.hypot(errors(a), errors(b))
                    others = [wald(a - b), student(a - b), around((a - b).mean(axis=1), _Z * separate)]
                    ours = percent(paired_intervals(a - b), truth, width=True)
                    cells = [percent(ends, truth) for ends in others]
                    rows.append([population.name, name, str(n), str(samples), ours, *cells])
    return table(["p of A", "B", "N", "n", "ours", "normal", "t", "unpaired"], rows)


def main(runs: int = RUNS) -> None:
    rng = np.random.default_rng(0)
    print(f"{runs} simulated evaluations a cell; 95 % intervals; in brackets the mean width in points.\n")
    for make in (question_table, hard_table, rerun_table, paired_table):
        print(f"## {(make.__doc__ or '').rstrip('.')}\n\n{make(runs, rng)}\n", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
