"""`report.md` of a run: what was run, what came out, curves, and responses before and after.

Made from the run's folder alone, so it can be written at any time, also of a run that was cut off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from rlhf import figures
from rlhf.errors import UserError
from rlhf.evaluation import runner
from rlhf.evaluation.config import Split
from rlhf.evaluation.proportions import mean
from rlhf.evaluation.runner import Problem
from rlhf.figures import Row, column
from rlhf.metrics import duration, lookup, show
from rlhf.tracking import jsonl
from rlhf.tracking.base import flatten
from rlhf.tracking.console import visible

FIGURES = "report"

KEYS = (
    "model.path", "model.adapter", "data.path", "data.sources.*.path", "data.sources.*.args.*",
    "data.heldout", "evaluation.split",
    "reward.parts.*.kind", "reward.parts.*.weight", "reward.parts.*.args.*",
    "algorithm.advantage.estimator", "algorithm.objective", "algorithm.clip.*", "algorithm.aggregation",
    "algorithm.kl.coefficient", "algorithm.entropy_coefficient", "algorithm.overlong.*",
    "algorithm.old_logprobs", "algorithm.correction.*", "algorithm.dynamic_sampling.*", "loop.*",
    "rollout.temperature", "rollout.max_new_tokens", "rollout.engines", "learner.optimizer.name",
    "learner.optimizer.lr", "learner.schedule.*", "learner.lora.rank", "learner.dtype", "run.seed",
)  # fmt: skip
"""Settings that the table shows, `*` for any text, in this order; all of them stand at the end."""

NUMBERS = (
    "eval/accuracy", "eval/any_mention", "eval/format", "eval/truncated", "eval/length_mean",
    "train/accuracy", "train/reward", "length/mean", "length/truncated", "selection/zero_variance",
    "policy/entropy", "policy/clip_low", "policy/clip_high", "mismatch/logprob_gap",
    "mismatch/logprob_gap_max", "learner/grad_norm", "time/step", "throughput/generated", "memory/peak_pss",
)  # fmt: skip
"""Metrics of the table of start and end, where the run has them."""

MILESTONES = (0.5, 0.8, 0.9, 0.95)
_AVERAGED = 5
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's folder holds; missing files are empty."""

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    environment: dict[str, Any]
    evaluations: dict[int, Path]
    protocol: dict[str, Any]
    """Sampling settings of the last evaluation."""

    @property
    def steps(self) -> int | None:
        """Steps that were asked for."""
        steps = self.config.get("loop", {}).get("steps")
        return None if steps is None else int(steps)

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return int(self.rows[-1]["step"])

    @property
    def split(self) -> str:
        """What was evaluated, in words: `held-out` or `validation`."""
        name = self.config.get("evaluation", {}).get("split", Split.heldout.value)
        return figures.HELD_OUT if name == Split.heldout.value else str(name)


def load(folder: Path) -> Run:
    """Read a run's folder. Raises `UserError` when it has no `metrics.jsonl` with at least one step."""
    path = folder / jsonl.METRICS
    rows = jsonl.read(path) if path.exists() else []
    if not rows:
        raise UserError(
            f"{folder} holds no logged step ({jsonl.METRICS} is missing or empty): there is no report yet."
        )
    config, environment = folder / "config.yaml", folder / "environment.json"
    evaluations = runner.steps(folder)
    summary = evaluations[max(evaluations)].with_suffix(".json") if evaluations else None
    return Run(
        folder=folder,
        config=yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {},
        rows=rows,
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {},
        evaluations=evaluations,
        protocol=json.loads(summary.read_text(encoding="utf-8"))["sampling"]
        if summary and summary.exists()
        else {},
    )


def write(run_folder: Path | str) -> Path:
    """Write `report.md` and its PNG curves (`report/`) into a run's folder; returns the path of the page.

    Raises `UserError` when nothing was logged yet.
    """
    run = load(Path(run_folder))
    drawn = figures.draw(run.rows, run.folder / FIGURES, _protocol(run), run.split)
    sections = [
        _header(run),
        _picture(run, drawn, "learning_curve"),
        _start_and_end(run),
        _milestones(run),
        _picture(run, drawn, "training"),
        _time(run, drawn),
        _picture(run, drawn, "memory"),
        _responses(run),
        _settings(run),
        _machine(run),
        _whole_config(run),
    ]
    path = run.folder / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------- header


