"""The table of the ablation, its place in `docs/dapo.md`, and its pictures."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.evaluation.proportions import mean, wilson
from rlhf.figures import COLORS
from rlhf.files import replace_text
from tests.benchmarks.ablation.arms import (
    AGGREGATION,
    ARMS,
    BY_NAME,
    CLIP,
    OVERLONG,
    SAMPLING,
    Arm,
)
from tests.benchmarks.ablation.results import Result, interpolate

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Sequence[Result]]
"""Arm -> its finished runs, by seed."""

BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"
"""Between these lines of the page stands what `splice` writes."""

COLUMNS = (
    "arm", "seeds", "accuracy", "Wilson 95 %", "minus DAPO", "second half", "optimizer steps",
    "entropy", "length", "switch", "paper",
)  # fmt: skip
LAST = 3
"""Steps at the end of a run over which entropy and length are averaged."""

PICTURES = {
    "ablation_parts.png": (
        "dapo", "no_clip_higher", "no_dynamic_sampling", "no_token_level", "no_overlong", "grpo",
    ),
    "ablation_weights.png": (
        "dapo", "no_token_level", "token_mean_group", "seq_mean_token_sum", "seq_mean_token_sum_norm",
    ),
}  # fmt: skip
"""File -> the arms that it shows."""


def table(results: Results) -> str:
    """Markdown: one line an arm, also of those that were not run yet."""
    lines = [" | ".join(COLUMNS), "|".join(["---"] * len(COLUMNS))]
    lines += [" | ".join(cells(arm, results)) for arm in ARMS]
    return "\n".join(f"| {line} |" if index != 1 else f"|{line}|" for index, line in enumerate(lines))


def cells(arm: Arm, results: Results) -> list[str]:
    """The line of one arm."""
    runs = results.get(arm.name, ())
    paper = "" if arm.paper is None else f"{arm.paper:g}"
    if not runs:
        return [arm.title, "0", "not run yet", *[""] * (len(COLUMNS) - 4), paper]
    scores = [run.accuracy_at(run.budget) for run in runs]
    interval = wilson(mean(scores) * runs[0].problems, runs[0].problems)
    return [
        arm.title,
        ", ".join(str(run.seed) for run in runs),
        _spread(scores),
        f"{100 * interval.low:.1f} to {100 * interval.high:.1f}",
        "" if arm.name == "dapo" else difference(runs, results.get("dapo", ())),
        _spread([run.accuracy_over(run.budget / 2, run.budget) for run in runs]),
        f"{mean([run.optimizer_steps for run in runs]):.0f}",
        f"{mean([_end(run, 'entropy') for run in runs]):.3f}",
        f"{mean([_end(run, 'length') for run in runs]):.1f}",
        "; ".join(activity(switch, runs) for switch in arm.switches),
        paper,
    ]


def difference(runs: Sequence[Result], dapo: Sequence[Result]) -> str:
    """Accuracy minus full DAPO's with the same seed: mean and range in percentage points."""
    full = {run.seed: run.accuracy_at(run.budget) for run in dapo}
    gaps = [run.accuracy_at(run.budget) - full[run.seed] for run in runs if run.seed in full]
    return _spread(gaps, sign="+") if gaps else "DAPO not run yet"


def activity(switch: str, runs: Sequence[Result]) -> str:
    """How often a switch fired, or would have where it is off; `inactive` when it never did."""
    count = sum(run.fired[switch][0] for run in runs)
    total = sum(run.fired[switch][1] for run in runs)
    if not count:
        return f"{switch}: inactive"
    return f"{switch}: {_percent(count, total)} of {_done(switch, runs[0].config)}"


def _done(switch: str, config: Mapping[str, Any]) -> str:
    """What a switch does where it is on, or what it would mend where it is off."""
    high, low = config["algorithm.clip.high"], config["algorithm.clip.low"]
    filtering, buffer = config["algorithm.dynamic_sampling.enabled"], config["algorithm.overlong.buffer"]
    return {
        CLIP: "tokens let through" if high > low else f"tokens stopped above {1 + high:g}",
        SAMPLING: "groups dropped" if filtering else "groups all right or all wrong",
        AGGREGATION: "tokens weigh otherwise",
        OVERLONG: "responses penalized" if buffer else "responses not penalized",
    }[switch]


