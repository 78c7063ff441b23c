"""`model.init_from`: exactly another run's trained weights, and nothing where the two do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import initial_weights, models, pipeline, state_file
from rlhf.checkpoint import STATE, Checkpoints
from rlhf.cli import main
from rlhf.compose import load, to_yaml
from rlhf.config import Config
from rlhf.errors import UserError
from trainer.learner import Learner

FULL = ["learner.dtype=bfloat16", "learner.freeze=['*embed_tokens*']"]
LORA = ["learner.lora.rank=4", "learner.lora.alpha=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full` and `lora`: run folders whose learners moved at random and were saved after step 7."""
    place = tmp_path_factory.mktemp("runs")
    made(place / "full", FULL)
    made(place / "lora", LORA)
    return place


def made(folder: Path, overrides: list[str]) -> None:
    config = load("dapo/tiny", overrides)
    learner = built(config)
    torch.manual_seed(0)
    for parameter in learner.master.parameters:
        parameter.data.add_(1e-3 * torch.randn_like(parameter))
    learner.master.install()

    def save(target: Path) -> None:
        learner.save(target, models.load_tokenizer(models.resolve(config.model), config.model))
        state_file.write(target / STATE, {"learner": learner.state_dict()})

    Checkpoints(folder).write(7, save, {})
    (folder / "config.yaml").write_text("# @package _global_\n" + to_yaml(config))


def built(config: Config) -> Learner:
    resolved = initial_weights.attach(models.resolve(config.model), config)
    return pipeline.build_learner(config, resolved, Path())


def saved(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = state_file.read(folder / "checkpoints/step-7" / STATE)["learner"][
        "weights"
    ]
    return weights


def asking(place: Path, run: str, *overrides: str) -> Config:
    return load("dapo/tiny", [f"model.init_from={place / run}@7", *overrides])


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        built(config)
    return str(caught.value)


# ---------------------------------------------------------------- what comes over


def test_the_master_weights_come_over_and_what_was_frozen_as_it_was_computed_with(place: Path) -> None:
    learner = built(asking(place, "full", "algorithm.kl.coefficient=0.1"))
    masters, ours = saved(place / "full"), learner.master.state_dict()
    (frozen,) = set(ours) - set(masters)
    assert frozen == "model.model.embed_tokens.weight"
    assert all(torch.equal(ours[name], masters[name]) for name in masters)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values()), "not rounded"
    base = built(load("dapo/tiny")).master.state_dict()[frozen]
    assert torch.equal(ours[frozen], base.bfloat16().float())
    assert (learner.rollout_step, learner.optimizer_steps) == (0, 0)
    assert learner.state_dict()["optimizer"]["0"]["state"] == {}
    reference = learner._reference
    assert reference is not None, "the reference begins where the run does"
    assert all(torch.equal(value, ours[name]) for name, value in reference.named_parameters())


def test_an_adapter_goes_on_in_full_precision(place: Path) -> None:
    ours, masters = built(asking(place, "lora", *LORA)).master.state_dict(), saved(place / "lora")
    assert ours.keys() == masters.keys()
    assert all(torch.equal(ours[name], masters[name]) for name in masters)
    fresh = built(load("dapo/tiny", LORA)).master.state_dict()
    assert all(not torch.equal(fresh[name], masters[name]) for name in masters)


def test_the_record_says_where_the_weights_came_from(place: Path, tmp_path: Path) -> None:
    config = asking(place, "full")
    resolved = initial_weights.attach(models.resolve(config.model), config)
    checkpoint = (place / "full/checkpoints/step-7").resolve()
    assert resolved.description.endswith(f", trained weights of {place / 'full'}@7 ({checkpoint})")
    initial_weights.write(resolved.initial, tmp_path)
    record = json.loads((tmp_path / initial_weights.RECORD).read_text())
    assert resolved.initial is not None
    assert record == {
        "init_from": f"{place / 'full'}@7",
        "checkpoint": str(checkpoint),
        "manifest": resolved.initial.digest,
        "trained": "model",
        "precision": "float32",
    }
    initial_weights.agree(resolved.initial, tmp_path)
    (tmp_path / initial_weights.RECORD).write_text(json.dumps({**record, "manifest": "another"}))
    with pytest.raises(UserError, match=r"is not the checkpoint that .* began with, it was written anew"):
        initial_weights.agree(resolved.initial, tmp_path)


