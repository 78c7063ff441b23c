"""The curves of a report, drawn from the rows of `metrics.jsonl` without a display or global state."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.metrics import lookup

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, float]

BLUE, ORANGE, GREEN, RED, PURPLE, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C5AA8", "#8A8A8A"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, "#56B4E9", "#C9A800", GRAY)
"""Okabe and Ito's palette, told apart also without red and green."""

_SMOOTH = 9
"""Steps in the running mean of noisy training curves."""

_MOST_BARS = 400


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart: metrics of one unit over steps."""

    title: str
    series: dict[str, str]
    """Metric name -> label."""
    log: bool = False


HELD_OUT = "held-out"
"""What evaluations answer unless the run says otherwise."""


def training_panels(split: str) -> tuple[Panel, ...]:
    """The charts of training; `split` is what evaluations answered, in words."""
    return (
        Panel("Response length", {"length/mean": "mean", "length/p95": "95th percentile"}),
        Panel("Truncated responses", {"length/truncated": "training", "eval/truncated": split}),
        Panel("Entropy", {"policy/entropy": "policy"}),
        Panel("Clipped tokens", {
            "policy/clip_low": "lower clip", "policy/clip_high": "upper clip",
            "policy/clip_dual": "dual clip",
        }),
        Panel("Learner against engine, log-prob gap", {
            "mismatch/logprob_gap": "mean", "mismatch/logprob_gap_max": "largest",
        }, log=True),
        Panel("Gradient norm", {"learner/grad_norm": "before clipping"}),
        Panel("Reward", {"train/reward": "training", "eval/reward": split}),
        Panel("Groups without signal", {"selection/zero_variance": "all right or all wrong"}),
        Panel("Speed", {"throughput/generated": "generated", "throughput/learned": "learned"}),
    )  # fmt: skip


MEMORY = (
    Panel("Memory", {
        "memory/peak_pss": "all processes, peak", "memory/pss": "all processes",
        "memory/rss_driver": "main process", "memory/device_peak": "device, peak",
    }),
)  # fmt: skip


def draw(rows: Sequence[Row], folder: Path, subtitle: str = "", split: str = HELD_OUT) -> dict[str, Path]:
    """Draw what the rows hold: `learning_curve`, `training`, `time`, `memory` -> path of the PNG.

    `subtitle` stands under the title of the learning curve; `split` is what evaluations answered, in words.
    A figure without data is left out.
    """
    makers: dict[str, Callable[[], Figure | None]] = {
        "learning_curve": lambda: learning_curve(rows, subtitle, split),
        "training": lambda: panels(rows, training_panels(split)),
        "time": lambda: time_by_phase(rows),
        "memory": lambda: panels(rows, MEMORY),
    }
    found = {}
    for name, make in makers.items():
        figure = make()
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png", dpi=150)
            found[name] = folder / f"{name}.png"
    return found


def column(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """`(steps, values)` of the rows that have a finite number under `name`."""
    pairs = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def elapsed(rows: Sequence[Row]) -> dict[float, float]:
    """Step -> seconds since the start: the clock's, else from the rows' time stamps."""
    if any("time/elapsed" in row for row in rows):
        return dict(zip(*column(rows, "time/elapsed")))
    stamps = dict(zip(*column(rows, "timestamp")))
    return {step: stamp - min(stamps.values()) for step, stamp in stamps.items()}


# ---------------------------------------------------------------- learning curve


def learning_curve(rows: Sequence[Row], subtitle: str = "", split: str = HELD_OUT) -> Figure | None:
    """Accuracy against steps and against wall clock: evaluated with its Wilson band, and training."""
    evaluated = column(rows, "eval/accuracy")[1]
    if not evaluated and not column(rows, "train/accuracy")[0]:
        return None
    figure = _figure(10.5, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    seconds = elapsed(rows)
    unit, scale = _time_unit(max(seconds.values(), default=0.0))
    _accuracies(left, rows, {row["step"]: row["step"] for row in rows}, split)
    _accuracies(right, rows, {step: value / scale for step, value in seconds.items()}, split)
    left.set_xlabel("step")
    right.set_xlabel(f"wall clock, {unit}")
    left.set_ylabel("accuracy, %")
    left.set_ylim(0, 100)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_headline(evaluated, split), x=0.01, ha="left", fontsize=14, fontweight="bold")
    left.set_title(subtitle, loc="left", fontsize=10, color="#555555")
    return figure


def _headline(evaluated: Sequence[float], split: str) -> str:
    """`Held-out accuracy 5.0 % → 95.5 %`."""
    if not evaluated:
        return "Training accuracy"
    first, last = (f"{100 * value:.1f} %" for value in (evaluated[0], evaluated[-1]))
    change = f"{first} → {last}" if len(evaluated) > 1 else first
    return f"{split.capitalize()} accuracy {change}"


def _accuracies(axes: Axes, rows: Sequence[Row], x: dict[float, float], split: str) -> None:
    """Training (pale dots and running mean), any mention (dashed), strict with its band, over `x[step]`."""
    steps, values = _percent(rows, "train/accuracy", x)
    if steps:
        axes.plot(steps, values, ".", color=ORANGE, alpha=0.3, markersize=4, zorder=1)
        axes.plot(
            steps, running_mean(values), color=ORANGE, linewidth=1.6, label="training, sampled", zorder=2
        )
    steps, values = _percent(rows, "eval/any_mention", x)
    if steps:
        axes.plot(steps, values, "--", color=GRAY, linewidth=1.4, label=f"{split}, any mention", zorder=2)
    steps, values = _percent(rows, "eval/accuracy", x)
    if steps:
        lows, highs = _percent(rows, "eval/accuracy_low", x)[1], _percent(rows, "eval/accuracy_high", x)[1]
        if len(lows) == len(highs) == len(steps):
            axes.fill_between(
                steps, lows, highs, color=BLUE, alpha=0.18, linewidth=0, label="95 % Wilson interval"
            )
        axes.plot(
            steps, values, "o-", color=BLUE, linewidth=2.2, markersize=4, label=f"{split}, strict", zorder=3
        )
    _clean(axes)


def _percent(rows: Sequence[Row], name: str, x: dict[float, float]) -> tuple[list[float], list[float]]:
    """Positions and percentages of the rows that have both."""
    pairs = [(x[step], 100 * value) for step, value in zip(*column(rows, name)) if step in x]
    return [position for position, _ in pairs], [value for _, value in pairs]


def running_mean(values: Sequence[float], window: int = _SMOOTH) -> list[float]:
    """Centered mean over `window` values, fewer at the ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