def _header(run: Run) -> str:
    """The name, and the outcome in two or three sentences."""
    lines = [f"# {run.folder.resolve().name}", "", _progress(run)]
    name = f"{run.split.capitalize()} accuracy"
    first, last = _ends(run.rows, "eval/accuracy")
    if first is None or last is None:
        lines += ["", "No evaluation was logged."]
    elif first["step"] == last["step"]:
        lines += ["", f"**{name} at step {int(first['step'])}: {_accuracy(first)}.**"]
    else:
        lines += ["", f"**{name}: {_accuracy(first)} → {_accuracy(last)}.**"]
    if _protocol(run):
        lines[-1] += f" {_protocol(run)[0].upper()}{_protocol(run)[1:]}."
    return "\n".join(lines)


def _progress(run: Run) -> str:
    """How far it got and how long it took."""
    seconds = max(figures.elapsed(run.rows).values(), default=0.0)
    if run.steps is None or run.last_step >= run.steps:
        return f"{run.last_step} steps in {duration(seconds)}."
    return f"**Not finished:** {run.last_step} of {run.steps} steps in {duration(seconds)}."


def _protocol(run: Run) -> str:
    """`200 problems, greedy, at most 16 new tokens`."""
    counts = column(run.rows, "eval/prompts")[1]
    parts = [f"{int(counts[-1])} problems"] if counts else []
    if run.protocol:
        temperature, top_p = run.protocol["temperature"], run.protocol["top_p"]
        parts.append("greedy" if temperature == 0 else f"temperature {temperature:g}, top-p {top_p:g}")
        parts.append(f"at most {run.protocol['max_tokens']} new tokens")
    return ", ".join(parts)


def _accuracy(row: Row) -> str:
    """`95.5 % [91.7, 97.6]`."""
    text = show("eval/accuracy", row["eval/accuracy"])
    if "eval/accuracy_low" in row and "eval/accuracy_high" in row:
        text += f" [{100 * row['eval/accuracy_low']:.1f}, {100 * row['eval/accuracy_high']:.1f}]"
    return text


def _ends(rows: Sequence[Row], name: str) -> tuple[Row, Row] | tuple[None, None]:
    """The first and the last row with a finite `name`."""
    found = [row for row in rows if math.isfinite(row.get(name, math.nan))]
    return (found[0], found[-1]) if found else (None, None)


# ---------------------------------------------------------------- numbers


def _start_and_end(run: Run) -> str:
    """One line a metric: evaluations as they are, training metrics averaged over a few steps."""
    lines = []
    for name in NUMBERS:
        first, last = _ends(run.rows, name)
        if first is None or last is None:
            continue
        start, end = _between(run.rows, name, first, last)
        lines.append(f"| `{name}` | {start} | {end} | {_meaning(name)} |")
    if not lines:
        return ""
    note = (
        f"Evaluations (`eval/`, {run.split} problems) are the first and the last, in brackets the 95 % "
        f"Wilson interval; all others are means over the first and the last {_AVERAGED} steps (of a short "
        f"run, over each half)."
    )
    head = ["## Start and end", "", "| metric | start | end | what it is |", "|---|--:|--:|---|"]
    return "\n".join([*head, *lines, "", note])