# ---------------------------------------------------------------- what is refused


def test_a_run_or_step_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(load("dapo/tiny", ["model.init_from=none@7"])) == (
        "model.init_from=none@7 names no run: there is neither none nor runs/none."
    )
    assert main(["train", "dapo/tiny", "--dry-run", f"model.init_from={place}/full@8"]) == 2
    assert capsys.readouterr().err == (
        f"rlhf: model.init_from={place}/full@8: the checkpoint {place}/full/checkpoints/step-8 cannot be "
        f"used, it does not exist: whole checkpoints are 7.\n"
    )
    with pytest.raises(UserError, match=r"model\.init_from=full@last names no step of a run: write RUN@STEP"):
        load("dapo/tiny", ["model.init_from=full@last"])


def test_a_damaged_checkpoint(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "full", tmp_path / "full")
    tensors = tmp_path / "full/checkpoints/step-7" / STATE / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refusal(asking(tmp_path, "full")) == (
        f"model.init_from={tmp_path}/full@7: the checkpoint {tmp_path}/full/checkpoints/step-7 cannot be "
        f"used, training_state/tensors.safetensors does not have the checksum that it was written with: "
        f"whole checkpoints are none."
    )


@pytest.mark.parametrize(
    ("run", "overrides", "end"),
    [
        ("full", ["model.path=tiny-qwen"], "does not fit model.path=tiny-qwen: lm_head.weight is only in "
         "the model: name a checkpoint of the same model."),
        ("full", LORA, "trained the whole model but learner.lora.rank=4 trains an adapter: set "
         "model.path=RUN for a fresh adapter on that model."),
        ("lora", [], "trained an adapter but learner.lora.rank=0 trains the whole model: set "
         "model.path=RUN to begin with the merged model."),
        ("lora", ["learner.lora.rank=8", "learner.lora.alpha=8"], "learner.lora.rank=8 is not that of "
         "model.init_from=RUN: set learner.lora.rank=4."),
        ("lora", ["learner.lora.rank=4"], "learner.lora.alpha=32 is not that of model.init_from=RUN: set "
         "learner.lora.alpha=8."),
        ("lora", [*LORA, "model.path=tiny-qwen"], "model.path=tiny-qwen is not the model that the adapter of "
         "model.init_from=RUN was trained on: set model.path=tiny-llama."),
    ],
)  # fmt: skip
def test_runs_that_do_not_fit(run: str, overrides: list[str], end: str, place: Path) -> None:
    name = f"{place / run}@7"
    said = refusal(asking(place, run, *overrides))
    assert said.removeprefix(f"model.init_from={name} ") == end.replace("RUN", name)


def test_an_adapter_of_other_layers(place: Path) -> None:
    said = refusal(asking(place, "lora", *LORA, "learner.lora.targets=[q_proj]"))
    assert said.startswith(f"model.init_from={place / 'lora'}@7 does not fit the adapter of learner.lora: ")
    assert said.endswith("is only in the checkpoint: name a checkpoint of the same model.")


def test_two_beginnings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = place / "lora/checkpoints/step-7/adapter"
    with pytest.raises(UserError, match="both say where the adapter begins: leave one of them out"):
        asking(place, "lora", f"model.adapter={adapter}")
    with pytest.raises(UserError, match=r"both bring an adapter: name the base model as model\.path"):
        built(with_path(asking(place, "full"), str(adapter)))


def with_path(config: Config, path: str) -> Config:
    config.model.path = path
    return config


def test_evaluation_has_no_beginning(place: Path) -> None:
    with pytest.raises(UserError, match=r"to evaluate that checkpoint set model\.path="):
        pipeline.evaluate_config(asking(place, "full"))


def test_first_difference() -> None:
    ours: dict[str, Any] = {"a": (2, 3), "b": (4,)}
    assert initial_weights.first_difference(ours, dict(ours)) == ""
    assert initial_weights.first_difference(ours, {"a": (2, 3)}) == "b is only in the model"
    assert initial_weights.first_difference(ours, {**ours, "b": (5,)}) == "b is [4], in the checkpoint [5]"
