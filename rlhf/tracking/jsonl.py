"""`metrics.jsonl`, the record of a run: one object a step, appended and flushed as the step ends.

JSON has no NaN or infinity, and strict readers refuse Python's spelling of them. A number that is not finite
is written as `null`, and the row's `nonfinite` object says which it was; `read` puts it back.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rlhf.files import replace_text
from rlhf.tracking.base import Continued, choose
from rlhf.tracking.config import TrackingConfig
from rollout.types import Group

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"


class JsonlTracker:
    """Writes `metrics.jsonl`, and the few completions that were shown to `completions.jsonl`."""

    def __init__(self, config: TrackingConfig) -> None:
        """`config.completions_shown` completions are written each time."""
        self._shown = config.completions_shown
        self._metrics: IO[str] | None = None
        self._completions: IO[str] | None = None

    def start(self, config: dict[str, Any], folder: Path, continued: Continued | None = None) -> None:
        """Open both files to append; a line that a killed run left unfinished is cut off first.

        Of a resumed run, whoever resumes has called `cut_back`."""
        self._metrics = _append_to(folder / METRICS)
        self._completions = _append_to(folder / COMPLETIONS)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one object: `step`, `timestamp` (Unix seconds), the metrics, and `nonfinite` if need be."""
        _write(self._metrics, encode(step, time.time(), metrics))

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """Append the completions that this step shows, one object each."""
        for shown in choose(groups, self._shown):
            _write(self._completions, json.dumps({"step": step, **asdict(shown)}, ensure_ascii=False))

    def close(self) -> None:
        """Close both files. What a full disk did not take was raised when it was written, and is let go."""
        for file in (self._metrics, self._completions):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()


def encode(step: int, timestamp: float, metrics: Mapping[str, float]) -> str:
    """One row of `metrics.jsonl`, strict JSON without its newline."""
    odd = {name: str(float(value)) for name, value in metrics.items() if not math.isfinite(value)}
    numbers = {name: None if name in odd else value for name, value in metrics.items()}
    row: dict[str, Any] = {"step": step, "timestamp": round(timestamp, 3), **numbers}
    if odd:
        row["nonfinite"] = odd
    return json.dumps(row, allow_nan=False)


def read(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl` in order of steps, NaN and infinities restored.

    - A last line without a newline is being written, or its run was killed: it is left out.
    - A step that is not beyond its predecessors means that a run went on from an earlier checkpoint: the old
      rows from there on are void. Two rows of one step in succession are one step, logged in two parts.

    Raises `ValueError` with the line number for a line that is not a JSON object.
    """
    rows: list[dict[str, float]] = []
    for number, line in enumerate(_whole_lines(path), start=1):
        row = _decode(path, number, line)
        if rows and rows[-1]["step"] > row["step"]:
            rows = [old for old in rows if old["step"] < row["step"]]
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1] |= row
        else:
            rows.append(row)
    return rows


def cut_back(folder: Path, step: int) -> None:
    """Leave out the rows after `step` of both files, and a last line that has no newline; each at once."""
    for path in (folder / METRICS, folder / COMPLETIONS):
        if path.exists():
            lines = enumerate(_whole_lines(path), start=1)
            kept = [line for number, line in lines if _decode(path, number, line)["step"] <= step]
            replace_text(path, "".join(line + "\n" for line in kept))


def _decode(path: Path, number: int, line: str) -> dict[str, float]:
    try:
        row = json.loads(line)
        row |= {name: float(value) for name, value in row.pop("nonfinite", {}).items()}
        row["step"] = int(row["step"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}, line {number}, is not a row of metrics: {line[:80]!r}.") from error
    return dict(row)


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _append_to(path: Path) -> IO[str]:
    """Open to append, after cutting off a last line that has no newline."""
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            with path.open("r+b") as file:
                file.truncate(whole)
    return path.open("a", encoding="utf-8")


def _write(file: IO[str] | None, line: str) -> None:
    if file is None:
        raise RuntimeError("the tracker was not started: call start(config, folder) first.")
    file.write(line + "\n")
    file.flush()
