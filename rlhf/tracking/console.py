"""The terminal: one line a step with the few numbers that matter, a live bar, now and then some completions.

On a terminal a bar with rate and time left stays below the lines. Piped or redirected output is plain lines,
the time left among them.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from rlhf.metrics import duration, show
from rlhf.tracking.base import Continued, Shown, choose
from rlhf.tracking.config import TrackingConfig
from rollout.types import Group

HEADLINE = {
    "train/accuracy": "accuracy",
    "train/reward": "reward",
    "length/mean": "length",
    "policy/entropy": "entropy",
    "mismatch/logprob_gap": "gap",
    "learner/grad_norm": "gradient",
    "time/step": "step",
}
"""Metrics of the line of each step, with their labels; one that a step lacks is left out."""

EVALUATION = {
    "eval/any_mention": "any mention",
    "eval/format": "format",
    "eval/length_mean": "length",
    "eval/truncated": "truncated",
}
"""Metrics of the line of each evaluation, after its accuracy."""

_TEXT_LIMIT = 240


class Pace:
    """Seconds a step and seconds left, from the median of the last 20 steps (evaluations included)."""

    def __init__(self, steps: int, now: Callable[[], float] = time.monotonic) -> None:
        """Expect `steps` steps; `now` gives seconds."""
        self._steps = steps
        self._now = now
        self._last: tuple[int, float] | None = None
        self._intervals: deque[float] = deque(maxlen=20)

    def update(self, step: int) -> None:
        """Note that `step` has ended."""
        now = self._now()
        if self._last is not None and step > self._last[0]:
            self._intervals.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)

    @property
    def seconds(self) -> float | None:
        """Seconds a step; None before two steps were seen."""
        return statistics.median(self._intervals) if self._intervals else None

    @property
    def left(self) -> float | None:
        """Seconds until the last step; None before two steps were seen."""
        if self.seconds is None or self._last is None:
            return None
        return max(0, self._steps - self._last[0]) * self.seconds


class ConsoleTracker:
    """Prints to standard output, with a live bar when that is a terminal."""

    def __init__(self, config: TrackingConfig, console: Console | None = None) -> None:
        """`config.completions_shown` completions are shown at once; `console`: standard output by default."""
        self._shown = config.completions_shown
        self._console = console or Console()
        self._steps = 0
        self._pace = Pace(0)
        self._bar: Progress | None = None

    def start(self, config: dict[str, Any], folder: Path, continued: Continued | None = None) -> None:
        """Say where the run lives and, on a terminal, start the bar up to `config["loop"]["steps"]`."""
        self._steps = int(config["loop"]["steps"])
        self._pace = Pace(self._steps)
        self._print(Text(f"run {folder}: {self._steps} steps", style="bold"))
        if self._console.is_terminal:
            self._bar = _bar(self._console)
            self._bar.add_task(folder.name, total=self._steps, pace="")
            self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for the step, one more when it was evaluated, and the bar's new state."""
        self._pace.update(step)
        headline = _pairs(metrics, HEADLINE)
        if headline:
            self._print(self._step_line(step, headline))
        if "eval/accuracy" in metrics:
            self._print(_evaluation_line(step, self._steps, metrics))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, pace=self._pace_text())

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """A table of a few completions: prompt, response, reward, verdict; plain lines when piped."""
        rows = choose(groups, self._shown)
        if self._console.is_terminal:
            self._console.print(_table(step, rows))
            return
        for row in rows:
            self._print(Text(f"  prompt    {visible(row.prompt)}"))
            self._print(Text(f"  response  {visible(row.response)}"))
            self._print(Text(f"            reward {row.reward:.3g}  {_graded(row)}  {row.verdict}"))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _step_line(self, step: int, pairs: list[tuple[str, str]]) -> Text:
        line = _line("step", step, self._steps, "bold cyan", pairs)
        if self._bar is None and self._pace_text():
            line.append(f"  {self._pace_text()}", style="dim")
        return line

    def _pace_text(self) -> str:
        seconds, left = self._pace.seconds, self._pace.left
        return "" if seconds is None or not left else f"{duration(seconds)}/step, {duration(left)} left"

    def _print(self, line: Text) -> None:
        """One line, never wrapped, so that piped output stays one line a step."""
        self._console.print(line, soft_wrap=True, highlight=False)


def _pairs(metrics: Mapping[str, float], labels: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(label, show(name, metrics[name])) for name, label in labels.items() if name in metrics]


def _evaluation_line(step: int, steps: int, metrics: Mapping[str, float]) -> Text:
    """`eval 20/100  accuracy 56.0 % [49.1, 62.7]  any mention 61.0 % ...`."""
    accuracy = show("eval/accuracy", metrics["eval/accuracy"])
    if "eval/accuracy_low" in metrics and "eval/accuracy_high" in metrics:
        accuracy += f" [{100 * metrics['eval/accuracy_low']:.1f}, {100 * metrics['eval/accuracy_high']:.1f}]"
    return _line("eval", step, steps, "bold green", [("accuracy", accuracy), *_pairs(metrics, EVALUATION)])


def _line(kind: str, step: int, steps: int, style: str, pairs: Sequence[tuple[str, str]]) -> Text:
    """`kind step/steps  label value  label value ...`, the numbers of steps aligned."""
    line = Text().append(f"{kind} {step:>{len(str(steps))}}/{steps}", style=style)
    for label, value in pairs:
        line.append(f"  {label} ", style="dim").append(value)
    return line


def _bar(console: Console) -> Progress:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("{task.fields[pace]}"),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=True)


def _table(step: int, rows: Sequence[Shown]) -> Table:
    table = Table(title=f"completions of step {step}", box=box.ROUNDED, show_lines=True, title_justify="left")
    table.add_column("prompt", ratio=2, style="dim")
    table.add_column("response", ratio=3)
    table.add_column("reward", justify="right")
    table.add_column("verdict")
    for row in rows:
        style = "green" if row.accuracy >= 1 else "red"
        verdict = Text(f"{_graded(row)}\n{row.verdict}", style=style)
        table.add_row(
            Text(visible(row.prompt)), Text(visible(row.response)), Text(f"{row.reward:.3g}"), verdict
        )
    return table


def _graded(row: Shown) -> str:
    if row.accuracy in (0.0, 1.0):
        return "right" if row.accuracy else "wrong"
    return f"accuracy {row.accuracy:.2f}"


def visible(text: str, limit: int = _TEXT_LIMIT) -> str:
    """Text on one line, safe for a terminal: line ends as `⏎`, control characters spelled out, middle cut."""
    plain = "".join(c if c.isprintable() else "⏎" if c == "\n" else repr(c)[1:-1] for c in text.strip("\n"))
    if len(plain) <= limit:
        return plain
    head = limit // 2
    return f"{plain[:head]} … {plain[head - limit :]}"
