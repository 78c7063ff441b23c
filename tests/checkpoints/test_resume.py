"""Where a run goes on, what is refused, and what is cut back; with made-up run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf import resume
from rlhf.checkpoint import STATE, CheckpointConfig, Checkpoints
from rlhf.cli import main
from rlhf.compose import load, to_yaml
from rlhf.config import Config
from rlhf.errors import UserError
from rlhf.preflight import claim_run_folder, run_folder
from rlhf.resume import FolderLock, Start, find
from rollout import recorder
from rollout.recorder import Recorder
from tests.checkpoints.test_checkpoint import saving
from tests.report import runs
from tests.tracking.samples import group

DAPO = "dapo/tiny"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`runs/mine` with checkpoints of steps 2, 4 and 6."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("# @package _global_\n" + to_yaml(load(DAPO, ["run.name=mine"])))
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=9))
    for step in (2, 4, 6):
        checkpoints.write(step, saving(str(step)), {})
    return folder


def asking(*overrides: str) -> Config:
    return load(DAPO, ["run.dir=runs/mine", *overrides])


def damage(folder: Path, step: int) -> None:
    (folder / "checkpoints" / f"step-{step}" / STATE / "state.json").write_text("?")


def test_auto_takes_the_newest(folder: Path) -> None:
    start = Start(step=6, state=folder / "checkpoints" / "step-6" / STATE)
    assert find(asking("resume=auto"), folder) == start
    assert find(asking("resume=4"), folder) == Start(step=4, state=folder / "checkpoints/step-4" / STATE)
    assert find(asking(), folder) is None


def test_auto_passes_over_damaged_ones_by_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(folder, 6)
    found = find(asking("resume=auto"), folder)
    assert found is not None
    assert found.step == 4
    assert caplog.messages == [
        "The checkpoint runs/mine/checkpoints/step-6 is damaged (training_state/state.json does not have the "
        "checksum that it was written with): step 4 is tried next."
    ]
    damage(folder, 4)
    damage(folder, 2)
    with pytest.raises(UserError) as caught:
        find(asking("resume=auto"), folder)
    assert str(caught.value) == (
        "resume=auto: no checkpoint in runs/mine/checkpoints is whole: start a new run in another run.dir."
    )


def test_a_damaged_one_that_was_asked_for_is_refused_and_the_one_before_offered(folder: Path) -> None:
    damage(folder, 6)
    damage(folder, 4)
    for step in (6, 5, 4):
        with pytest.raises(UserError) as caught:
            find(asking(f"resume={step}"), folder)
        assert str(caught.value).startswith(
            f"resume={step}: the checkpoint runs/mine/checkpoints/step-{step} cannot be used, "
        )
        assert str(caught.value).endswith(": the one before it is whole, set resume=2.")
    damage(folder, 2)
    with pytest.raises(UserError, match=r"no whole one is before it, start a new run in another run\.dir\."):
        find(asking("resume=2"), folder)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("learner.optimizer.lr=0.5", "learner.optimizer.lr=0.5 is not 0.001, with which runs/mine was begun"),
        ("run.seed=1", "run.seed=1 is not 0, with which runs/mine was begun"),
        ("data.heldout=2", "data.heldout=2 is not 4, with which runs/mine was begun"),
        ("rollout.eager=false", "rollout.eager=false is not true, with which runs/mine was begun"),
        (
            "model.chat_template_args={thinking: false}",
            "model.chat_template_args.thinking=false is not (not set), with which runs/mine was begun",
        ),
    ],
)
def test_another_configuration_is_one_sentence(
    override: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", DAPO, "--dry-run", "run.dir=runs/mine", "resume=auto", override]
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"rlhf: resume=auto: {sentence}: set it back, or start a new run in another run.dir.\n"
    )


def test_some_keys_may_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["loop.steps=50", "checkpoint.every=5", "evaluation.every=3", "tracking.completions_every=0"]
    changes += ["learner.on_nonfinite=skip", "learner.token_budget=8192", "run.watchdog_minutes=0"]
    assert main(["train", DAPO, "--dry-run", "run.dir=runs/mine", "resume=auto", *changes]) == 0
    assert "dapo/tiny can run; it would go on in runs/mine after step 6." in capsys.readouterr().out


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_anew(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Checkpoints(folder).cut_back(-1)
    assert find(asking("resume=auto"), folder) == Start(step=-1, state=None)
    assert "ended before its first checkpoint" in caplog.text
    with pytest.raises(UserError, match="no whole one is before it"):
        find(asking("resume=2"), folder)
    (folder / "config.yaml").write_text("")  # ended while it was loading
    assert find(asking("resume=auto"), folder) is None


def test_which_folder_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    auto = load(DAPO, ["resume=auto"])
    assert run_folder(auto, DAPO) == Path("runs/dapo-tiny")
    for name in ("dapo-tiny", "dapo-tiny-2"):
        claim_run_folder(load(DAPO), DAPO)
        assert run_folder(auto, DAPO) == Path("runs") / name
    assert claim_run_folder(auto, DAPO) == Path("runs/dapo-tiny-2")
    assert run_folder(load(DAPO, ["resume=auto", "run.name=other"]), DAPO) == Path("runs/other")
    with pytest.raises(UserError, match=r"resume=4: runs/other holds no run: name the run's folder"):
        run_folder(load(DAPO, ["resume=4", "run.name=other"]), DAPO)


def test_a_folder_has_one_living_run(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(UserError, match="is in use by a run that still lives"):
        FolderLock(tmp_path)
    lock.close()
    lock.close()
    FolderLock(tmp_path).close()


def test_records_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    folder = runs.make(tmp_path / "run", 6, every=2)
    rollouts = Recorder(folder / "rollouts")
    for step in range(1, 7):
        rollouts.write(step, [group(step, {"2": 1.0})])
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 7, "tr')
    (folder / "completions.jsonl").write_text(json.dumps({"step": 3}) + "\n" + json.dumps({"step": 5}) + "\n")
    (folder / ".weights-x").touch()
    resume.cut_back(folder, 4)
    assert (folder / "metrics.jsonl").read_text() == "".join(lines[:5])
    assert (folder / "completions.jsonl").read_text() == json.dumps({"step": 3}) + "\n"
    assert recorder.steps(folder / "rollouts") == [1, 2, 3, 4]
    assert sorted(path.name for path in (folder / "evaluations").iterdir()) == [
        f"step-{step}.{kind}" for step in (0, 2, 4) for kind in ("json", "jsonl")
    ]
    assert not list(folder.glob(".*"))
    resume.cut_back(folder, -1)
    assert (folder / "metrics.jsonl").read_text() == ""
    assert recorder.steps(folder / "rollouts") == []
