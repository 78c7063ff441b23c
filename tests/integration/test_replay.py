"""A recorded step learned again: bit for bit as it was, and otherwise where something is changed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf
from rlhf import models, state_file
from rlhf.checkpoint import STATE
from rlhf.cli import main
from rlhf.errors import RunStoppedError, UserError
from rlhf.replay import replay
from rlhf.replay_result import compare
from rlhf.tracking.jsonl import read
from rollout import recorder
from trainer.learner import Learner, NonFiniteError

RUN = "dapo-tiny"
OVERRIDES = {
    "loop.steps": 3,
    "learner.dtype": "bfloat16",
    "rollout.dtype": "bfloat16",
    "learner.freeze": ["*embed_tokens*"],
    "algorithm.kl.coefficient": 0.1,
    "algorithm.dynamic_sampling.oversample": 2,
    "algorithm.dynamic_sampling.surplus": "carry",
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "evaluation.every": 0,
    "evaluation.at_end": False,
}
"""Rounded weights, frozen ones, a reference, and groups that are carried over."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the run `runs/dapo-tiny`."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("replay")
    os.chdir(folder)
    rlhf.train("dapo/tiny", OVERRIDES)
    yield folder / "runs" / "dapo-tiny"
    os.chdir(before)


@pytest.mark.parametrize("step", [1, 3])
def test_a_step_gives_the_same_update_bit_for_bit(
    step: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = sorted(path for path in place.rglob("*"))
    assert main(["replay", f"dapo-tiny@{step}"]) == 0
    said = capsys.readouterr().out.splitlines()
    kept = [group for group in recorder.read(place / "rollouts", step) if group.verdict == "kept"]
    responses = sum(len(group.trajectories) for group in kept)
    assert said[0] == f"dapo-tiny@{step} learned again: {len(kept)} groups, {responses} responses"
    assert "weights: all 19 tensors are the saved ones, bit for bit" in said
    assert "optimizer: all 57 tensors are the saved ones, bit for bit" in said
    assert said[-1] == "The same update, bit for bit."
    assert sorted(path for path in place.rglob("*")) == written


def test_another_clip_and_estimator_give_another_update(place: Path) -> None:
    found = replay(f"{RUN}@2", ["algorithm.advantage.estimator=group_mean", "learner.optimizer.lr=0.002"])
    assert found.status == 0
    assert found.changes == [
        "algorithm.advantage.estimator=group_mean (was group_mean_std)",
        "learner.optimizer.lr=0.002 (was 0.001)",
    ]
    assert found.metrics["learner/lr"] == 2 * found.recorded["learner/lr"]
    assert {"learner/grad_norm", "weights", "optimizer"} <= set(found.different)
    assert found.recorded_update is not None
    assert 1.5 < found.update.distance / found.recorded_update.distance < 2.5
    text = found.text()
    assert "changed: learner.optimizer.lr=0.002 (was 0.001)" in text
    assert text.endswith(f"Another update: {len(found.different)} of the numbers above differ.")


def test_an_override_that_changes_nothing_is_none(place: Path) -> None:
    found = replay(f"{RUN}@2", ["learner.optimizer.lr=0.001"])
    assert (found.changes, found.different) == ([], [])


def test_other_rollouts_are_not_the_same_update(place: Path, tmp_path: Path) -> None:
    path = place / "rollouts" / "step_000002.parquet"
    whole = path.read_bytes()
    groups = recorder.read(place / "rollouts", 2)
    groups[0].trajectories[0].reward += 1.0
    recorder.Recorder(place / "rollouts").write(2, groups)
    try:
        found = replay(f"{RUN}@2")
        assert found.status == 1
        assert found.text().splitlines()[-1].startswith("NOT the same update: learner/grad_norm, ")
        path.write_bytes(whole[:100])
        with pytest.raises(UserError, match=r"the rollouts of that step in .* are damaged"):
            replay(f"{RUN}@2")
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([RUN], f"rlhf replay {RUN} names no step of a run: write RUN@STEP, for example runs/demo@40."),
        (["none@1"], "rlhf replay none@1 names no run: there is neither none nor runs/none."),
        (["runs@1"], "rlhf replay runs@1: runs holds no run: name a run's folder."),
        ([f"{RUN}@4"], f"rlhf replay {RUN}@4: runs/{RUN}/rollouts has no rollouts of that step, only 1 to "
         "3."),
        ([f"{RUN}@2", "data.heldout=2"], "data.heldout=2 cannot be replayed: learning from recorded rollouts "
         "does not depend on it: leave it out."),
        ([f"{RUN}@2", "algorithm.overlong.buffer=3"], "algorithm.overlong.buffer=3 cannot be replayed: it "
         "shaped the recorded rollouts and their rewards: leave it out."),
        ([f"{RUN}@2", "algorithm.kl.place=reward"], "algorithm.kl.place=reward cannot be replayed: it "
         "shaped the recorded rollouts and their rewards: leave it out."),
        ([f"{RUN}@2", "learner.freeze=[]"], "learner.freeze=[] cannot be replayed: the recorded update is "
         "one of other tensors: leave it out."),
        ([f"{RUN}@2", "learner.optimizer.name=sgd"], "learner.optimizer.name=sgd cannot be replayed: the "
         "optimizer's state after step 1 was made with another: leave it out."),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed_is_one_sentence(
    arguments: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *arguments]) == 2
    assert capsys.readouterr().err == f"rlhf: {sentence}\n"


