"""How two states are compared, and what a replay says and exits with."""

from __future__ import annotations

import math
from typing import Any

import torch

from rlhf.replay_result import Comparison, Replay, compare


def made(**changes: Any) -> Replay:
    """A replay that agrees with its run in everything."""
    values: dict[str, Any] = {
        "name": "demo@2",
        "changes": [],
        "groups": 1,
        "responses": 8,
        "metrics": {"policy/loss": 0.5, "learner/grad_norm": math.nan},
        "recorded": {"policy/loss": 0.5, "learner/grad_norm": math.nan, "time/step": 3.0},
        "update": Comparison(tensors=3, different=3, distance=0.25, worst="a"),
        "unsaved": "",
        "recorded_update": None,
        "saved": {},
    }
    return Replay(**{**values, **changes})


def test_tensors_are_compared_to_the_last_bit_and_by_norm() -> None:
    ours = {"a": torch.tensor([1.0, 2.0]), "b": [torch.zeros(2), {"c": torch.ones(1)}], "n": 3}
    theirs = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor([3.0, 0.0]), {"c": torch.tensor([5.0])}]}
    assert compare(ours, ours) == Comparison(tensors=3, different=0, distance=0.0, worst="")
    assert compare(ours, theirs) == Comparison(tensors=3, different=2, distance=5.0, worst="b/1/c")
    assert compare(ours, {"a": torch.zeros(3)}).distance == math.inf


def test_equal_numbers_are_the_same_update() -> None:
    found = made()
    assert (found.status, found.different) == (0, [])
    assert [name for name, _, _ in found.rows] == ["learner/grad_norm", "policy/loss"]
    assert found.text().splitlines()[-1] == "The same update, bit for bit."


def test_one_other_number_or_tensor_is_not() -> None:
    other = made(metrics={"policy/loss": 0.75})
    assert (other.status, other.different) == (1, ["learner/grad_norm", "policy/loss"])
    assert other.text().splitlines()[5:7] == [
        "learner/grad_norm               -             nan",
        "policy/loss                  0.75             0.5        +0.25",
    ]
    weights = Comparison(tensors=3, different=1, distance=0.125, worst="a")
    moved = Comparison(tensors=3, different=3, distance=0.5, worst="a")
    far = made(saved={"weights": weights}, recorded_update=moved)
    assert (far.status, far.different) == (1, ["weights"])
    assert far.text().splitlines()[2:4] == [
        "norm of the update: 0.25, recorded 0.5",
        "weights: 1 of 3 tensors are not the saved ones, distance 0.125 (25.00% of the recorded update), "
        "largest in a",
    ]
    assert made(saved={"weights": weights}, changes=["learner.optimizer.lr=1 (was 2)"]).status == 0


def test_nothing_to_compare_with_is_no_success() -> None:
    assert made(recorded={}).status == 1
