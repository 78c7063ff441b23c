"""Vocabulary-sliced log-probs and entropy against log_softmax over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import logprobs
from trainer.logprobs import HeadOptions, head_logprobs

TOKENS, WIDTH, VOCABULARY = 37, 24, 1300


def head(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    offset = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True) if bias else None
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[:2] = torch.tensor([0, VOCABULARY - 1])
    return hidden, weight, offset, targets


def in_full(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    distribution = (scale * logits).log_softmax(-1)
    return distribution.gather(1, targets[:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)


@pytest.mark.parametrize("slice_elements", [1, 1 << 30], ids=["sliced", "whole"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, slice_elements: int, bias: bool, scale: float
) -> None:
    monkeypatch.setattr(logprobs, "_SLICE_ELEMENTS", slice_elements)
    hidden, weight, offset, targets = head(bias)
    leaves = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
    up_logprob, up_entropy = torch.randn(TOKENS), torch.randn(TOKENS)
    expected = in_full(hidden, weight, offset, targets, scale)
    expected_grads = torch.autograd.grad(expected, leaves, (up_logprob, up_entropy))
    got = head_logprobs(
        hidden, weight, offset, torch.arange(TOKENS), targets, HeadOptions(scale=scale, entropy_gradient=True)
    )
    grads = torch.autograd.grad(got, leaves, (up_logprob, up_entropy))
    for mine, theirs in zip([*got, *grads], [*expected, *expected_grads]):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)


def test_entropy_is_detached_unless_asked_for() -> None:
    hidden, weight, offset, targets = head(False)
    got, entropy = head_logprobs(
        hidden, weight, offset, torch.arange(TOKENS), targets, HeadOptions(scale=1.0, entropy_gradient=False)
    )
    assert not entropy.requires_grad
    expected = torch.autograd.grad(in_full(hidden, weight, offset, targets, 1.0)[0].sum(), [hidden, weight])
    for mine, theirs in zip(torch.autograd.grad(got.sum(), [hidden, weight]), expected):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)


def test_frozen_head_still_passes_the_gradient_on() -> None:
    hidden, weight, _, targets = head(False)
    got, _ = head_logprobs(
        hidden,
        weight.detach(),
        None,
        torch.arange(TOKENS),
        targets,
        HeadOptions(scale=1.0, entropy_gradient=False),
    )
    expected = torch.autograd.grad(in_full(hidden, weight, None, targets, 1.0)[0].sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(got.sum(), hidden)[0], expected, atol=1e-4, rtol=1e-5)


def test_large_logits_stay_finite() -> None:
    hidden, weight, _, targets = head(False)
    got, entropy = head_logprobs(
        hidden * 1e4,
        weight,
        None,
        torch.arange(TOKENS),
        targets,
        HeadOptions(scale=1.0, entropy_gradient=True),
    )
    assert torch.isfinite(got).all()
    assert (entropy.abs() < 1e-3).all()
    (got.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_SLICE_ELEMENTS", TOKENS * 64)
    monkeypatch.setattr(logprobs, "_SMALLEST_SLICE", 64)
    hidden, weight, _, targets = head(False)
    with _Largest() as largest:
        got, entropy = head_logprobs(
            hidden, weight, None, torch.arange(TOKENS), targets, HeadOptions(scale=1.0, entropy_gradient=True)
        )
        (got.sum() + entropy.sum()).backward()
    assert largest.elements <= VOCABULARY * WIDTH < TOKENS * VOCABULARY


def test_positions_that_predict_several_tokens() -> None:
    hidden, weight, _, _ = head(False)
    positions = torch.randint(TOKENS, (90,))
    targets = torch.randint(VOCABULARY, (90,))
    up_logprob, up_entropy = torch.randn(90), torch.randn(90)
    expected = in_full(hidden[positions], weight, None, targets, 1.0)
    expected_grads = torch.autograd.grad(expected, [hidden, weight], (up_logprob, up_entropy))
    got = head_logprobs(
        hidden, weight, None, positions, targets, HeadOptions(scale=1.0, entropy_gradient=True)
    )
    grads = torch.autograd.grad(got, [hidden, weight], (up_logprob, up_entropy))
    for mine, theirs in zip([*got, *grads], [*expected, *expected_grads]):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
