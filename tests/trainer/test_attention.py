"""Shared-prefix attention against each response's own causal attention, values and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MistralConfig, Qwen2Config

from tests.trainer.samples import make_row, random_rows
from trainer import attention
from trainer.attention import AttentionLayout, _flex_mask, packed_attention, supports_sharing
from trainer.batch import GroupSpan, Row
from trainer.packing import pack

HEADS, KV_HEADS, WIDTH = 6, 2, 16


def spans_of(rows: Sequence[Row]) -> list[GroupSpan]:
    (batch,) = pack(rows, 1 << 20, share_prompts=True)
    return batch.spans


def one_at_a_time(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[GroupSpan]) -> Tensor:
    """`[N, Hq, D]`: causal attention of prompt and response, alone, for every response."""
    output = torch.zeros_like(query)
    for span in spans:
        prompt = torch.arange(span.prompt_start, span.prompt_start + span.prompt_length)
        for start, length in zip([0, *span.response_starts], [0, *span.response_lengths]):
            tokens = torch.cat([prompt, torch.arange(start, start + length)])
            q, k, v = (tensor[tokens].transpose(0, 1)[None] for tensor in (query, key, value))
            own = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            output[tokens] = own
    return output


RAGGED = {
    "short": random_rows(groups=6, samples=4, seed=1),
    "uneven": [make_row([1] * n, [2] * r, g) for g, (n, r) in enumerate([(40, 3), (2, 90), (17, 1), (90, 2)])]
    + [make_row([1] * 40, [2] * 70, 0)],
    "long": [make_row([1] * 60, [2] * r, 0) for r in (300, 170, 2, 299)],
}


def random_inputs(spans: Sequence[GroupSpan]) -> tuple[Tensor, Tensor, Tensor]:
    """Query `[N, Hq, D]`, key and value `[N, Hkv, D]`."""
    torch.manual_seed(0)
    tokens = sum(span.length for span in spans)
    query = torch.randn(tokens, HEADS, WIDTH, requires_grad=True)
    key = torch.randn(tokens, KV_HEADS, WIDTH, requires_grad=True)
    return query, key, torch.randn(tokens, KV_HEADS, WIDTH, requires_grad=True)


def packed(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    """`[N, Hq, D]` by the function under test, called as transformers calls it."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return packed_attention(nn.Module(), query, key, value, None, layout=layout)[0][0]


@pytest.mark.parametrize("path", ["default", "plain", "pieces", "tiled"])
@pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED.keys())
def test_equals_one_sequence_at_a_time(rows: list[Row], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "default":
        monkeypatch.setattr(attention, "_LONG", 0 if path == "tiled" else 1 << 30)
        monkeypatch.setattr(attention, "_PIECE", 2000 if path == "pieces" else 1 << 30)
    spans = spans_of(rows)
    inputs = random_inputs(spans)
    upstream = torch.randn_like(inputs[0])
    expected = one_at_a_time(*inputs, spans)
    got = packed(*inputs, AttentionLayout.build(spans, torch.device("cpu")))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, upstream), expected_grads):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


def test_bfloat16_is_near_float32() -> None:
    spans = spans_of(RAGGED["short"])
    exact = random_inputs(spans)
    narrow = tuple(tensor.detach().bfloat16().requires_grad_() for tensor in exact)
    layout = AttentionLayout.build(spans, torch.device("cpu"))
    upstream = torch.randn_like(exact[0])
    expected, got = one_at_a_time(*exact, spans), packed(narrow[0], narrow[1], narrow[2], layout)
    torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.02)
    expected_grads = torch.autograd.grad(expected, exact, upstream)
    for mine, theirs in zip(torch.autograd.grad(got, narrow, upstream.bfloat16()), expected_grads):
        assert ((mine.float() - theirs).norm() / theirs.norm()).item() < 0.01


@torch.no_grad()
def test_flex_mask_is_the_same_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_FLEX", [flex_attention])  # Uncompiled: quick, and runs on CPU.
    spans = spans_of(RAGGED["short"])
    inputs = random_inputs(spans)
    mask = _flex_mask(spans, len(inputs[0]), torch.device("cpu"))
    query, key, value = (tensor.detach() for tensor in inputs)
    got = packed(query, key, value, AttentionLayout(flex_mask=mask))
    torch.testing.assert_close(got, one_at_a_time(*inputs, spans), atol=1e-5, rtol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="without a layout"):
        packed_attention(nn.Module(), query, query, query, None)
    span = GroupSpan(prompt_start=0, prompt_length=3, response_starts=[], response_lengths=[])
    layout = AttentionLayout.build([span], torch.device("cpu"))
    with pytest.raises(ValueError, match="does not know sliding_window"):
        packed_attention(nn.Module(), query, query, query, None, layout=layout, sliding_window=4)


def test_configs_that_cannot_share() -> None:
    assert supports_sharing(Qwen2Config(use_sliding_window=False)) is None
    assert "sliding" in str(
        supports_sharing(Qwen2Config(use_sliding_window=True, max_window_layers=1, num_hidden_layers=2))
    )
    assert "window of 8" in str(supports_sharing(MistralConfig(sliding_window=8)))
    assert supports_sharing(MistralConfig(sliding_window=None)) is None
