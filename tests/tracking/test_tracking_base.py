from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.tracking import base, jsonl
from rlhf.tracking.base import Continued, Trackers, build, choose, finite, flatten, installed
from rlhf.tracking.config import ALWAYS, TrackingConfig
from rlhf.tracking.jsonl import JsonlTracker
from rollout.types import Group
from tests.tracking.samples import group

CONFIG = {"loop": {"steps": 3}}


class FileTracker:
    """A user's own tracker: appends to a file in a folder that may vanish."""

    def __init__(self, config: TrackingConfig) -> None:
        self.target = Path()
        self.shown: list[int] = []
        self.closed = False
        self.continued: Continued | None = None
        self.run_id = ""

    def start(self, config: dict[str, Any], folder: Path, continued: Continued | None = None) -> None:
        self.continued = continued
        self.target = folder / "mount" / "numbers.txt"
        self.target.touch()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.target.open("a") as file:
            file.write(f"{step}\n")

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        self.shown.append(step)

    def close(self) -> None:
        self.closed = True


def _both(config: TrackingConfig) -> tuple[Trackers, FileTracker]:
    own = FileTracker(config)
    return Trackers(config, {"jsonl": JsonlTracker(config), "own": own}), own


def test_the_three_always_run_and_named_ones_are_added_once() -> None:
    base._FACTORIES.pop("file", None)
    base.register("file", FileTracker)
    trackers = build(TrackingConfig(names=["file", "console"]))
    assert list(trackers._members) == [*ALWAYS, "file"]
    with pytest.raises(ValueError, match="'file' is registered already"):
        base.register("file", FileTracker)
    del base._FACTORIES["file"]


def test_a_resumed_run_goes_on_under_each_trackers_own_id(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    trackers, own = _both(TrackingConfig())
    assert trackers.run_ids() == {}
    own.run_id = "abc123"
    assert trackers.run_ids() == {"own": "abc123"}
    trackers.start(CONFIG, tmp_path, 4, {"own": "abc123"})
    assert own.continued == Continued(step=4, run_id="abc123")
    trackers.start(CONFIG, tmp_path)
    assert own.continued is None
    trackers.close()


def test_unknown_tracker_names_the_choices() -> None:
    with pytest.raises(
        UserError, match=r"asks for 'wandbb', which is no tracker: choose from console, jsonl, "
    ):
        build(TrackingConfig(names=["wandbb"]))


def test_missing_package_gives_the_pip_command() -> None:
    shipped = base._Shipped("rlhf.tracking.wandb", "WandbTracker", "no_such_package_here")
    with pytest.raises(
        UserError, match="not installed: run `pip install no_such_package_here`, or take it out of"
    ):
        shipped(TrackingConfig())


def test_a_folder_of_the_name_is_no_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tracker_leftovers").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not installed("tracker_leftovers")
    assert installed("rich")


def test_failing_tracker_is_warned_about_once_counted_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mount").mkdir()
    trackers, own = _both(TrackingConfig())
    with caplog.at_level(logging.WARNING), trackers:
        trackers.start(CONFIG, tmp_path)
        trackers.log(0, {"eval/accuracy": 0.1})
        (tmp_path / "mount").rename(tmp_path / "away")
        trackers.log(1, {"train/accuracy": 0.1})
        trackers.log(2, {"train/accuracy": 0.2})
        (tmp_path / "away").rename(tmp_path / "mount")
        trackers.log(3, {"train/accuracy": 0.3})
    assert trackers.failures == {"own": 2}
    assert own.target.read_text() == "0\n3\n"
    assert [message.count("Tracker own failed") for message in caplog.messages] == [1, 0]
    assert caplog.messages[1] == "Tracker calls that failed: own 2."
    rows = jsonl.read(tmp_path / "metrics.jsonl")
    assert [row.get("tracking/failures") for row in rows] == [None, None, 1.0, 2.0]
    assert own.closed


def test_tracker_that_cannot_start_stops_the_run_and_closes_the_others(tmp_path: Path) -> None:
    config = TrackingConfig()
    first, broken = FileTracker(config), FileTracker(config)
    trackers = Trackers(config, {"first": first, "broken": broken})
    with pytest.raises(UserError, match=r"the tracker first cannot start \(FileNotFoundError: "):
        trackers.start(CONFIG, tmp_path)
    assert first.closed
    assert broken.closed


def test_the_record_of_the_run_must_not_fail_in_silence(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    trackers, _ = _both(TrackingConfig())
    trackers.start(CONFIG, tmp_path)
    record = trackers._members["jsonl"]
    record.close()
    with pytest.raises(ValueError, match="closed file"):
        trackers.log(1, {"train/accuracy": 0.1})


def test_completions_are_shown_every_so_many_steps(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    groups = [group(1, {"2": 1.0})]
    trackers, own = _both(TrackingConfig(completions_every=3))
    trackers.start(CONFIG, tmp_path)
    for step in range(1, 8):
        trackers.completions(step, groups)
    trackers.completions(9, [])
    assert own.shown == [3, 6]
    silent, own = _both(TrackingConfig(completions_every=0))
    silent.start(CONFIG, tmp_path)
    silent.completions(3, groups)
    assert own.shown == []
    trackers.close()
    silent.close()


def test_all_real_trackers_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with build(TrackingConfig(completions_every=1)) as trackers:
        trackers.start(CONFIG, tmp_path)
        trackers.log(1, {"train/accuracy": 0.25, "learner/grad_norm": math.nan})
        trackers.completions(1, [group(1, {"2": 1.0})])
    assert trackers.failures == {}
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "completions.jsonl", "tensorboard"}
    assert "accuracy 25.0 %" in capsys.readouterr().out


def test_choice_of_completions_is_spread_and_shows_best_and_worst_in_turn() -> None:
    groups = [group(i, {f"wrong {i}": 0.0, f"right {i}": 1.0}) for i in range(10)]
    shown = choose(groups, 4)
    assert [s.response for s in shown] == ["right 0", "wrong 2", "right 5", "wrong 7"]
    assert [s.reward for s in shown] == [1.0, -1.0, 1.0, -1.0]
    assert choose(groups, 4) == shown
    assert len(choose(groups, 99)) == 10
    assert choose([], 3) == []


def test_truncated_responses_are_marked() -> None:
    cut = group(1, {"The sum": 0.0})
    cut.trajectories[0].finish_reason = type(cut.trajectories[0].finish_reason).LENGTH
    assert choose([cut], 1)[0].response == "The sum…"


def test_flat_parameters_and_finite_numbers() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": "x"}) == {"a.b": 1, "a.c.d": [2], "e": "x"}
    assert finite({"a": 1.0, "b": math.nan, "c": -math.inf}) == {"a": 1.0}