# ---------------------------------------------------------------- small charts


def panels(rows: Sequence[Row], wanted: Sequence[Panel]) -> Figure | None:
    """Those of the charts that have data, three in a row."""
    shown = [panel for panel in wanted if any(column(rows, name)[0] for name in panel.series)]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = _figure(3.5 * columns if columns > 1 else 6.5, 2.7 * lines + (0.4 if lines == 1 else 0))
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, panel in zip(grid, shown):
        _panel(axes, rows, panel)
    for axes in list(grid)[len(shown) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Axes, rows: Sequence[Row], panel: Panel) -> None:
    unit = ""
    for color, (name, label) in zip(COLORS, panel.series.items()):
        steps, values = column(rows, name)
        if not steps:
            continue
        unit, scale = _unit(name)
        mark = "o-" if name.startswith("eval/") else "-"
        axes.plot(
            steps, [scale * v for v in values], mark, color=color, linewidth=1.5, markersize=3, label=label
        )
    positive = all(v > 0 for name in panel.series for v in column(rows, name)[1])
    if panel.log and positive:
        axes.set_yscale("log")
    elif not panel.log and min(axes.get_ylim()) > 0:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_ylabel(unit, fontsize=9)
    axes.set_xlabel("step", fontsize=9)
    if len(axes.get_lines()) > 1:
        axes.legend(fontsize=8, frameon=False)
    _clean(axes)


def _unit(name: str) -> tuple[str, float]:
    """Axis label and factor of a metric's unit."""
    metric = lookup(name)
    unit = metric.unit if metric else ""
    return {"share": ("%", 100.0), "bytes": ("GiB", 2.0**-30)}.get(unit, (unit, 1.0))


