"""`Policy` against the model's own forward, one sequence at a time; models that cannot share; refusals."""

from __future__ import annotations

import copy
from functools import partialmethod
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.trainer.samples import (
    CONFIGS,
    from_config,
    make_row,
    random_rows,
    reference_logprobs,
    tiny_model,
    tiny_shape,
)
from trainer.attention import ATTENTION_NAME
from trainer.batch import Row
from trainer.packing import pack
from trainer.policy import Policy


def check_against_reference(
    policy: Policy, reference: PreTrainedModel, rows: list[Row], temperature: float
) -> None:
    (batch,) = pack(rows, 1 << 20, policy.shares_prompts)
    output = policy(batch, temperature)
    for place, index in enumerate(batch.row_indices):
        logprobs, entropy = reference_logprobs(reference, rows[index], temperature)
        torch.testing.assert_close(output.logprobs[batch.row_ids == place], logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.entropy[batch.row_ids == place], entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_equals_one_sequence_at_a_time(kind: str, share: bool) -> None:
    model = tiny_model(kind)
    policy = Policy(copy.deepcopy(model), share_prompts=share)
    assert policy.shares_prompts is share
    check_against_reference(policy, model, random_rows(), temperature=0.7)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**tiny_shape(), sliding_window=4), "sliding window of 4"),
        (GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4), None),
        (GraniteConfig(**tiny_shape(), logits_scaling=4.0), None),
        (CohereConfig(**tiny_shape(), logit_scale=0.3, use_qk_norm=False), None),
    ],
    ids=["mistral-window", "gpt2", "granite", "cohere"],
)
@torch.no_grad()
def test_other_models_give_their_own_values(config: PretrainedConfig, reason: str | None) -> None:
    model = from_config(config)
    policy = Policy(copy.deepcopy(model))
    if reason is not None:
        assert not policy.shares_prompts
        assert reason in policy.why_not_shared
    check_against_reference(policy, model, random_rows(), temperature=1.3)


def test_soft_capped_logits_are_refused() -> None:
    model = from_config(Gemma2Config(**tiny_shape(), head_dim=8, final_logit_softcapping=30.0))
    with pytest.raises(ValueError, match="soft-caps its logits"):
        Policy(model)


def test_logits_that_are_no_plain_head_are_refused() -> None:
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, output: 10 * output.tanh())
    with pytest.raises(ValueError, match="more than a linear head"):
        Policy(model)


def test_attention_outside_the_interface_is_noticed() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(
            model.config
        )  # Its implementation no longer follows the model's.
    policy = Policy(model)
    assert not policy.shares_prompts
    assert "does not route its attention" in policy.why_not_shared


@torch.no_grad()
def test_narrow_values_are_not_packed() -> None:
    """Multi-head latent attention: keys of 8 + 8 dimensions, values of 12."""
    config = DeepseekV3Config(
        **{**tiny_shape(), "num_key_value_heads": 6},
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=2,
    )
    model = from_config(config)
    policy = Policy(copy.deepcopy(model))
    assert not policy.shares_prompts
    assert "does not know values of 12 dimensions beside keys of 16" in policy.why_not_shared
    check_against_reference(policy, model, random_rows(), temperature=1.3)


@torch.no_grad()
def test_tensors_that_do_not_fit_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def misfit(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("shape '[28, 16]' is invalid for input of size 336")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ATTENTION_NAME, misfit)
    model = tiny_model()
    policy = Policy(copy.deepcopy(model))
    assert not policy.shares_prompts
    assert "does not run on packed attention (shape '[28, 16]' is invalid" in policy.why_not_shared
    check_against_reference(policy, model, random_rows(), temperature=1.3)


def test_dropout_is_off() -> None:
    model = tiny_model(attention_dropout=0.5)
    policy = Policy(model).train()
    (batch,) = pack(random_rows(), 1 << 20, True)
    assert torch.equal(policy(batch).logprobs, policy(batch).logprobs)


def test_compiled_layers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as by the compiler; its C++ is left out, which takes a minute to build."""
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(whole, backend="aot_eager"))
    model, rows = tiny_model(), random_rows()
    (batch,) = pack(rows, 1 << 20, True)
    plain, compiled = Policy(copy.deepcopy(model)), Policy(model)
    compiled.compile_layers()
    outputs = [policy(batch).logprobs for policy in (plain, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad(output.sum(), list(policy.parameters()))
        for output, policy in zip(outputs, (plain, compiled))
    ]
    for mine, theirs in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no list of decoder layers"):
        Policy(from_config(GPT2Config(vocab_size=300, n_embd=48, n_layer=1, n_head=4))).compile_layers()


def test_only_positions_that_predict_reach_the_head() -> None:
    """One row of the head a distinct position: the end of a shared prompt counts once for all responses."""
    policy = Policy(tiny_model())
    rows = [make_row([1, 2, 3], [4, 5]), make_row([1, 2, 3], [6]), make_row([1, 2, 3], [7, 8, 9])]
    (batch,) = pack(rows, 1 << 20, True)
    seen: list[int] = []
    inner = policy._hidden

    def counting(*args: Any) -> torch.Tensor:
        hidden = inner(*args)
        seen.append(hidden.shape[0])
        return hidden

    policy._hidden = counting  # type: ignore[assignment]
    policy(batch)
    assert seen == [4]
    assert batch.targets.numel() == 6
    assert batch.tokens == 6