def _percent(count: int, total: int) -> str:
    share = 100 * count / total
    return f"{share:.1f} %" if share >= 1 else f"{share:.2g} %"


def _end(run: Result, curve: str) -> float:
    """Mean of a curve over the last steps that have it."""
    there = [value for value in run.curves[curve] if value is not None]
    return mean(there[-LAST:] or [math.nan])


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and range, in percent: `61.2 (58.0 to 64.5)`; one value stands alone."""
    middle = f"{100 * mean(values):{sign}.1f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({100 * min(values):{sign}.1f} to {100 * max(values):{sign}.1f})"


# ---------------------------------------------------------------- the page


def section(results: Results) -> str:
    """What stands in the page: the state of the measurement in a sentence, then the table."""
    done = sum(len(runs) for runs in results.values())
    seeds = sorted({run.seed for runs in results.values() for run in runs})
    wanted = len(ARMS) * max(3, len(seeds))
    state = f"{done} of {wanted} runs are there." if done < wanted else f"All {done} runs are there."
    if not done:
        return f"{state}\n\n{table(results)}"
    budget = max(run.budget for runs in results.values() for run in runs)
    minutes = sum(run.minutes for runs in results.values() for run in runs)
    state += f" Accuracies are at {budget:,} generated tokens; training took {minutes:.0f} minutes in all."
    return f"{state}\n\n{table(results)}"


def splice(page: str, text: str) -> str:
    """The page with `text` between its two marks. Raises `ValueError` when a mark is missing."""
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines '{BEGIN}' and '{END}' to write between: put them back.")
    return f"{before}{begin}{text}\n{end}{after}"


def write_page(path: Path, results: Results) -> None:
    """Write the section into the page at `path`."""
    replace_text(path, splice(path.read_text(encoding="utf-8"), section(results)))


# ---------------------------------------------------------------- pictures


def draw(results: Results, folder: Path) -> list[Path]:
    """Accuracy, entropy and length over generated tokens: means over seeds with their range; returns the
    files. A picture of which no arm was run is left out."""
    made = []
    for file, names in PICTURES.items():
        shown = {name: results[name] for name in names if results.get(name)}
        if shown:
            folder.mkdir(parents=True, exist_ok=True)
            _draw(shown, folder / file)
            made.append(folder / file)
    return made


def _draw(shown: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 3)
    for color, (name, runs) in zip(COLORS, shown.items()):
        label = BY_NAME[name].title.replace("`", "")
        _band(panels[0], [_scaled(run.evaluated_at, run.accuracies, 100) for run in runs], color, label)
        for axes, curve in zip(panels[1:], ("entropy", "length")):
            _band(axes, [_scaled(run.tokens, run.curves[curve], 1) for run in runs], color, label)
    for axes, title in zip(panels, ("Held-out accuracy, %", "Entropy, nats", "Mean response, tokens")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("generated tokens, thousands", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


Curve = tuple[list[float], list[float]]


def _scaled(tokens: Sequence[float], values: Sequence[float | None], factor: float) -> Curve:
    """Thousands of tokens and the values that are there."""
    pairs = [(x / 1000, factor * y) for x, y in zip(tokens, values) if y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _band(axes: Axes, curves: Sequence[Curve], color: str, label: str) -> None:
    """The mean of curves where all of them are, and the range of their values behind it."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    at = [first + (last - first) * i / 60 for i in range(61)]
    at[-1] = last
    values = [[interpolate(x, y, position) for x, y in curves] for position in at]
    axes.plot(at, [mean(v) for v in values], color=color, linewidth=1.8, label=label)
    if len(curves) > 1:
        axes.fill_between(
            at, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12, linewidth=0
        )
