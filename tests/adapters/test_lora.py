"""LoRA: what is trained, what the reference is, what is published, what PEFT reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.trainer.samples import Reinforce, from_config, random_rows, reference_logprobs, tiny_model
from trainer.config import Device, LearnerConfig, LoraConfig, OptimizerConfig, Precision
from trainer.learner import Learner


def lora_learner(model: Any = None, dtype: Precision = Precision.float32, **lora: Any) -> Learner:
    config = LearnerConfig(
        dtype=dtype,
        device=Device.cpu,
        optimizer=OptimizerConfig(lr=1e-2),
        lora=LoraConfig(**{"rank": 4, "alpha": 8, **lora}),
    )
    model = model or tiny_model()
    return Learner(
        config, model, loss=Reinforce(), temperature=1.0, total_steps=4, seed=0, needs_reference=True
    )


class _Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


def test_only_the_adapter_is_trained() -> None:
    learner = lora_learner()
    assert all("lora_" in name for name in learner.master.names)
    assert len(learner.master.names) == 2 * 7 * 2  # A and B of seven linears in two layers.
    assert len(lora_learner(targets=["q_proj", "v_proj"]).master.names) == 2 * 2 * 2


def test_a_fresh_adapter_is_the_base_and_depends_on_the_seed_alone() -> None:
    model, rows = tiny_model(), random_rows()
    torch.manual_seed(5)
    learner = lora_learner(copy.deepcopy(model))
    torch.manual_seed(6)
    again = lora_learner(copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(learner.master.parameters, again.master.parameters))
    for got, row in zip(learner.logprobs(rows), rows):
        assert got == pytest.approx(reference_logprobs(model, row)[0].tolist(), abs=1e-5)


def test_reference_stays_the_base_and_training_goes_on() -> None:
    learner, rows = lora_learner(), random_rows()
    base = learner.logprobs(rows)
    learner.update([rows])
    assert learner.reference_logprobs(rows) == base
    moved = learner.logprobs(rows)
    assert moved != base
    learner.update([rows])
    assert learner.logprobs(rows) != moved


def test_merged_weights_are_the_policy_under_hugging_face_names() -> None:
    model, rows = tiny_model(), random_rows()
    names = {name for name, _ in model.named_parameters()}
    learner = lora_learner(copy.deepcopy(model))
    for _ in range(3):
        learner.update([rows])
    merged = dict(learner.weights())
    assert set(merged) == names
    before = learner.logprobs(rows)
    model.load_state_dict(merged, strict=False)
    for got, row in zip(before, rows):
        assert got == pytest.approx(reference_logprobs(model, row)[0].tolist(), abs=2e-5)
    assert learner.logprobs(rows) == before  # Merging touched nothing.


def test_merge_gap_is_what_rounding_loses() -> None:
    learner = lora_learner()
    assert learner.merge_gap(torch.bfloat16) == 0.0  # No update yet.
    learner.update([random_rows()])
    assert learner.merge_gap(torch.float32) < 1e-5
    layer = learner.policy.model.model.layers[0].self_attn.q_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
    total = layer.base_layer.weight + delta
    one_layer = ((total.bfloat16().float() - total).norm() / delta.norm()).item()
    assert 0.1 * one_layer < learner.merge_gap(torch.bfloat16) < 10 * one_layer


def test_bfloat16_adapters_have_float32_masters() -> None:
    learner, rows = lora_learner(dtype=Precision.bfloat16), random_rows()
    learner.update([rows])
    assert {p.dtype for p in learner.policy.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in learner.master.parameters} == {torch.float32}


def test_saved_adapter_is_read_by_peft_and_continued(tmp_path: Path) -> None:
    model, rows = tiny_model(), random_rows()
    model.save_pretrained(tmp_path / "base")
    learner = lora_learner(copy.deepcopy(model))
    learner.update([rows])
    learner.save(tmp_path / "run", _Tokenizer())
    peft_model: Any = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "run" / "adapter")
    for got, row in zip(learner.logprobs(rows), rows):
        expected = reference_logprobs(peft_model, row)[0].tolist()
        assert got == pytest.approx(expected, abs=1e-5)
    continued = Learner(
        LearnerConfig(dtype=Precision.float32, device=Device.cpu),
        copy.deepcopy(model),
        loss=Reinforce(),
        temperature=1.0,
        total_steps=1,
        seed=1,
        adapter=tmp_path / "run" / "adapter",
    )
    for got, before in zip(continued.logprobs(rows), learner.logprobs(rows)):
        assert got == pytest.approx(before, abs=1e-5)
    assert continued.update([rows])[0]["learner/grad_norm"] > 0


def test_unknown_targets_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"learner\.lora\.targets=\['query'\] names no layer.*q_proj"):
        lora_learner(targets=["query"])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_head_or_embeddings_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match="on the head or the embeddings are not supported"):
        lora_learner(tiny_model("qwen2"), targets=["q_proj", target])


def test_adapters_that_would_not_merge_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    from adapters import lora

    model = tiny_model()
    get_peft_model(model, PeftLoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(
        str(tmp_path)
    )
    with pytest.raises(ValueError, match="is not plain LoRA"):
        lora.load(tiny_model(), tmp_path)


def test_gradient_flows_with_checkpointing() -> None:
    learner = lora_learner(from_config(tiny_model().config))
    learner.policy.checkpoint_activations()
    assert learner.update([random_rows()])[0]["learner/grad_norm"] > 0
