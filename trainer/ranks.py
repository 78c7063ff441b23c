"""`Ranks`: what a learner asks of the processes that train one model with it; `Alone` when there are none.

`trainer.parallel` has the other implementation. A learner calls all of this in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.master_weights import MasterWeights
from trainer.policy import Policy

Like = Mapping[tuple[Any, ...], Tensor]
"""Tensors by the keys that lead to what is to be cut like them."""


class Ranks(Protocol):
    """The ranks of one learner, seen from one of them."""

    size: int
    """Ranks that learn from different rows. Gradients arrive as their mean, so each scales its loss by it."""

    def place(self, policy: Policy, dtype: torch.dtype) -> MasterWeights:
        """Spread a policy over the ranks, to compute in `dtype`; what the optimizer steps on."""
        ...

    def most(self, count: int) -> int:
        """The largest `count` of any rank."""
        ...

    def defer(self, policy: Policy, more: bool) -> None:
        """Say before a backward pass whether `more` follow before the step: the last one may then sum for
        all of them what crosses from copy to copy of the model."""
        ...

    def rest(self, policy: Policy) -> None:
        """Let go of what a policy gathered for passes without a backward."""
        ...

    def exchange(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's report, in the order of ranks, on every rank. Plain values only."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which every rank may hold a part."""
        ...

    def part(self, tensor: Tensor) -> Tensor:
        """What this process holds of it."""
        ...

    def collect(self, state: dict[str, Any], like: Like) -> dict[str, Any]:
        """Nested state with every tensor whole, on the CPU of the first rank; empty on the others.

        What lies where `like` has a tensor (see `spread`), in the shape of this rank's part of it, is a part.
        """
        ...

    def spread(self, state: dict[str, Any], like: Like) -> dict[str, Any]:
        """The first rank's nested state on every rank; the others give an empty one.

        Of each tensor comes the part that the rank holds of the one in `like`, found by the path of keys that
        leads to it or to what holds it; where there is none, or one of another shape, the whole tensor.
        """
        ...


class Alone:
    """One process."""

    size = 1

    def place(self, policy: Policy, dtype: torch.dtype) -> MasterWeights:
        """Cast the policy and keep float32 masters."""
        return MasterWeights(policy, dtype)

    def most(self, count: int) -> int:
        """Its own."""
        return count

    def defer(self, policy: Policy, more: bool) -> None:
        """Nothing crosses."""

    def rest(self, policy: Policy) -> None:
        """Nothing was gathered."""

    def exchange(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """Its own."""
        return [report]

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def part(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def collect(self, state: dict[str, Any], like: Like) -> dict[str, Any]:
        """The state."""
        return state

    def spread(self, state: dict[str, Any], like: Like) -> dict[str, Any]:
        """The state."""
        return state