def _between(rows: Sequence[Row], name: str, first: Row, last: Row) -> tuple[str, str]:
    if name == "eval/accuracy":
        return _accuracy(first), _accuracy(last)
    if name.startswith("eval/"):
        return show(name, first[name]), show(name, last[name])
    values = [value for step, value in zip(*column(rows, name)) if step > 0]
    if not values:
        return "", ""
    count = min(_AVERAGED, max(1, len(values) // 2))
    return show(name, mean(values[:count])), show(name, mean(values[-count:]))


def _meaning(name: str) -> str:
    metric = lookup(name)
    return metric.meaning.replace("|", "\\|") if metric else ""


def _milestones(run: Run) -> str:
    """When evaluated accuracy first reached each of a few levels, by step and wall clock."""
    steps, values = column(run.rows, "eval/accuracy")
    seconds = figures.elapsed(run.rows)
    lines = []
    for level in MILESTONES:
        reached = next((step for step, value in zip(steps, values) if value >= level), None)
        if reached is not None:
            when = duration(seconds[reached]) if reached in seconds else ""
            lines.append(f"| {100 * level:g} % | {int(reached)} | {when} |")
    if not lines:
        return ""
    names = f"| {run.split} accuracy | first at step | wall clock |"
    return "\n".join(["## Time to accuracy", "", names, "|--:|--:|--:|", *lines])


def _time(run: Run, drawn: Mapping[str, Path]) -> str:
    """The stacked chart and, in words, where the time went."""
    shares = figures.phase_shares(run.rows)
    if not shares:
        return ""
    words = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in shares.items())
    return f"{_picture(run, drawn, 'time')}\n\nWhere the time went: {words}."


_TITLES = {
    "learning_curve": "Learning curve",
    "training": "Training",
    "time": "Time by phase",
    "memory": "Memory",
}


def _picture(run: Run, drawn: Mapping[str, Path], name: str) -> str:
    if name not in drawn:
        return ""
    return f"## {_TITLES[name]}\n\n![{_TITLES[name]}]({drawn[name].relative_to(run.folder).as_posix()})"


# ---------------------------------------------------------------- responses


def _responses(run: Run) -> str:
    """The same evaluated problems, spread evenly, answered in the first and in the last evaluation."""
    if not run.evaluations:
        return ""
    first, last = min(run.evaluations), max(run.evaluations)
    before = runner.read(run.evaluations[first])
    after = {problem.id: problem for problem in runner.read(run.evaluations[last])}
    both = [(old, after[old.id]) for old in before if old.id in after]
    if not both:
        return ""
    questions = distinct([old.prompt for old, _ in both])
    count = min(_SHOWN, len(both))
    picked = [index * len(both) // count for index in range(count)]
    head = [
        "## Responses",
        "",
        f"{count} of the {len(both)} {run.split} problems, spread evenly, not chosen; ✓ right, ✗ wrong.",
        "",
        f"| problem | answer | step {first} | step {last} |",
        "|---|---|---|---|",
    ]
    lines = []
    for index in picked:
        old, new = both[index]
        cells = [_cell(questions[index]), _cell(old.answer or ""), _marked(old), _marked(new)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*head, *lines, "", _changes(both), "", *_first_prompt(both[0][0])])


def _changes(both: Sequence[tuple[Problem, Problem]]) -> str:
    gained = sum(new.accuracy > old.accuracy for old, new in both)
    lost = sum(new.accuracy < old.accuracy for old, new in both)
    return f"From the first evaluation to the last, {gained} problems became right and {lost} became wrong."


def _first_prompt(problem: Problem) -> list[str]:
    fence = "`" * (max((len(run) for run in re.findall(r"`+", problem.prompt)), default=0) + 3)
    return ["The first prompt, as the model sees it:", "", fence, problem.prompt.rstrip("\n"), fence]


def _marked(problem: Problem) -> str:
    mark = "✓" if problem.accuracy >= 1 else "✗"
    cut = " (cut at the limit)" if problem.finish_reason == "length" else ""
    return f"{mark} {_cell(problem.response)}{cut}"


def distinct(texts: Sequence[str]) -> list[str]:
    """What tells prompts of one template apart: without the lines they share at both ends, and chat marks."""
    if len(set(texts)) < 2:
        return list(texts)
    start = _shared_prefix(texts).rfind("\n") + 1
    end = _shared_prefix([text[start:][::-1] for text in texts]).rfind("\n") + 1
    return [re.sub(r"<\|[^|<>]*\|>", "", text[start : len(text) - end]).strip() for text in texts]


def _shared_prefix(texts: Sequence[str]) -> str:
    """The longest text that all begin with."""
    low, high = min(texts), max(texts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), len(low))]


def _cell(text: str) -> str:
    """Text in a table cell: one line, cut in the middle, and nothing of it read as Markdown or HTML."""
    plain = visible(text, 160).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]|~$#])", r"\\\1", plain)


# ---------------------------------------------------------------- settings


def _settings(run: Run) -> str:
    flat = flatten(run.config)
    shown = dict.fromkeys(key for pattern in KEYS for key in flat if fnmatchcase(key, pattern))
    lines = [f"| `{key}` | {_cell(str(flat[key]))} |" for key in shown if flat[key] not in ("", None)]
    return "\n".join(["## Settings", "", "| key | value |", "|---|---|", *lines]) if lines else ""


def _machine(run: Run) -> str:
    """Versions and hardware, one line each."""
    environment = run.environment
    if not environment:
        return ""
    cpu, git = environment["cpu"], environment["git"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    lines = [
        f"- {cpu['model']}, {cpu['usable_cores']} usable cores, "
        f"{environment['memory_bytes'] / 2**30:.1f} GiB of memory",
        f"- device: {environment['device']}",
        f"- {environment['platform']}, Python {environment['python']}",
        f"- {packages}",
        f"- started {environment['started']}: `{' '.join(environment['command'])}`",
    ]
    if git:
        lines.append(f"- commit {git['commit']}{' with local changes' if git['modified'] else ''}")
    return "\n".join(["## Machine", "", *lines])


def _whole_config(run: Run) -> str:
    if not run.config:
        return ""
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True).rstrip()
    return f"<details><summary>Whole configuration</summary>\n\n```yaml\n{text}\n```\n\n</details>"
