"""`Checkpoints`: whole or not there, verified, pruned; with plain files in place of models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf import checkpoint
from rlhf.checkpoint import MANIFEST, STATE, CheckpointConfig, Checkpoints


def saving(text: str) -> Callable[[Path], None]:
    """Fills a checkpoint with two files."""

    def save(folder: Path) -> None:
        (folder / "model.safetensors").write_text(text)
        (folder / STATE).mkdir()
        (folder / STATE / "state.json").write_text(text)

    return save


def run_through(
    folder: Path, config: CheckpointConfig, accuracies: dict[int, float], steps: int = 6
) -> list[int]:
    """Save what is due in `steps` steps, evaluated as `accuracies` says; returns what is left."""
    checkpoints = Checkpoints(folder, config)
    for step in range(1, 7):
        known = {at: value for at, value in accuracies.items() if at <= step}
        if checkpoints.due(step, known, last=step == 6):
            checkpoints.write(step, saving(str(step)), known)
    assert all(checkpoints.problem(step) == "" for step in checkpoints.steps())
    return checkpoints.steps()


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (CheckpointConfig(), [6]),
        (CheckpointConfig(every=2, keep=9), [2, 4, 6]),
        (CheckpointConfig(every=2, keep=2), [4, 6]),
        (CheckpointConfig(every=4, keep=1), [6]),
        (CheckpointConfig(every=2, keep=1, save_best=True), [3, 6]),
        (CheckpointConfig(keep=1, save_best=True), [3, 6]),
        (CheckpointConfig(keep=3, save_best=True), [1, 3, 6]),
    ],
    ids=repr,
)
def test_what_is_saved_and_what_stays(config: CheckpointConfig, left: list[int], tmp_path: Path) -> None:
    accuracies = {0: 0.95, 1: 0.4, 3: 0.9, 4: 0.2, 5: 0.9, 6: 0.8}  # step 0 is the model that was given
    assert run_through(tmp_path, config, accuracies) == left


def test_without_evaluations_nothing_is_best(tmp_path: Path) -> None:
    assert run_through(tmp_path, CheckpointConfig(every=3, keep=1, save_best=True), {}) == [6]


@pytest.mark.parametrize("moment", ["model", "state", "manifest", "rename"])
def test_a_crash_while_writing_leaves_the_last_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=1))
    checkpoints.write(1, saving("whole"), {})

    def crash(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    def save(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        if moment == "state":
            (folder / STATE).mkdir()
        if moment in ("model", "state"):
            crash()

    with monkeypatch.context() as patch:
        if moment == "manifest":
            patch.setattr(checkpoint, "_seal", crash)
        if moment == "rename":
            patch.setattr(checkpoint.os, "replace", crash)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.write(2, save, {})
    assert checkpoints.steps() == [1]
    assert checkpoints.problem(1) == ""
    checkpoints.write(2, saving("again"), {})
    assert [entry.name for entry in checkpoints.folder.iterdir()] == ["step-2"]


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=5))
    checkpoints.write(2, saving("whole"), {})
    shutil.copytree(checkpoints.path(2), checkpoints.folder / ".step-4.partial")
    shutil.copytree(checkpoints.path(2), checkpoints.folder / ".step-1.removed")
    assert checkpoints.steps() == [2]
    checkpoints.cut_back(2)
    assert [entry.name for entry in checkpoints.folder.iterdir()] == ["step-2"]


def test_a_step_is_written_again_in_its_place(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.path(3).mkdir(parents=True)
    (checkpoints.path(3) / "config.json").write_text("{}")
    assert checkpoints.problem(3) == "it has no training_state/manifest.json"
    checkpoints.write(3, saving("new"), {})
    assert checkpoints.problem(3) == ""
    assert not (checkpoints.path(3) / "config.json").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.write(1, saving("abc"), {})
    assert checkpoints.problem(2) == "it does not exist"
    (folder / "model.safetensors").write_text("abd")
    assert checkpoints.problem(1) == "model.safetensors does not have the checksum that it was written with"
    (folder / "model.safetensors").unlink()
    assert checkpoints.problem(1) == "model.safetensors is missing"
    (folder / STATE / MANIFEST).write_text('{"files": {"model')
    assert checkpoints.problem(1) == "its training_state/manifest.json is not readable"


def test_cutting_back_removes_later_ones(tmp_path: Path) -> None:
    run_through(tmp_path, CheckpointConfig(every=2, keep=9), {})
    Checkpoints(tmp_path).cut_back(4)
    assert Checkpoints(tmp_path).steps() == [2, 4]
    Checkpoints(tmp_path).cut_back(-1)
    assert Checkpoints(tmp_path).steps() == []
    Checkpoints(tmp_path / "nothing").cut_back(-1)
