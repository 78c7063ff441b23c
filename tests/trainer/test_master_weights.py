"""float32 masters under a bfloat16 module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.master_weights import MasterWeights, global_norm


def small() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def test_float32_masters_are_the_parameters() -> None:
    module = small()
    master = MasterWeights(module, torch.float32)
    assert master.parameters[0] is module.weight


def test_masters_keep_what_bfloat16_rounds_away() -> None:
    module = small()
    original = module.weight.detach().clone()
    module.register_buffer("table", torch.tensor([1.001]))
    master = MasterWeights(module, torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.table.dtype == torch.float32  # Rotary frequencies must not be rounded.
    assert torch.equal(master.parameters[0], original)
    with torch.no_grad():
        for _ in range(100):
            master.parameters[0].mul_(1 + 1e-4)  # Each step is lost in bfloat16, the hundred are not.
    master.install()
    torch.testing.assert_close(module.weight.float(), original * 1.01005, rtol=4e-3, atol=0)


def test_gradients_are_summed_in_float32() -> None:
    module = small()
    master = MasterWeights(module, torch.bfloat16)
    inputs = torch.randn(300, 8, dtype=torch.bfloat16)
    for row in inputs:
        module(row).sum().backward()
    assert module.weight.grad is None
    expected = inputs.float().sum(0).expand(4, 8)
    torch.testing.assert_close(master.parameters[0].grad, expected, rtol=1e-6, atol=1e-5)


def test_frozen_parameters_are_cast_but_not_kept() -> None:
    module = small()
    module.bias.requires_grad_(False)
    master = MasterWeights(module, torch.bfloat16)
    assert master.names == ["weight"]
    assert module.bias.dtype == torch.bfloat16


def test_state_round_trip_installs() -> None:
    first, second = small(), nn.Linear(8, 4)
    state = MasterWeights(first, torch.bfloat16).state_dict()
    MasterWeights(second, torch.bfloat16).load_state_dict(state)
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(ValueError, match="bias is on one side only"):
        MasterWeights(small(), torch.float32).load_state_dict({"weight": state["weight"]})


def test_global_norm() -> None:
    assert global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item() == pytest.approx(5.0)
