"""The learner's door: steps, metrics, schedules, faults, state, weights, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.trainer.samples import Reinforce, make_row, random_rows, reference_logprobs, tiny_model
from trainer.config import (
    Device,
    LearnerConfig,
    OnNonfinite,
    OptimizerConfig,
    OptimizerName,
    Precision,
    ProfileConfig,
    ScheduleConfig,
)
from trainer.errors import NonFiniteError
from trainer.learner import Learner


def make_learner(model: Any = None, **changes: Any) -> Learner:
    extra = {k: changes.pop(k) for k in ("needs_reference", "temperature", "loss", "traces") if k in changes}
    config = LearnerConfig(dtype=Precision.float32, device=Device.cpu, optimizer=OptimizerConfig(lr=1e-3))
    for name, value in changes.items():
        setattr(config, name, value)
    settings = {"loss": Reinforce(), "temperature": 1.0, **extra}
    return Learner(config, model or tiny_model(), total_steps=4, seed=0, **settings)


def test_an_update_raises_the_probability_of_what_paid() -> None:
    learner, rows = make_learner(), random_rows()
    for row in rows:
        row.advantages = [1.0] * len(row.response_ids)
    before = sum(map(sum, learner.logprobs(rows)))
    (metrics,) = learner.update([rows])
    assert sum(map(sum, learner.logprobs(rows))) > before
    assert metrics["policy/ratio_max"] == pytest.approx(1.0)
    assert metrics["learner/lr"] == 1e-3
    assert metrics["learner/optimizer_steps"] == 1
    assert metrics["learner/grad_norm"] > 0
    assert 0 < metrics["learner/prompt_saving"] < 1


def test_metrics_are_means_over_all_micro_batches() -> None:
    model, rows = tiny_model(), random_rows()
    entropies = torch.cat([reference_logprobs(model, row)[1] for row in rows])
    (metrics,) = make_learner(model, token_budget=40).update([rows])
    assert metrics["learner/micro_batches"] > 1
    assert metrics["policy/entropy"] == pytest.approx(entropies.mean().item(), abs=1e-5)


def test_logprobs_keep_the_order_of_rows_and_empty_ones() -> None:
    model, rows = tiny_model(), random_rows()
    rows.insert(2, make_row([1, 2], [], group=99))
    learner = make_learner(copy.deepcopy(model), token_budget=40, temperature=0.6)
    for got, row in zip(learner.logprobs(rows), rows):
        expected = reference_logprobs(model, row, 0.6)[0] if row.response_ids else torch.empty(0)
        assert got == pytest.approx(expected.tolist(), abs=1e-5)


def test_score_is_every_token_given_what_precedes() -> None:
    model = tiny_model()
    sequences = [[5, 6, 7, 8], [9, 10], [11]]
    got = make_learner(copy.deepcopy(model)).score(sequences)
    expected = reference_logprobs(model, make_row([5], [6, 7, 8]))[0]
    assert got[0] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [len(scores) for scores in got] == [3, 1, 0]


def test_the_schedule_moves_by_rollout_steps() -> None:
    learner = make_learner(schedule=ScheduleConfig(warmup_steps=2))
    rows = random_rows(groups=1)
    assert [m["learner/lr"] for m in learner.update([rows, rows])] == [0.5e-3, 0.5e-3]
    learner.end_rollout()
    assert learner.update([rows])[0]["learner/lr"] == 1e-3


def test_gradients_are_clipped_to_the_norm() -> None:
    rows = random_rows()
    sgd = OptimizerConfig(name=OptimizerName.sgd, lr=1.0, betas=[0.0, 0.0])
    learner = make_learner(optimizer=sgd, max_grad_norm=1e-3)
    before = [p.detach().clone() for p in learner.master.parameters]
    (metrics,) = learner.update([rows])
    moved = sum((p - b).square().sum() for p, b in zip(learner.master.parameters, before)) ** 0.5
    assert metrics["learner/grad_norm"] > 1e-3
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_frozen_parameters_do_not_move() -> None:
    learner = make_learner(freeze=["*embed_tokens*", "*layers.0.*"])
    before = {name: tensor.clone() for name, tensor in learner.weights()}
    learner.update([random_rows()])
    moved = {name for name, tensor in learner.weights() if not torch.equal(tensor, before[name])}
    assert moved
    assert not any("embed_tokens" in name or "layers.0." in name for name in moved)
    with pytest.raises(ValueError, match="pattern \\*nothing\\* matches no parameter"):
        make_learner(freeze=["*nothing*"])


def test_a_minibatch_without_tokens_takes_no_step() -> None:
    learner = make_learner()
    before = learner.state_dict()["weights"]["model.model.norm.weight"].clone()
    (metrics,) = learner.update([[make_row([1, 2], [])]])
    assert "learner/grad_norm" not in metrics
    assert metrics["learner/optimizer_steps"] == 0
    assert torch.equal(learner.state_dict()["weights"]["model.model.norm.weight"], before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(bad: float) -> None:
    learner, rows = make_learner(), random_rows()
    rows[0].advantages[0] = bad
    before = [p.detach().clone() for p in learner.master.parameters]
    with pytest.raises(NonFiniteError, match="in optimizer step 1: log-probs are finite"):
        learner.update([rows])
    assert all(torch.equal(p, b) for p, b in zip(learner.master.parameters, before))


def test_a_gradient_that_is_not_finite_stops_and_is_named() -> None:
    learner = make_learner()
    weight = learner.policy.model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(NonFiniteError, match=r"first in model\.model\.layers\.1\.mlp\.up_proj\.weight"):
        learner.update([random_rows()])


@pytest.mark.parametrize("dtype", list(Precision))
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_step_touches_nothing(
    dtype: Precision, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    learner = make_learner(dtype=dtype, on_nonfinite=OnNonfinite.skip)
    sound, odd = random_rows(), random_rows(seed=1)
    learner.update([sound])
    before = copy.deepcopy(learner.state_dict())
    if where == "loss":
        odd[-1].advantages[0] = float("inf")
        (metrics,) = learner.update([odd])
    else:
        weight = learner.policy.model.model.layers[1].mlp.up_proj.weight
        handle = weight.register_hook(lambda grad: grad * float("nan"))
        (metrics,) = learner.update([odd])
        handle.remove()
    after = learner.state_dict()
    assert after.pop("skipped") == {"total": 1, "in_a_row": 1}
    before.pop("skipped")
    assert_same(after, before)
    assert (metrics["learner/skipped_steps"], metrics["learner/optimizer_steps"]) == (1, 1)
    assert "policy/loss" not in metrics
    assert caplog.messages[0].startswith(f"Skipped: The {'loss is' if where == 'loss' else 'gradient norm'} ")
    twin = make_learner(dtype=dtype)
    twin.update([sound])
    twin.update([random_rows(seed=2)])
    learner.update([random_rows(seed=2)])
    assert_same(learner.state_dict()["weights"], twin.state_dict()["weights"])
    assert learner.state_dict()["skipped"] == {"total": 1, "in_a_row": 0}


def test_ten_skipped_steps_in_a_row_are_the_end() -> None:
    learner, odd = make_learner(on_nonfinite=OnNonfinite.skip), random_rows()
    odd[0].advantages[0] = float("nan")
    for _ in range(3):
        learner.update([odd] * 3 + [random_rows()])
    learner.update([odd] * 9)
    resumed = make_learner(on_nonfinite=OnNonfinite.skip)
    resumed.load_state_dict(learner.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        resumed.update([odd])
    assert str(caught.value) == (
        "The loss is nan in optimizer step 4: log-probs are finite, so advantages, old log-probs or the loss "
        "itself are not: look at the rewards of this step, start anew with a lower learner.optimizer.lr, or "
        "go on from an earlier checkpoint: 10 optimizer steps in a row were dropped "
        "(learner.on_nonfinite=skip)."
    )


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, tensors too."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_reference_is_the_first_policy() -> None:
    learner, rows = make_learner(needs_reference=True), random_rows()
    before = learner.logprobs(rows)
    learner.update([rows])
    assert learner.reference_logprobs(rows) == before
    assert learner.logprobs(rows) != before
    with pytest.raises(ValueError, match="built without a reference"):
        make_learner().reference_logprobs(rows)


@pytest.mark.parametrize("dtype", list(Precision))
def test_a_resumed_learner_goes_on_bit_for_bit(dtype: Precision) -> None:
    rows = random_rows()
    whole, first = make_learner(dtype=dtype), make_learner(dtype=dtype)
    for learner in (whole, first):
        learner.update([rows])
        learner.end_rollout()
    state = copy.deepcopy(first.state_dict())
    second = make_learner(dtype=dtype)
    second.load_state_dict(state)
    assert second.update([rows]) == whole.update([rows])
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(second.weights(), whole.weights()))


def test_bfloat16_learns_as_float32_does() -> None:
    rows = random_rows(groups=6)
    exact, narrow = make_learner(), make_learner(dtype=Precision.bfloat16)
    (expected,), (got,) = exact.update([rows]), narrow.update([rows])
    assert got["learner/grad_norm"] == pytest.approx(expected["learner/grad_norm"], rel=0.03)
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in narrow.weights())


def test_weights_carry_the_names_of_the_model() -> None:
    model = tiny_model("qwen2")
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stream = make_learner(model).weights(torch.bfloat16)
    assert {info.name: info.shape for info in stream.metadata()} == names
    assert {info.dtype for info in stream.metadata()} == {torch.bfloat16}
    assert "lm_head.weight" not in dict(make_learner(tiny_model("llama")).weights())  # Tied.


class _Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text("{}")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_saved_folder_loads_as_the_same_policy(tmp_path: Path, kind: str) -> None:
    rows = random_rows()
    learner = make_learner(tiny_model(kind))
    learner.update([rows])
    learner.save(tmp_path / "model", _Tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
    for got, row in zip(learner.logprobs(rows), rows):
        assert got == pytest.approx(reference_logprobs(model, row)[0].tolist(), abs=1e-5)


def test_a_generation_config_that_transformers_refuses_to_save_is_kept(tmp_path: Path) -> None:
    ends = {"eos_token_id": [2, 0], "pad_token_id": 2}
    odd = GenerationConfig(**ends, do_sample=False, temperature=0.6)
    with pytest.raises(ValueError, match="temperature"):
        odd.save_pretrained(tmp_path)
    model = tiny_model()
    model.generation_config = odd
    learner = make_learner(model)
    learner.save(tmp_path, _Tokenizer())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.generation_config.to_diff_dict() == odd.to_diff_dict()
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in learner.weights())


def test_profile_writes_a_trace_of_the_named_step(tmp_path: Path) -> None:
    learner = make_learner(profile=ProfileConfig(steps=[1]), traces=tmp_path)
    for _ in range(3):
        learner.update([random_rows(groups=1)])
        learner.end_rollout()
    (trace,) = tmp_path.iterdir()
    assert trace.name == "update-000001.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_cuda_without_a_device_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match="but torch sees no CUDA device"):
        make_learner(device=Device.cuda)
