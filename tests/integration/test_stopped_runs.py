"""Runs that end before their last step: what is said, what stays on disk, what is released."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rlhf
from rlhf import loop, pipeline
from rlhf.checkpoint import Checkpoints
from rlhf.cli import main
from rlhf.compose import load
from rlhf.errors import InterruptedRunError, RunStoppedError, UserError
from rlhf.placement import placement_of
from rlhf.run import Run
from rlhf.tracking.jsonl import read
from rollout import recorder
from rollout.errors import EngineDied
from trainer.errors import NonFiniteError
from trainer.learner import Learner

TINY = "dapo/tiny"
FOLDER = Path("runs/dapo-tiny")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def fails(error: BaseException) -> Any:
    """A callable that raises `error`."""

    def raising(*arguments: Any, **options: Any) -> Any:
        raise error

    return raising


def odd_lengths(prompts: Any, responses: list[str], answers: Any, rows: Any) -> list[float]:
    """A reward that disagrees within most groups."""
    return [float(len(response) % 2) for response in responses]


# ---------------------------------------------------------------- while it trains


def test_what_learning_failed_on_is_recorded_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "update", fails(NonFiniteError("The loss is nan")))
    with pytest.raises(RunStoppedError, match="the run stopped in step 1: The loss is nan"):
        rlhf.train(TINY, {"loop.steps": 2}, reward=odd_lengths)
    groups = recorder.read(FOLDER / "rollouts", 1)
    kept = [group for group in groups if group.verdict == "kept"]
    assert kept
    assert all(any(t.advantage for t in group.trajectories) for group in kept)
    assert "# " in (FOLDER / "report.md").read_text()


def test_an_interrupted_run_says_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "update", fails(KeyboardInterrupt()))
    with pytest.raises(InterruptedRunError) as caught:
        rlhf.train(TINY, {"loop.steps": 2})
    assert str(caught.value) == (
        f"interrupted in step 1: the same command with run.dir={FOLDER} resume=auto goes on from the "
        f"beginning, nothing is saved yet."
    )
    assert caught.value.status == 130
    assert (FOLDER / "report.md").is_file()


def test_a_second_signal_stops_at_once_and_the_last_checkpoint_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update, handler = Learner.update, signal.getsignal(signal.SIGTERM)

    def impatient(self: Learner, batches: Any) -> Any:
        if self.rollout_step == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return update(self, batches)

    monkeypatch.setattr(Learner, "update", impatient)
    assert main(["train", TINY, "loop.steps=3", "checkpoint.every=1"]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"rlhf: interrupted in step 2: the same command with run.dir={FOLDER} resume=auto goes on after "
        f"step 1."
    )
    assert Checkpoints(FOLDER).problem(1) == ""
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.setattr(Learner, "update", update)
    assert rlhf.train(TINY, {"loop.steps": 2, "checkpoint.every": 1, "resume": "auto"}).steps == 2


def test_a_finished_run_is_resumed_to_the_same_summary_and_to_more_steps(capsys: Any) -> None:
    overrides = {"loop.steps": 1, "evaluation.every": 0}
    first = rlhf.train(TINY, overrides)
    rows = read(FOLDER / "metrics.jsonl")
    assert rlhf.train(TINY, {**overrides, "resume": "auto"}) == first
    assert read(FOLDER / "metrics.jsonl") == rows
    more = rlhf.train(TINY, {**overrides, "resume": 1, "loop.steps": 2})
    assert (more.folder, more.steps, more.first_accuracy) == (FOLDER, 2, first.first_accuracy)
    assert [row["step"] for row in read(FOLDER / "metrics.jsonl")] == [0, 1, 2]
    assert [row["weights/version"] for row in read(FOLDER / "metrics.jsonl")] == [1, 2, 3]


def test_a_damaged_checkpoint_is_passed_over_and_made_again(caplog: pytest.LogCaptureFixture) -> None:
    overrides = {"loop.steps": 2, "checkpoint.every": 1, "evaluation.every": 0}
    first = rlhf.train(TINY, overrides)
    saved = Checkpoints(FOLDER)
    tensors = saved.path(2) / "training_state" / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"cannot be used, .* the one before it is whole, set resume=1"):
        rlhf.train(TINY, {**overrides, "resume": 2})
    with pytest.raises(UserError, match=r"learner\.optimizer\.lr=0\.5 is not 0\.001, with which"):
        rlhf.train(TINY, {**overrides, "resume": "auto", "learner.optimizer.lr": 0.5})
    assert [row["step"] for row in read(FOLDER / "metrics.jsonl")] == [0, 1, 2], "a refusal cuts nothing"
    again = rlhf.train(TINY, {**overrides, "resume": "auto"})
    assert "step-2 is damaged (training_state/tensors.safetensors does not have the checksum" in caplog.text
    assert (again.steps, again.last_accuracy) == (2, first.last_accuracy)
    assert tensors.read_bytes() == whole
    assert (saved.steps(), saved.problem(2)) == ([1, 2], "")


def test_a_run_ends_when_its_data_end(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(4)]
    overrides = {"loop.steps": 50, "data.epochs": 1, "data.heldout": 1, "evaluation.every": 0}
    summary = rlhf.train(TINY, overrides, dataset=rows)
    assert summary.steps <= 4
    assert caplog.text.count("The training data ran out (data.epochs=1): the run ends.") == 1
    logged = read(FOLDER / "metrics.jsonl")
    assert logged[-1]["selection/kept"] == 0
    assert "eval/accuracy" in logged[-1]
    assert (FOLDER / "checkpoints" / f"step-{summary.steps}").is_dir()
    assert (FOLDER / "report.md").is_file()


# ---------------------------------------------------------------- while it loads


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (EngineDied("its process ended by SIGKILL."), "its process ended by SIGKILL."),
        (RuntimeError("odd"), "an engine could not be loaded: RuntimeError: odd."),
    ],
)
def test_an_engine_that_does_not_load_is_one_sentence(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "build_engines", fails(error))
    for overrides in ({}, {"rollout.process": "child"}):
        with pytest.raises(RunStoppedError) as caught:
            rlhf.train(TINY, overrides)
        assert str(caught.value) == f"the run could not start: {said}"
    assert not (FOLDER / "config.yaml").exists(), "the folder may be asked for again"
    with pytest.raises(RunStoppedError) as caught:
        pipeline.evaluate_config(load(TINY))
    assert str(caught.value) == f"the evaluation stopped: {said}"


@pytest.mark.parametrize("process", ["inprocess", "child"])
def test_engines_are_closed_when_the_learner_does_not_load(
    process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    engine = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(pipeline, "build_engines", lambda *arguments, **options: [engine])
    monkeypatch.setattr(
        pipeline, "build_learner", fails(ValueError("learner.freeze pattern x matches nothing."))
    )
    with pytest.raises(UserError, match="matches nothing"):
        rlhf.train(TINY, {"rollout.process": process})
    assert closed == [True]


def test_everything_is_closed_when_the_run_cannot_be_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(pipeline, "Run", fails(ValueError("no run")))
    monkeypatch.setattr(pipeline.LocalPool, "close", lambda self: closed.append("pool"))
    monkeypatch.setattr(pipeline, "_learner_and_engines", lambda *arguments: (SimpleNamespace(), [object()]))
    monkeypatch.setattr(
        pipeline, "_publisher", lambda *arguments: SimpleNamespace(close=lambda: closed.append("publisher"))
    )
    monkeypatch.setattr(pipeline, "_announce", lambda *arguments: None)
    with pytest.raises(UserError, match="no run"):
        rlhf.train(TINY)
    assert closed == ["publisher", "pool"]
    assert not (FOLDER / "config.yaml").exists()


def test_evaluation_releases_all_when_answering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    engine = SimpleNamespace(close=lambda: closed.append("engine"), generate=fails(EngineDied("gone")))
    monkeypatch.setattr(pipeline, "build_engines", lambda *arguments, **options: [engine])
    monkeypatch.setattr(pipeline.Scorer, "close", lambda self: closed.append("scorer"))
    with pytest.raises(RunStoppedError, match="the evaluation stopped: gone"):
        pipeline.evaluate_config(load(TINY))
    assert closed == ["engine", "scorer"]


@pytest.mark.parametrize("overrides", [["rollout.max_new_tokens=950"], ["evaluation.max_new_tokens=950"]])
def test_sequences_beyond_the_model_are_refused_before_loading(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "build_engines", fails(AssertionError("too late")))
    config = load(TINY, [*overrides, "learner.token_budget=4096"])
    with pytest.raises(UserError, match="max_position_embeddings=1024"):
        pipeline.train_config(config, TINY)
    with pytest.raises(UserError, match="max_position_embeddings=1024"):
        pipeline.evaluate_config(config)
    assert not Path("runs").exists()


def test_an_engine_in_this_process_is_refused_where_weights_travel_by_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pipeline.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"set rollout\.process=child"):
        placement_of(load(TINY).rollout)
    assert placement_of(load(TINY).rollout, learner=False).engines == ((0,),)
    assert placement_of(load(TINY, ["rollout.process=child"]).rollout).engines == ((1,),)


# ---------------------------------------------------------------- what is said


def test_shortages_are_said_once_and_then_counted() -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(shortages=0, step=0, say=said.append)
    for step in range(25):
        run.step = step
        Run.say_shortage(run, f"Only {step} of 40 groups were found.", last=False)
    Run.say_shortage(run, "The run stops.", last=True)
    assert said == [
        "Only 0 of 40 groups were found.",
        "10 of 10 steps were short of groups, the last: Only 9 of 40 groups were found.",
        "20 of 20 steps were short of groups, the last: Only 19 of 40 groups were found.",
        "The run stops.",
    ]


def test_the_summary_says_what_was_evaluated() -> None:
    summary = loop.Summary(
        folder=Path("runs/x"),
        steps=3,
        metrics={},
        first_accuracy=0.1,
        last_accuracy=0.25,
        evaluated="validation",
    )
    assert summary.text().startswith("3 steps: validation accuracy 10.0% -> 25.0%\n")
