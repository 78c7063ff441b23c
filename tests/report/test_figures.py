from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from rlhf import figures
from rlhf.figures import Row, column, draw, elapsed, phase_shares, running_mean
from tests.report.runs import training


def _rows(count: int) -> list[Row]:
    rows: list[Row] = [
        {"step": 0, "eval/accuracy": 0.1, "eval/accuracy_low": 0.05, "eval/accuracy_high": 0.2}
    ]
    for step in range(1, count + 1):
        rows.append({"step": step, **training(step), "time/step": 3.0, "time/elapsed": 3.0 * step})
    rows[-1] |= {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6}
    return rows


def _list(values: Any) -> list[float]:
    return [float(value) for value in values]


def _inked(path: Path) -> float:
    """Share of pixels that are not white."""
    return float((matplotlib.image.imread(path)[..., :3].min(axis=2) < 0.95).mean())


def test_every_figure_is_a_readable_picture(tmp_path: Path) -> None:
    drawn = draw(_rows(30), tmp_path / "report", "200 problems, greedy")
    assert list(drawn) == ["learning_curve", "training", "time", "memory"]
    for path in drawn.values():
        height, width = matplotlib.image.imread(path).shape[:2]
        assert 900 <= width <= 1800, path
        assert 400 <= height <= 1800, path
        assert 0.01 < _inked(path) < 0.8, path


def test_only_what_has_data_is_drawn(tmp_path: Path) -> None:
    assert list(draw([{"step": 1, "train/accuracy": 0.5}], tmp_path)) == ["learning_curve"]
    assert list(draw([{"step": 1, "policy/entropy": 0.5}], tmp_path)) == ["training"]
    assert list(draw([{"step": 1, "learner/grad_norm": math.nan}], tmp_path)) == []
    assert list(draw([], tmp_path)) == []


def test_curve_holds_the_numbers_and_the_band() -> None:
    figure = figures.learning_curve(_rows(30))
    assert figure is not None
    left, right = figure.axes
    strict = {line.get_label(): line for line in left.get_lines()}["held-out, strict"]
    assert _list(strict.get_xdata()) == [0, 30]
    assert _list(strict.get_ydata()) == [10.0, 50.0]
    band = left.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((5.0, 60.0))
    clocked = {line.get_label(): line for line in right.get_lines()}["training, sampled"]
    assert _list(clocked.get_xdata()) == [3.0 * step for step in range(1, 31)]
    assert right.get_xlabel() == "wall clock, seconds"
    assert figure.get_suptitle() == "Held-out accuracy 10.0 % → 50.0 %"


def test_curves_are_named_after_the_evaluated_split() -> None:
    rows = [row | {"eval/any_mention": 0.5, "eval/truncated": 0.1} for row in _rows(3)]
    figure = figures.learning_curve(rows, split="validation")
    charts = figures.panels(rows, figures.training_panels("validation"))
    assert figure is not None
    assert charts is not None
    assert figure.get_suptitle() == "Validation accuracy 10.0 % → 50.0 %"
    labels = [text for axes in (*figure.axes, *charts.axes) for text in axes.get_legend_handles_labels()[1]]
    assert {"validation, strict", "validation, any mention", "validation"} <= set(labels)
    assert not any("held-out" in label for label in labels)


def test_wall_clock_is_in_readable_units() -> None:
    def label(seconds: float) -> str:
        figure = figures.learning_curve([{"step": 1, "train/accuracy": 0.5, "time/elapsed": seconds}])
        assert figure is not None
        return figure.axes[1].get_xlabel()

    assert [label(s) for s in (100, 1000, 20000)] == [
        "wall clock, seconds", "wall clock, minutes", "wall clock, hours",
    ]  # fmt: skip


def test_stack_adds_up_to_the_step() -> None:
    figure = figures.time_by_phase(_rows(10))
    assert figure is not None
    tops = np.array([[bar.get_y() + bar.get_height() for bar in bars] for bars in figure.axes[0].containers])
    np.testing.assert_allclose(tops[-1], 3.0)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[::-1] == ["update 66 %", "rollout 33 %", "smaller phases 0 %"]


def test_long_runs_are_averaged_into_few_bars() -> None:
    rows: list[Row] = [{"step": s, "time/step": float(s), "time/update": float(s)} for s in range(1, 1001)]
    figure = figures.time_by_phase(rows)
    assert figure is not None
    (bars, _) = figure.axes[0].containers
    assert len(bars) == 334
    assert bars[0].get_height() == 2.0  # steps 1, 2, 3
    assert bars[0].get_width() == 3


def test_shares_of_time() -> None:
    rows = [{"step": 1, "time/step": 4.0, "time/a": 1.0, "time/b": 3.0, "time/elapsed": 9.0}]
    assert phase_shares(rows) == {"b": 0.75, "a": 0.25}
    assert phase_shares([{"step": 1}]) == {}


def test_columns_leave_out_what_is_missing_or_not_finite() -> None:
    rows: list[Row] = [{"step": 1, "x": 1.0}, {"step": 2}, {"step": 3, "x": math.nan}, {"step": 4, "x": 2.0}]
    assert column(rows, "x") == ([1, 4], [1.0, 2.0])


def test_seconds_come_from_the_clock_else_from_time_stamps() -> None:
    assert elapsed([{"step": 1, "timestamp": 50.0, "time/elapsed": 7.0}]) == {1: 7.0}
    assert elapsed([{"step": 0, "timestamp": 50.0}, {"step": 1, "timestamp": 58.0}]) == {0: 0.0, 1: 8.0}
    assert elapsed([{"step": 0}]) == {}


def test_running_mean_by_hand() -> None:
    assert running_mean([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.5, 2.0, 3.0, 4.0, 4.5]
    assert running_mean([], 3) == []


def test_powers_are_straight_lines() -> None:
    curves = [figures.Curve("a", [4, 8, 16], [1.0, 2.0, 4.0]), figures.Curve("b", [4, 8], [3.0, 3.0])]
    figure = figures.growth([figures.Chart("Seconds", "group size", "seconds", curves)] * 4)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 4
    assert (shown[0].get_xscale(), shown[0].get_yscale()) == ("log", "log")
    assert [line.get_label() for line in shown[0].get_lines()] == ["a", "b"]
    assert _list(shown[0].get_lines()[0].get_ydata()) == [1.0, 2.0, 4.0]
    with pytest.raises(ValueError, match="no chart"):
        figures.growth([])
