"""What is refused before a model is loaded, and who gets a run's folder."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.compose import load
from rlhf.errors import UserError
from rlhf.preflight import check_length, check_ranks, claim_run_folder, run_folder
from trainer.parallel.world import World

DAPO = "dapo/tiny"


def test_runs_without_a_name_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(DAPO)
    assert run_folder(config, DAPO) == Path("runs/dapo-tiny")
    assert run_folder(config, "./my/own.yaml") == Path("runs/own")
    for name in ("dapo-tiny", "dapo-tiny-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    assert run_folder(config, DAPO) == Path("runs/dapo-tiny-3")


def test_two_runs_that_start_together_get_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(DAPO)
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: claim_run_folder(config, DAPO), range(24)))
    assert len(set(folders)) == 24
    assert Path("runs/dapo-tiny") in folders


def test_a_folder_that_another_run_took_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_folder` saw it free, and then the other run was quicker."""
    taken = [tmp_path / "a", tmp_path / "a", tmp_path / "b"]
    claim_run_folder(load(DAPO, [f"run.dir={taken[0]}"]), DAPO)
    monkeypatch.setattr("rlhf.preflight.run_folder", lambda config, recipe: taken.pop(0))
    assert claim_run_folder(load(DAPO), DAPO) == tmp_path / "b"


def test_a_named_folder_is_claimed_once(tmp_path: Path) -> None:
    config = load(DAPO, [f"run.dir={tmp_path / 'mine'}"])
    assert claim_run_folder(config, DAPO) == tmp_path / "mine"
    with pytest.raises(UserError, match="already holds a run"):
        claim_run_folder(config, DAPO)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run.dir=.*/file cannot be created \(File exists\)"):
        claim_run_folder(load(DAPO, [f"run.dir={tmp_path / 'file'}"]), DAPO)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("nested", [False, True])
def test_a_run_longer_than_the_model_is_refused(nested: bool, tmp_path: Path) -> None:
    sizes = {"max_position_embeddings": 200}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes} if nested else sizes))
    check_length(load(DAPO, ["data.max_prompt_tokens=192"]), tmp_path)
    for override, key in [
        ("rollout.max_new_tokens=73", "rollout.max_new_tokens=73"),
        ("evaluation.max_new_tokens=73", "evaluation.max_new_tokens=73"),
    ]:
        with pytest.raises(UserError) as caught:
            check_length(load(DAPO, [override]), tmp_path)
        assert str(caught.value) == (
            f"data.max_prompt_tokens=128 + {key} = 201 tokens are more than model.path=tiny-llama has "
            f"positions (max_position_embeddings=200): lower one of them."
        )


def test_a_model_that_names_no_positions_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    check_length(load(DAPO, ["rollout.max_new_tokens=5000", "learner.token_budget=9000"]), tmp_path)


# ---------------------------------------------------------------- dry run


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "model.path=./nowhere",
            "model.path=./nowhere is neither a folder, a hub id (owner/name), RUN@STEP nor",
        ),
        ("model.path=./empty", "model.path=./empty holds no model: name a Hugging Face folder or a PEFT"),
        ("model.path=other@3", "model.path=other@3 names no run: there is neither other nor runs/other."),
        (
            "model.path=mine@3",
            "model.path=mine@3 is not saved in runs/mine/checkpoints: whole checkpoints are ",
        ),
        ("model.path=./half", "model.path=./half lacks model.safetensors"),
        ("model.path=./adapter", "model.path=./adapter has no config.json in"),
        ("model.adapter=./nowhere", "model.adapter=./nowhere is neither a folder, a hub id"),
        ("model.adapter=./half", "model.adapter=./half has no adapter_config.json in"),
        ("model.adapter=mine@last", "model.adapter=mine@last is not saved in"),
        ("model.chat_template=./own.jinja", "model.chat_template=./own.jinja is neither a file nor a Jinja"),
    ],
)
def test_dry_run_finds_what_is_missing_here(
    override: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "base", "half", "adapter", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "half" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "./base"}')
    assert main(["train", DAPO, "--dry-run", override]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"rlhf: {sentence}"), said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_dry_run_measures_a_model_that_lies_here(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = ["rollout.max_new_tokens=5000", "learner.token_budget=9000"]
    assert main(["train", DAPO, "--dry-run", f"model.path={tiny_llama}", *long]) == 2
    assert "max_position_embeddings=1024" in capsys.readouterr().err
    assert main(["train", DAPO, "--dry-run", f"model.path={tiny_llama}"]) == 0


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.process=inprocess"], "rollout.process=inprocess would put vLLM among the 4 ranks"),
        (
            ["rollout.process=child", "learner.optimizer.name=muon"],
            "learner.optimizer.name=muon looks at whole matrices, which learner.parallel.shard=4 and "
            "tensor=1 cut in slices: choose another, or set both to 1 and learner.parallel.replicate=4.",
        ),
        (
            ["rollout.process=child", "learner.parallel.tensor=2", "learner.lora.rank=4"],
            "learner.parallel.tensor=2 does not split adapters: set learner.parallel.tensor=1.",
        ),
        (
            ["rollout.process=child", "learner.parallel.shard=3"],
            "learner.parallel.replicate=1 x learner.parallel.shard=3 = 3 ranks, but there are 4: start 3 ",
        ),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_ranks(load(DAPO, overrides), World(rank=0, size=4))
    assert str(caught.value).startswith(said)


def test_what_fits_the_ranks() -> None:
    check_ranks(load(DAPO), World())
    check_ranks(load(DAPO, ["rollout.process=child"]), World(rank=3, size=4))
    copies = ["learner.parallel.shard=1", "learner.parallel.replicate=4", "learner.optimizer.name=muon"]
    check_ranks(load(DAPO, ["rollout.process=child", *copies]), World(rank=0, size=4))


def test_a_dry_run_counts_the_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", DAPO, "--dry-run", "learner.parallel.shard=2"]) == 2
    assert "= 2 ranks, but there are 1: start 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", DAPO, "--dry-run", "rollout.process=child", "learner.parallel.shard=2"]) == 0
    assert "can run" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == "", "rank 0 prints it"


def test_a_dry_run_counts_the_ranks_that_ray_would_start(capsys: pytest.CaptureFixture[str]) -> None:
    on_ray = ["learner.parallel.launcher=ray", "learner.parallel.shard=2"]
    assert main(["train", DAPO, "--dry-run", *on_ray]) == 2
    assert "rollout.process=inprocess would put vLLM among the 2 ranks" in capsys.readouterr().err
    assert main(["train", DAPO, "--dry-run", *on_ray, "rollout.process=child"]) == 0
    assert "can run" in capsys.readouterr().out
