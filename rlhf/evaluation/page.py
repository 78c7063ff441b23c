"""The report of one evaluation: text for the console, Markdown, HTML with a histogram, and a parquet file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf.evaluation.result import Result
from rlhf.evaluation.runner import Problem
from rlhf.evaluation.stamp import Stamp
from rlhf.figures import BLUE
from rlhf.files import replace_text

MARKDOWN, HTML, PICTURE, PARQUET = "report.md", "report.html", "histogram.png", "answers.parquet"
_SHOWN = 200
"""Characters of a problem in the table of the page."""


def write(folder: Path, name: str, stamp: Stamp, found: Result, problems: Sequence[Problem]) -> None:
    """Write `report.md`, `report.html`, `histogram.png` and `answers.parquet` beside the responses."""
    import pyarrow
    import pyarrow.parquet

    picture = _histogram(found)
    (folder / PICTURE).write_bytes(picture)
    replace_text(folder / MARKDOWN, markdown(name, stamp, found))
    replace_text(folder / HTML, _html(name, stamp, found, problems, picture))
    nested = ("grades", "rewards")
    rows = [{key: value for key, value in asdict(p).items() if key not in nested} for p in problems]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / PARQUET)


def text(name: str, stamp: Stamp, found: Result, folder: Path) -> str:
    """What the command prints."""
    lines = [f"{name}, protocol {stamp.protocol['label']}: {found.headline()}"]
    lines += [f"  {label}: {value}" for label, value in found.rows()[1:]]
    return "\n".join([*lines, f"  stamp {stamp.digest}; report: {folder / MARKDOWN}"])


def markdown(name: str, stamp: Stamp, found: Result) -> str:
    """The report: numbers, what they mean, and the stamp."""
    lines = [f"# {name}, protocol {stamp.protocol['label']}", "", f"**{found.headline()}**", ""]
    lines += ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in found.rows()), ""]
    lines += [f"![Responses right, by problem]({PICTURE})", "", "## Stamp", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in stamp_rows(stamp)]
    return "\n".join(lines) + "\n"


def stamp_rows(stamp: Stamp) -> list[tuple[str, str]]:
    """The stamp, a row for each part, on one line each."""
    rows = [("digest", stamp.digest)]
    for part, value in asdict(stamp).items():
        if part == "counts":
            continue
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        rows.append((part, " ".join(shown.split()).replace("|", "\\|")))
    return rows


def _histogram(found: Result) -> bytes:
    """How many problems have how many right responses, and the same problem by problem; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    rates = found.per_problem
    left.hist(rates, bins=[i / 10 for i in range(11)], color=BLUE)
    left.set(xlabel="share of right responses", ylabel="problems", xlim=(0, 1))
    right.bar(range(1, len(rates) + 1), sorted(rates), color=BLUE, width=1.0 if len(rates) > 60 else 0.8)
    right.set(xlabel="problems, hardest first", ylabel="share of right responses", ylim=(0, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _html(name: str, stamp: Stamp, found: Result, problems: Sequence[Problem], picture: bytes) -> str:
    """One file that needs no other: numbers, histogram, problems with the answers that were read, stamp."""
    title = html.escape(f"{name}, protocol {stamp.protocol['label']}")
    image = base64.b64encode(picture).decode()
    numbers = "".join(_row(label, value) for label, value in found.rows())
    marks = "".join(_row(key, value) for key, value in stamp_rows(stamp))
    by_problem: dict[str, list[Problem]] = {}
    for problem in problems:
        by_problem.setdefault(problem.id, []).append(problem)
    listed = "".join(_problem_row(key, answers) for key, answers in by_problem.items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>"
        "body{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;"
        "text-align:left;vertical-align:top;overflow-wrap:anywhere}img{max-width:100%}</style>"
        f"<h1>{title}</h1><p><b>{html.escape(found.headline())}</b></p><table>{numbers}</table>"
        f'<img alt="Responses right, by problem" src="data:image/png;base64,{image}">'
        f"<h2>Problems</h2><table><tr><th>id<th>right<th>gold<th>answers read<th>prompt</tr>{listed}</table>"
        f"<h2>Stamp</h2><table>{marks}</table></html>\n"
    )


def _row(label: str, value: str) -> str:
    return f"<tr><th>{html.escape(label)}<td>{html.escape(value)}</tr>"


def _problem_row(key: str, answers: Sequence[Problem]) -> str:
    right = sum(answer.accuracy for answer in answers)
    votes: dict[str, int] = {}
    for answer in answers:
        read = "none" if answer.extracted is None else answer.extracted
        votes[read] = votes.get(read, 0) + 1
    most = sorted(votes.items(), key=lambda vote: -vote[1])[:5]
    read = ", ".join(f"{value[:40]} ({count})" for value, count in most)
    cells = (key, f"{right:g}/{len(answers)}", str(answers[0].answer), read, answers[0].prompt[:_SHOWN])
    return "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>"