# ---------------------------------------------------------------- powers


@dataclass(frozen=True, slots=True)
class Curve:
    """Positive values over positive `x`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves of one unit over one quantity, both axes logarithmic."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


def growth(charts: Sequence[Chart]) -> Figure:
    """How cost grows: one small chart each, three in a row; a power of `x` is a straight line.

    Raises ValueError without charts.
    """
    if not charts:
        raise ValueError("There is no chart to draw.")
    columns = min(3, len(charts))
    lines = math.ceil(len(charts) / columns)
    figure = _figure(3.7 * columns, 3.0 * lines)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, chart in zip(grid, charts):
        _growth(axes, chart)
    for axes in grid[len(charts) :]:
        axes.set_visible(False)
    return figure


def _growth(axes: Axes, chart: Chart) -> None:
    for color, curve in zip(COLORS, chart.curves):
        axes.plot(curve.x, curve.y, "o-", color=color, linewidth=1.5, markersize=4, label=curve.label)
    axes.set_xscale("log", base=2 if max(curve.x[-1] for curve in chart.curves) < 1e5 else 10)
    axes.set_yscale("log")
    axes.set_title(chart.title, loc="left", fontsize=10)
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.set_ylabel(chart.y_label, fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    _clean(axes)


# ---------------------------------------------------------------- time


def time_by_phase(rows: Sequence[Row]) -> Figure | None:
    """Seconds of each step, stacked by phase; phases below 1 % are one, long runs are averaged."""
    timed = [row for row in rows if math.isfinite(row.get("time/step", math.nan))]
    if not timed:
        return None
    shares = phase_shares(timed)
    large = [phase for phase, share in shares.items() if share >= 0.01][: len(COLORS) - 1]
    width, bars = _averaged(timed, ["step", "time/step", *(f"time/{phase}" for phase in large)])
    stacks = [
        (f"{phase} {100 * shares[phase]:.0f} %", [bar[f"time/{phase}"] for bar in bars]) for phase in large
    ]
    rest = [max(0.0, bar["time/step"] - sum(values[i] for _, values in stacks)) for i, bar in enumerate(bars)]
    stacks.append((f"smaller phases {100 * (1 - sum(shares[p] for p in large)):.0f} %", rest))
    figure = _figure(10.5, 3.4)
    axes = figure.subplots()
    bottom = [0.0] * len(bars)
    for color, (label, values) in zip([*COLORS[: len(large)], GRAY], stacks):
        axes.bar([bar["step"] for bar in bars], values, width, bottom, color=color, label=label, linewidth=0)
        bottom = [low + value for low, value in zip(bottom, values)]
    axes.set_title("Seconds of a step, by phase", loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    figure.legend(loc="outside right center", frameon=False, fontsize=9, reverse=True)
    _clean(axes)
    return figure


def _averaged(rows: Sequence[Row], names: Sequence[str]) -> tuple[int, list[Row]]:
    """Rows in a row averaged until at most `_MOST_BARS` are left, and how many went into each."""
    size = math.ceil(len(rows) / _MOST_BARS)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return size, [
        {name: sum(row.get(name, 0.0) for row in part) / len(part) for name in names} for part in parts
    ]


def phase_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Phase -> its share of all step time, the largest first."""
    total = sum(row.get("time/step", 0.0) for row in rows)
    sums: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if (
                name.startswith("time/")
                and name not in ("time/step", "time/elapsed")
                and math.isfinite(value)
            ):
                phase = name.removeprefix("time/")
                sums[phase] = sums.get(phase, 0.0) + value
    return {phase: sums[phase] / total for phase in sorted(sums, key=lambda p: -sums[p])} if total else {}


# ---------------------------------------------------------------- looks


def _figure(width: float, height: float) -> Figure:
    """A figure drawn by Agg, apart from pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.margins(x=0.02)


def _time_unit(longest: float) -> tuple[str, float]:
    """Unit and seconds in it, so that the axis has readable numbers."""
    if longest < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)
