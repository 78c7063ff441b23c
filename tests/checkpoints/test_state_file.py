"""A state is read back as it was written: types, keys, last bits; and nothing of it is pickled."""

from __future__ import annotations

import math
import random
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlhf import randomness, state_file
from trainer.config import OptimizerConfig, OptimizerName
from trainer.optimizers import build_optimizer

PLAIN: dict[str, Any] = {
    "text": "é\n",
    "number": 0.1 + 0.2,
    "large": (1 << 63) - 1,
    "odd": [math.inf, None, True],
    "tuple": (0.9, (1, [2])),
    "keys": {0: "a", 7: {"lr": 1e-5}, "b": ()},
    "rows": [{"when": date(2026, 11, 25), "price": Decimal("0.10"), "raw": b"\x00"}],
    "tags": {"__tuple__": [1], "__date__": "no date", "__tensor__": "x"},
}


def test_plain_values_are_equal(tmp_path: Path) -> None:
    state_file.write(tmp_path / "state", PLAIN)
    assert state_file.read(tmp_path / "state") == PLAIN


def test_tensors_keep_kind_shape_and_bits(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "half": torch.randn(3, 4).bfloat16(),
        "slice": torch.randn(4, 6)[:, ::2],
        "bytes": torch.get_rng_state(),
        "nan": torch.tensor([math.nan, -0.0]),
    }
    state_file.write(tmp_path, {"a": tensors, "a/nan": torch.ones(2)})
    found = state_file.read(tmp_path)
    assert torch.equal(found["a/nan"], torch.ones(2))
    for name, tensor in tensors.items():
        again = found["a"][name]
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert (
            again.numpy().tobytes() == tensor.numpy().tobytes()
            if name != "half"
            else torch.equal(again, tensor)
        )


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", list(OptimizerName))
def test_every_optimizer_goes_on_bit_for_bit(name: OptimizerName, tmp_path: Path) -> None:
    def problem() -> tuple[list[tuple[str, nn.Parameter]], Any]:
        torch.manual_seed(0)
        named = [("w", nn.Parameter(torch.randn(4, 4))), ("b", nn.Parameter(torch.randn(4)))]
        return named, build_optimizer(OptimizerConfig(name=name, lr=0.01), named)

    def step(named: list[tuple[str, nn.Parameter]], optimizer: Any, count: int) -> None:
        for _ in range(count):
            for _, parameter in named:
                parameter.grad = parameter.detach().sin()
            optimizer.step()

    straight, first = problem()
    step(straight, first, 2)
    state_file.write(tmp_path, {"weights": dict(straight), "optimizer": first.state_dict()})
    step(straight, first, 2)

    resumed, second = problem()
    state = state_file.read(tmp_path)
    with torch.no_grad():
        for key, parameter in resumed:
            parameter.copy_(state["weights"][key])
    second.load_state_dict(state["optimizer"])
    step(resumed, second, 2)
    for (_, one), (_, other) in zip(straight, resumed):
        assert torch.equal(one, other)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a object"):
        state_file.write(tmp_path, {"x": object()})


def test_random_generators_go_on(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))

    draw()
    state_file.write(tmp_path, randomness.state_dict())
    expected = [draw() for _ in range(3)]
    randomness.load_state_dict(state_file.read(tmp_path))
    assert [draw() for _ in range(3)] == expected
