"""Tables of the coverage benchmark, from few simulations; what they show is in `test_coverage.py`."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, sem

from tests.benchmarks import interval_coverage as coverage
from tests.evaluation.coverage import GRID, histograms


def test_values_are_those_of_the_histogram() -> None:
    assert coverage.values_of(np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])).tolist() == [[0, 1, 1], [0.5] * 3]


def test_the_methods_of_others() -> None:
    rng = np.random.default_rng(0)
    counts = histograms(GRID[0], 30, 4, 3, rng)
    values = coverage.values_of(counts)
    percentile, studentized = coverage.bootstraps(values, rng)
    credible = coverage.beta_bernoulli(counts)
    for row, rates in enumerate(values):
        theirs = bootstrap((rates,), np.mean, n_resamples=5_000, method="percentile", rng=rng)
        ours = percentile[0][row], percentile[1][row]
        assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.015)
        assert studentized[0][row] < rates.mean() < studentized[1][row]
        assert credible[0][row] == pytest.approx(percentile[0][row], abs=0.04)
        assert credible[1][row] == pytest.approx(percentile[1][row], abs=0.04)
    plain, lighteval = coverage.wald(values), coverage.lighteval(values)
    np.testing.assert_allclose(plain[1] - plain[0], 2 * 1.96 * sem(values, axis=1), rtol=1e-4)
    np.testing.assert_allclose(plain[1] - plain[0], (lighteval[1] - lighteval[0]) * np.sqrt(1_000 * 30 / 29))


def test_tables_have_a_row_a_cell() -> None:
    rng = np.random.default_rng(0)
    rows = coverage.question_table(40, rng, questions=(30,)).splitlines()
    assert len(rows) == 2 + 4 * 3
    assert {row.count("|") for row in rows} == {13}
    # An interval a thirtieth of what it should be holds next to nothing.
    assert all(float(row.split("|")[-2].strip(" *")) < 30 for row in rows[2:])
    assert len(coverage.rerun_table(40, rng, questions=(30,)).splitlines()) == 2 + 6 * 3
