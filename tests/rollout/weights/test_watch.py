"""What the learner sends is compared with what it sent last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rollout.weights.watch import Change, SourceWatch

NAMES = [f"layers.{layer}.{part}.weight" for layer in range(4) for part in ("q", "k", "norm")]


def model(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(64) if "norm" in name else torch.randn(48, 80, generator=generator) * 0.05
        for name in NAMES
    }


def updated(weights: dict[str, Tensor], rate: float = 1e-5, seed: int = 1) -> dict[str, Tensor]:
    """Every weight moved by `rate` up or down, as Adam's first step does."""
    generator = torch.Generator().manual_seed(seed)
    return {n: t + rate * torch.randn(t.shape, generator=generator).sign() for n, t in weights.items()}


def looked(watch: SourceWatch, weights: dict[str, Tensor]) -> Change:
    change = watch.look(weights)
    watch.keep(change)
    return change


def test_the_first_version_has_nothing_to_be_compared_with() -> None:
    change = SourceWatch(frozen=()).look(model())
    assert (change.moved, change.unchanged, change.problems) == ({}, 0, [])


def test_an_update_is_measured() -> None:
    watch = SourceWatch(frozen=())
    looked(watch, model())
    change = looked(watch, updated(model()))
    assert change.problems == []
    assert change.unchanged == 0
    assert change.moved["layers.0.q.weight"] == pytest.approx(1e-5 / 0.05, rel=0.05)
    assert change.moved["layers.0.norm.weight"] == pytest.approx(1e-5, rel=0.05)


def test_swaps_are_found_at_any_distance() -> None:
    watch = SourceWatch()
    looked(watch, model())
    weights = updated(model())
    one, other = "layers.1.k.weight", "layers.3.q.weight"
    weights[one], weights[other] = weights[other], weights[one]
    assert watch.look(weights).problems == [
        f"{one} holds the weights of {other}",
        f"{other} holds the weights of {one}",
    ]
    assert watch.look(weights).most(2) in ([one, other], [other, one])


def test_a_large_step_is_no_swap() -> None:
    watch = SourceWatch()
    looked(watch, model())
    assert watch.look(updated(model(), rate=0.05)).problems == []
    assert watch.look(model(seed=9)).problems == []


def test_equal_vectors_that_trade_places_are_no_swap() -> None:
    """Norms all start at one: which is whose cannot be told, and does not matter."""
    watch = SourceWatch()
    looked(watch, model())
    assert looked(watch, updated(model(), rate=0.01)).problems == []


def test_a_layer_left_from_before_is_found() -> None:
    watch = SourceWatch(frozen=())
    old = model()
    looked(watch, old)
    weights = updated(old) | {name: tensor for name, tensor in old.items() if ".2." in name}
    (problem,) = watch.look(weights).problems
    assert problem.startswith("layers.2.q.weight, layers.2.k.weight, layers.2.norm.weight did not change")


def test_frozen_tensors_are_never_stale() -> None:
    old = model()
    kept = {name: tensor for name, tensor in old.items() if ".2." in name}
    for watch in (SourceWatch(frozen=set(kept)), SourceWatch()):
        looked(watch, old)
        weights = old
        for seed in range(3):
            weights = updated(weights, seed=seed) | kept
            assert looked(watch, weights).problems == []


def test_without_a_list_of_the_frozen_a_tensor_that_has_changed_before_must_change() -> None:
    watch = SourceWatch()
    first = model()
    looked(watch, first)
    second = updated(first)
    looked(watch, second)
    stale = {name: tensor for name, tensor in second.items() if ".2." in name}
    (problem,) = watch.look(updated(second, seed=2) | stale).problems
    assert problem.count("layers.2.") == problem.count("layers.") == 3


def test_rate_zero_is_no_fault() -> None:
    watch = SourceWatch(frozen=())
    looked(watch, model())
    change = watch.look(model())
    assert change.problems == []
    assert change.unchanged == len(NAMES)


def test_a_refused_version_is_not_remembered() -> None:
    watch = SourceWatch(frozen=())
    looked(watch, model())
    watch.look(model(seed=4))
    assert watch.look(model()).unchanged == len(NAMES)


def test_what_is_remembered_is_a_copy() -> None:
    watch = SourceWatch(frozen=())
    weights = model()
    looked(watch, weights)
    for tensor in weights.values():
        tensor.add_(1e-3)
    assert watch.look(weights).unchanged == 0