def test_a_beginning_that_is_not_saved_is_named(place: Path) -> None:
    tensors = place / "checkpoints" / "step-1" / STATE / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    try:
        with pytest.raises(UserError) as caught:
            replay(f"{RUN}@2")
        found = replay(f"{RUN}@1")
    finally:
        tensors.write_bytes(whole)
    assert str(caught.value) == (
        "rlhf replay dapo-tiny@2: it begins with the checkpoint runs/dapo-tiny/checkpoints/step-1, which "
        "cannot be used, training_state/tensors.safetensors does not have the checksum that it was written "
        "with: steps whose beginning is saved are 1, 3."
    )
    assert (found.status, dict(found.saved)) == (0, {})
    assert "runs/dapo-tiny/checkpoints/step-1 is not compared with: training_state/" in found.text()


def test_a_step_that_the_run_failed_in_fails_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Learner, batches: object) -> None:
        raise NonFiniteError("The loss is nan")

    monkeypatch.setattr(Learner, "update", failing)
    with pytest.raises(RunStoppedError, match="dapo-tiny@2 stops when it is learned again: The loss is nan"):
        replay(f"{RUN}@2")


def test_a_run_begins_anew_from_the_weights_of_another(place: Path) -> None:
    changes = {"run.name": "second", "model.init_from": f"{RUN}@2", "loop.steps": 1}
    second = rlhf.train("dapo/tiny", {**OVERRIDES, **changes}).folder
    first_row = read(second / "metrics.jsonl")[1]
    assert (first_row["step"], first_row["learner/optimizer_steps"]) == (1, 2)
    assert (
        f"# model: tiny-llama (random weights, {models.cache_folder()}"
        in (second / "config.yaml").read_text()
    )
    assert (
        f", trained weights of {RUN}@2 ({place / 'checkpoints' / 'step-2'})"
        in (second / "config.yaml").read_text()
    )
    assert (second / "initial_weights.json").is_file()
    found = replay("second@1")
    assert (found.status, found.different) == (0, [])
    begun = state_file.read(place / "checkpoints" / "step-2" / STATE)["learner"]["weights"]
    ended = state_file.read(second / "checkpoints" / "step-1" / STATE)["learner"]["weights"]
    assert compare(ended, begun).distance == found.update.distance


def test_without_a_row_and_a_checkpoint_nothing_is_proven(place: Path) -> None:
    metrics, saved = place / "metrics.jsonl", place / "checkpoints" / "step-3"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:3]))
    saved.rename(place / "aside")
    try:
        found = replay(f"{RUN}@3")
    finally:
        (place / "aside").rename(saved)
        metrics.write_text(whole)
    assert found.status == 1
    assert found.text().endswith("recorded nothing of this step's update: there is nothing to compare with.")
    assert math.isfinite(found.update.distance)
