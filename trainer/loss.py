"""The seam between learner and algorithm: a loss is a function of plain tensors, it knows no batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(slots=True, kw_only=True)
class LossInputs:
    """One micro-batch of `M` response tokens as a loss sees it; all float tensors are float32."""

    logprobs: Tensor
    """`[M]`, carries the gradient: log-prob of each token under the current policy."""
    entropy: Tensor
    """`[M]`, carries the gradient when the learner was asked for it: entropy in nats before each token."""
    old_logprobs: Tensor
    """`[M]`, detached; equal to `logprobs.detach()` when the rows carry none."""
    rollout_logprobs: Tensor
    """`[M]`: what the engine recorded."""
    advantages: Tensor
    """`[M]`."""
    token_weights: Tensor
    """`[M]`: aggregation, masks and global denominators, see `trainer.batch.Row.token_weights`."""
    row_ids: Tensor
    """`[M]` int64: row of each token, `0..rows-1`, contiguous; for sequence-level ratios."""
    rows: int
    reference_logprobs: Tensor | None = None
    """`[M]` or None."""


@dataclass(slots=True, kw_only=True)
class LossOutput:
    """What a loss returns for one micro-batch."""

    loss: Tensor
    """Scalar SUM over this micro-batch, weighted: micro-batches add up to the loss of the mini-batch."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Metric sums by metric name, scalars; divided by `counts` after all micro-batches were added."""
    counts: dict[str, Tensor] = field(default_factory=dict)
    """The denominator of each entry of `sums`, under the same names."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Metrics of which the largest value over the mini-batch is reported."""


class Loss(Protocol):
    """A policy loss; implementations live in `rlhf.algorithms.losses`.

    A loss that differentiates through `LossInputs.entropy` sets the attribute `needs_entropy_gradient` to
    True; without it the entropy arrives detached, which is cheaper.
    """

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The loss and its metrics for one micro-batch."""
        ...
