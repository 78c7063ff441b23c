"""A PEFT adapter from the command line: what is evaluated, and what is said of it while it is trained."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from rlhf import loop, pipeline
from rlhf.compose import load
from rlhf.errors import RunStoppedError
from rlhf.placement import placement_of
from rollout.errors import EngineDied
from rollout.host import LocalHost
from tests.adapters.test_lora import lora_learner
from tests.trainer.samples import Reinforce, tiny_model
from trainer.config import Device, LearnerConfig
from trainer.learner import Learner
from trainer.model import load_model

TINY = "dapo/tiny"


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of `tiny_llama`, far from zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(tiny_llama), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(tiny_llama)
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("how", ["model.path", "model.adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_serves_the_base_with_its_adapter(
    how: str, dtype: str, adapter: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: dict[str, Any] = {}

    def build_engines(*arguments: Any, model: str, tokenizer: str, **options: Any) -> Any:
        served.update(folder=Path(model), tokenizer=Path(tokenizer))
        served.update(weights=load_file(Path(model) / "model.safetensors"), model=load_model(Path(model)))
        raise EngineDied("enough seen")

    monkeypatch.setattr(pipeline, "build_engines", build_engines)
    named = (
        [f"model.path={adapter}"] if how == "model.path" else [f"model.path={tiny_llama}", f"{how}={adapter}"]
    )
    with pytest.raises(RunStoppedError, match="enough seen"):
        pipeline.evaluate_config(load(TINY, [*named, f"rollout.dtype={dtype}"]))
    both = PeftModel.from_pretrained(load_model(tiny_llama), adapter).merge_and_unload()
    expected = both.state_dict()
    assert {weight.dtype for weight in served["weights"].values()} == {getattr(torch, dtype)}
    for name, weight in served["weights"].items():
        torch.testing.assert_close(weight, expected[name].to(weight.dtype), rtol=1e-2, atol=1e-6)
    ids = torch.tensor([[1, 70, 80, 90, 100]])
    base = load_model(tiny_llama)(ids).logits
    assert (both(ids).logits - base).abs().max() > 0.1
    if dtype == "float32":
        torch.testing.assert_close(served["model"](ids).logits, both(ids).logits, rtol=1e-4, atol=1e-4)
    assert served["tokenizer"] == tiny_llama.resolve()
    assert not served["folder"].exists()


def test_a_continued_adapter_is_treated_as_one(adapter: Path, tiny_llama: Path) -> None:
    """`learner.lora.rank` is 0 when `model.adapter` is continued."""
    learner = Learner(
        LearnerConfig(device=Device.cpu),
        load_model(tiny_llama),
        loss=Reinforce(),
        temperature=1.0,
        total_steps=1,
        seed=0,
        adapter=adapter,
    )
    assert learner.has_adapter
    assert lora_learner().has_adapter
    plain = Learner(
        LearnerConfig(device=Device.cpu),
        tiny_model(),
        loss=learner.loss,
        temperature=1.0,
        total_steps=1,
        seed=0,
    )
    assert not plain.has_adapter
    for trained, expected in ((learner, True), (plain, False)):
        assert ("weights/merge_gap" in published(trained)) is expected
        assert frozen(trained) == (None if expected else ())


def published(learner: Learner) -> dict[str, float]:
    """What `loop.publish` measures with a publisher that measures nothing."""
    report = SimpleNamespace(metrics=dict)
    run: Any = SimpleNamespace(
        publishing=nullcontext,
        clock=lambda phase: nullcontext(),
        metrics={},
        publisher=SimpleNamespace(publish=lambda weights, score: report),
        weights=dict,
        learner=learner,
        engine_dtype=torch.bfloat16,
        config=load(TINY),
    )
    loop.publish(run)
    return run.metrics


def frozen(learner: Learner) -> Any:
    """The tensors that a publisher is told never change."""
    engine: Any = SimpleNamespace(weight_version=0, init_transfer=lambda info: None)
    config = load(TINY)
    placement = placement_of(config.rollout)
    host, folder = LocalHost(), Path("unused")
    publisher = pipeline._publisher(config, [engine], [[1, 2]], learner, placement, host, folder)
    publisher.close()
    return publisher._watch._frozen
