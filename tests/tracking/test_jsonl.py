from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rlhf.tracking import jsonl
from rlhf.tracking.config import TrackingConfig
from rlhf.tracking.jsonl import JsonlTracker
from tests.tracking.samples import group


def _write(folder: Path, *rows: tuple[int, dict[str, float]]) -> Path:
    tracker = JsonlTracker(TrackingConfig(completions_shown=2))
    tracker.start({}, folder)
    for step, metrics in rows:
        tracker.log(step, metrics)
    tracker.close()
    return folder / "metrics.jsonl"


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def _strict(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=_refuse) for line in path.read_text().splitlines()]


def test_one_object_a_step_and_the_same_numbers_back(tmp_path: Path) -> None:
    path = _write(tmp_path, (0, {"eval/accuracy": 0.05}), (1, {"train/accuracy": 1 / 3, "learner/lr": 1e-6}))
    rows = _strict(path)
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["train/accuracy"] == 1 / 3
    assert rows[1]["learner/lr"] == 1e-6
    back = jsonl.read(path)
    assert [{k: v for k, v in row.items() if k != "timestamp"} for row in back] == [
        {"step": 0, "eval/accuracy": 0.05},
        {"step": 1, "train/accuracy": 1 / 3, "learner/lr": 1e-6},
    ]


def test_numbers_that_are_not_finite_stay_strict_json_and_come_back(tmp_path: Path) -> None:
    odd = {
        "learner/grad_norm": math.nan,
        "policy/ratio": math.inf,
        "policy/loss": -math.inf,
        "learner/lr": 1.0,
    }
    path = _write(tmp_path, (1, odd))
    (row,) = _strict(path)
    assert row["learner/grad_norm"] is None
    assert row["nonfinite"] == {"learner/grad_norm": "nan", "policy/ratio": "inf", "policy/loss": "-inf"}
    (back,) = jsonl.read(path)
    assert math.isnan(back["learner/grad_norm"])
    assert (back["policy/ratio"], back["policy/loss"], back["learner/lr"]) == (math.inf, -math.inf, 1.0)
    assert "nonfinite" not in back


def test_each_step_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = JsonlTracker(TrackingConfig())
    tracker.start({}, tmp_path)
    tracker.log(1, {"train/accuracy": 0.5})
    assert len(jsonl.read(tmp_path / "metrics.jsonl")) == 1
    tracker.close()


def test_line_cut_by_a_kill_is_not_read_and_is_removed_when_the_run_goes_on(tmp_path: Path) -> None:
    path = _write(tmp_path, (1, {"train/accuracy": 0.1}))
    with path.open("a") as file:
        file.write('{"step": 2, "train/acc')
    assert [row["step"] for row in jsonl.read(path)] == [1]
    _write(tmp_path, (2, {"train/accuracy": 0.2}))
    assert [(row["step"], row["train/accuracy"]) for row in jsonl.read(path)] == [(1, 0.1), (2, 0.2)]
    assert len(_strict(path)) == 2


def test_going_back_to_a_checkpoint_voids_the_later_steps(tmp_path: Path) -> None:
    before = [(step, {"train/accuracy": 0.1, "eval/accuracy": 0.1}) for step in range(1, 8)]
    path = _write(tmp_path, *before)
    _write(tmp_path, (5, {"train/accuracy": 0.9}), (6, {"train/accuracy": 0.9}))
    rows = jsonl.read(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/accuracy"] for row in rows] == [0.1] * 4 + [0.9] * 2
    assert "eval/accuracy" not in rows[4]


def test_two_rows_of_one_step_are_one_step(tmp_path: Path) -> None:
    path = _write(tmp_path, (3, {"train/accuracy": 0.5}), (3, {"eval/accuracy": 0.6}))
    (row,) = jsonl.read(path)
    assert (row["train/accuracy"], row["eval/accuracy"]) == (0.5, 0.6)


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"train/accuracy": 1}', '{"step": "x"}'])
def test_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = _write(tmp_path, (1, {"train/accuracy": 0.1}))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not a row of metrics"):
        jsonl.read(path)


def test_shown_completions_are_kept(tmp_path: Path) -> None:
    tracker = JsonlTracker(TrackingConfig(completions_shown=2))
    tracker.start({}, tmp_path)
    tracker.completions(10, [group(i, {"right ✓": 1.0, "wrong": 0.0}, verdict="carried") for i in range(4)])
    tracker.close()
    rows = _strict(tmp_path / "completions.jsonl")
    assert [(row["step"], row["response"], row["reward"]) for row in rows] == [
        (10, "right ✓", 1.0),
        (10, "wrong", -1.0),
    ]
    assert rows[0]["verdict"] == "carried"
    assert rows[1]["answer"] == "4"


def test_logging_before_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        JsonlTracker(TrackingConfig()).log(1, {})
