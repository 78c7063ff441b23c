"""8-bit AdamW: near float32, as small as it says, and the same after a detour through files."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf import state_file
from rlhf.config import Config
from rlhf.errors import UserError
from rlhf.memory_plan import STATE_BYTES
from rlhf.preflight import check_packages, check_ranks
from trainer.config import NEEDS_BITSANDBYTES, OptimizerConfig, OptimizerName
from trainer.optimizers import OptimizerSet, build_optimizer
from trainer.parallel.world import World

installed = pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('bitsandbytes')", reason="bitsandbytes is not installed"
)
LR = 1e-2


def network(seed: int = 0) -> nn.Module:
    """Two matrices of more than 4096 values and one of a number that 256 does not divide."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 101, bias=False), nn.Tanh(), nn.Linear(101, 64))


def optimizer_of(module: nn.Module, name: OptimizerName) -> OptimizerSet:
    config = OptimizerConfig(name=name, lr=LR, weight_decay=0.01)
    return build_optimizer(config, list(module.named_parameters()))


def losses(module: nn.Module, optimizer: OptimizerSet, steps: range) -> list[float]:
    """Steps on a regression whose batches are numbered."""
    target = network(seed=7)
    found = []
    for step in steps:
        inputs = torch.randn(256, 96, generator=torch.Generator().manual_seed(step))
        module.zero_grad()
        loss = (module(inputs) - target(inputs).detach()).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@installed
def test_it_learns_as_float32_does() -> None:
    """Loss within 5 % of float32's all along 150 steps; weights within a tenth of the way travelled."""
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    curves, ends = {}, {}
    for name in (OptimizerName.adamw, OptimizerName.adamw_8bit):
        module = network()
        curves[name] = losses(module, optimizer_of(module, name), range(150))
        ends[name] = torch.cat([p.detach().flatten() for p in module.parameters()])
    for exact, low in zip(curves[OptimizerName.adamw][::20], curves[OptimizerName.adamw_8bit][::20]):
        assert low == pytest.approx(exact, rel=0.05)
    way = (ends[OptimizerName.adamw] - start).norm()
    assert (ends[OptimizerName.adamw_8bit] - ends[OptimizerName.adamw]).norm() < 0.1 * way
    assert curves[OptimizerName.adamw][-1] < 0.1 * curves[OptimizerName.adamw][0]


@installed
def test_states_take_the_bytes_that_are_counted() -> None:
    module = network()
    optimizer = optimizer_of(module, OptimizerName.adamw_8bit)
    losses(module, optimizer, range(1))
    state = optimizer.state_dict()["0"]["state"]
    taken = [sum(v.nbytes for v in entries.values() if hasattr(v, "nbytes")) for entries in state.values()]
    large = [96 * 101, 101 * 64]
    blocks = [38, 26]  # of 256, the last ones short
    expected = [2 * (size + 4 * count) for size, count in zip(large, blocks)] + [2 * 4 * 64]
    assert sorted(taken) == sorted(expected)
    share = sum(expected[:2]) / sum(large)
    assert share == pytest.approx(STATE_BYTES[OptimizerName.adamw_8bit], rel=0.01)


@installed
def test_it_goes_on_from_files_bit_for_bit(tmp_path: Path) -> None:
    whole, half = network(), network()
    uninterrupted = optimizer_of(whole, OptimizerName.adamw_8bit)
    losses(whole, uninterrupted, range(6))
    first = optimizer_of(half, OptimizerName.adamw_8bit)
    losses(half, first, range(3))
    state_file.write(tmp_path, first.state_dict())
    assert b"pickle" not in (tmp_path / "state.json").read_bytes()
    resumed = copy.deepcopy(half)
    second = optimizer_of(resumed, OptimizerName.adamw_8bit)
    second.load_state_dict(state_file.read(tmp_path))
    losses(resumed, second, range(3, 6))
    for mine, theirs in zip(resumed.parameters(), whole.parameters()):
        assert torch.equal(mine, theirs)
    states = [_tensors(optimizer.state_dict()) for optimizer in (second, uninterrupted)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*states, strict=True))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def low_bit() -> Config:
    config = Config()
    config.learner.optimizer.name = OptimizerName.adamw_8bit
    return config


def test_without_the_library_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "trainer.memory.low_bit", raising=False)
    with pytest.raises(ValueError, match="bitsandbytes") as caught:
        optimizer_of(network(), OptimizerName.adamw_8bit)
    with pytest.raises(UserError) as earlier:
        check_packages(low_bit())
    assert str(caught.value) == str(earlier.value) == NEEDS_BITSANDBYTES
    assert "pip install 'bitsandbytes>=0.50'" in NEEDS_BITSANDBYTES


def test_slices_of_ranks_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        check_ranks(low_bit(), World(size=2))
    assert str(caught.value) == (
        "learner.optimizer.name=adamw_8bit scales blocks of whole matrices, which learner.parallel.shard=2 "
        "and tensor=1 cut in slices: choose another, or set both to 1 and learner.parallel.replicate=2."
    )
