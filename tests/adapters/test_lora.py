"""LoRA: what is trained, what the reference is, what is published, what PEFT reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from adapters import lora
from tests.trainer.samples import Reinforce, from_config, random_rows, reference_logprobs, tiny_model
from trainer.config import Device, LearnerConfig, LoraConfig, OptimizerConfig, Precision
from trainer.learner import Learner
from trainer.memory.checkpointing import checkpoint_layers
from trainer.memory.config import ActivationCheckpointing


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


def test_merging_makes_one_update_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = lora_learner()
    assert learner._lora is not None
    made, delta = [], lora._delta

    def counted(layer: str, *arguments: Any) -> torch.Tensor:
        made.append(layer)
        return delta(layer, *arguments)

    monkeypatch.setattr(lora, "_delta", counted)
    adapted = 0
    for _, _, exact in learner._lora._merged(torch.float32, learner._adapter_masters()):
        adapted += exact is not None
        assert len(made) == adapted
    assert adapted == len(set(made)) > 1


def test_merge_gap_is_what_rounding_loses() -> None:
    learner = lora_learner()
    assert learner.merge_gap(torch.bfloat16) == 0.0  # No update yet.
    learner.update([random_rows()])
    assert learner.merge_gap(torch.float32) < 1e-5
    lost, updates = [], []
    layer: Any
    for layer in learner.policy.model.modules():
        if hasattr(layer, "lora_B"):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
            total = layer.base_layer.weight + delta
            lost.append((total.bfloat16().float() - total).flatten())
            updates.append(delta.flatten())
    assert len(updates) == 7 * 2
    expected = (torch.cat(lost).norm() / torch.cat(updates).norm()).item()
    assert learner.merge_gap(torch.bfloat16) == pytest.approx(expected, rel=1e-5)


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


def test_saved_adapter_is_the_masters_and_merges_to_what_is_published(tmp_path: Path) -> None:
    """In bfloat16 the module holds rounded copies; the file holds what the optimizer steps on."""
    base = tiny_model()
    learner = lora_learner(copy.deepcopy(base), dtype=Precision.bfloat16)
    for _ in range(3):
        learner.update([random_rows()])
    learner.save(tmp_path, _Tokenizer())
    masters = {name.removeprefix("model."): p.detach() for name, p in learner.master.named}
    rounded: Any = base.bfloat16().float()
    peft_model: Any = PeftModel.from_pretrained(rounded, tmp_path / "adapter")
    loaded = {n: p for n, p in peft_model.get_base_model().named_parameters() if "lora_" in n}
    assert loaded.keys() == masters.keys()
    assert all(torch.equal(loaded[name], master) for name, master in masters.items())
    assert any(not torch.equal(master.bfloat16().float(), master) for master in masters.values())
    merged = dict(peft_model.merge_and_unload().named_parameters())
    published = dict(learner.weights())
    assert published.keys() == merged.keys()
    assert all(torch.equal(weight, merged[name].bfloat16()) for name, weight in published.items())


def test_a_trained_weight_that_is_missing_is_not_replaced_by_its_copy(tmp_path: Path) -> None:
    learner = lora_learner(dtype=Precision.bfloat16)
    name = "model.layers.1.mlp.up_proj.lora_B.default.weight"
    masters = learner._adapter_masters()
    del masters[name]
    adapter: Any = learner._lora
    for use in (
        lambda: adapter.save(tmp_path, masters),
        lambda: list(adapter.merged(torch.bfloat16, masters)),
        lambda: adapter.merge_gap(torch.bfloat16, masters),
    ):
        with pytest.raises(ValueError, match=f"trained weights of the adapter lack {name}"):
            use()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_an_adapter_half_of_which_is_frozen_merges_and_saves(tmp_path: Path) -> None:
    lora_learner().save(tmp_path / "first", _Tokenizer())
    continued = Learner(
        LearnerConfig(dtype=Precision.float32, device=Device.cpu, freeze=["*lora_A*"]),
        tiny_model(),
        loss=Reinforce(),
        temperature=1.0,
        total_steps=1,
        seed=1,
        adapter=tmp_path / "first" / "adapter",
    )
    continued.update([random_rows()])
    continued.save(tmp_path / "second", _Tokenizer())
    first, second = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("first", "second")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) is ("lora_A" in name)


def test_unknown_targets_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"learner\.lora\.targets=\['query'\] names no layer.*q_proj"):
        lora_learner(targets=["query"])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_head_or_embeddings_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match="on the head or the embeddings are not supported"):
        lora_learner(tiny_model("qwen2"), targets=["q_proj", target])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias=all"),
        (
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
            r"target_parameters=\['q_proj\.weight'\]",
        ),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]"),
    ],
)
def test_adapters_that_would_not_merge_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    config = PeftLoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    get_peft_model(tiny_model("qwen2"), config).save_pretrained(str(tmp_path))
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match=rf"is not plain LoRA \({said}\): only plain LoRA adapters are"):
        lora.load(model, tmp_path)
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", [ActivationCheckpointing.full, ActivationCheckpointing.selective])
def test_gradient_flows_with_checkpointing(kind: ActivationCheckpointing) -> None:
    learner = lora_learner(from_config(tiny_model().config))
    checkpoint_layers(learner.policy.model, kind)
    assert learner.update([random_rows()])[0]["learner/grad_norm"] > 0
