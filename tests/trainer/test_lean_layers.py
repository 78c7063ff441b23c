"""Lean norm and MLP against transformers' own, values and gradients; forms that do not fit are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config

from tests.trainer.samples import CONFIGS, from_config, tiny_model, tiny_shape
from trainer.lean_layers import use_lean_layers


def values_and_gradients(module: Any, hidden: Tensor, upstream: Tensor) -> list[Tensor]:
    hidden = hidden.clone().requires_grad_()
    output = module(hidden)
    leaves = [hidden, *module.parameters()]
    return [output, *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_same_values_and_gradients(kind: str) -> None:
    model = tiny_model(kind)
    lean = copy.deepcopy(model)
    norms = 5 if kind != "qwen3" else 9  # Qwen3 norms queries and keys as well.
    assert use_lean_layers(lean) == norms + 2
    torch.manual_seed(1)
    hidden, upstream = torch.randn(2, 7, 48), torch.randn(2, 7, 48)
    for mine, theirs in [
        (lean.model.layers[0].mlp, model.model.layers[0].mlp),
        (lean.model.norm, model.model.norm),
    ]:
        with torch.no_grad():
            for parameter, own in zip(mine.parameters(), theirs.parameters()):
                own.copy_(parameter.copy_(torch.randn_like(own)))
        got, expected = (values_and_gradients(module, hidden, upstream) for module in (mine, theirs))
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_frozen_norm_passes_the_gradient_on() -> None:
    model = tiny_model()
    use_lean_layers(model)
    model.requires_grad_(False)
    hidden = torch.randn(1, 3, 48, requires_grad=True)
    model.model.norm(hidden).sum().backward()
    assert hidden.grad is not None


def test_other_formulas_are_left_alone() -> None:
    model = from_config(Gemma2Config(**tiny_shape(), head_dim=8))  # Norms by 1 + weight, gates by GELU.
    assert use_lean_layers(model) == 0


def test_a_copy_uses_its_own_weights() -> None:
    model = tiny_model()
    use_lean_layers(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    hidden = torch.randn(1, 3, 48)
    torch.testing.assert_close(other.model.norm(hidden), 2 * model.model.norm(hidden))
