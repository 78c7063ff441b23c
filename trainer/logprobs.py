"""Log-probs and entropy of chosen tokens without ever holding `[tokens, vocabulary]` logits.

The head runs over slices of the vocabulary. Forward keeps running softmax statistics per position; backward
computes each slice of logits once more, so the only `[tokens, vocabulary]` work lives for one slice. Slicing
the vocabulary (and not the tokens) writes each row of the head's gradient exactly once. Positions that
predict several tokens (the end of a shared prompt) go through the head once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_SLICE_ELEMENTS = 2 << 20
"""Logits alive at once; 8 MiB in float32."""
_SMALLEST_SLICE = 512


class VocabularyRanks(Protocol):
    """Ranks that hold the same hidden states and head, of which each computes a range of the vocabulary."""

    def range(self, vocabulary: int) -> tuple[int, int]:
        """First and one past the last token of this rank; empty when they are equal."""
        ...

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each value over all ranks."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum of each value over all ranks."""
        ...


@dataclass(slots=True, frozen=True, kw_only=True)
class HeadOptions:
    """What is done to raw logits, and which gradients are wanted."""

    scale: float
    """Factor on raw logits: the model's own logit scale over the sampling temperature."""
    entropy_gradient: bool
    """Whether backward goes through the entropy; costs three more passes over the logits."""
    ranks: VocabularyRanks | None = None
    """With whom the vocabulary is shared; None computes all of it here."""


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    targets: Tensor,
    options: HeadOptions,
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets` and the entropy of their distributions.

    Args:
        hidden: `[U, D]` final hidden states.
        weight: `[V, D]` of the head; slices of it are cast to `hidden`'s format (LayerCast).
        bias: `[V]` or None.
        positions: `[M]` int64, the row of `hidden` that predicts each target.
        targets: `[M]` int64.
        options: see `HeadOptions`.

    Returns:
        `[M]` and `[M]`, float32: `log softmax(scale * (hidden @ weight.T + bias))[target]` and the entropy
        in nats.
    """
    logprobs, entropy = _HeadLogprobs.apply(hidden, weight, bias, positions, targets, options)
    entropy = entropy if options.entropy_gradient else entropy.detach()
    return logprobs, entropy.index_select(0, positions)


class _RunningSoftmax:
    """Softmax statistics of `U` rows over the slices seen so far."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._peak = torch.full((rows,), -torch.inf, device=device)
        self._total = torch.zeros(rows, device=device)
        # Sum of exp(z - peak) * (z - peak): the entropy without cancelling large logits.
        self._moment = torch.zeros(rows, device=device)

    def add(self, logits: Tensor) -> None:
        """Take in a `[U, slice]` of logits, which are overwritten."""
        peak = torch.maximum(self._peak, logits.amax(1))
        drop = torch.where(self._total > 0, self._peak - peak, 0)
        decay = drop.exp()
        logits -= peak[:, None]
        exponentials = logits.exp()
        self._moment = decay * (self._moment + drop * self._total) + logits.mul_(exponentials).sum(1)
        self._total = decay * self._total + exponentials.sum(1)
        self._peak = peak

    def join(self, ranks: VocabularyRanks) -> None:
        """Take in what other ranks saw of the vocabulary."""
        peak = ranks.largest(self._peak)
        drop = torch.where(self._total > 0, self._peak - peak, 0)
        decay = drop.exp()
        self._moment = ranks.total(decay * (self._moment + drop * self._total))
        self._total = ranks.total(decay * self._total)
        self._peak = peak

    def result(self) -> tuple[Tensor, Tensor]:
        """`[U]` log-normaliser and `[U]` entropy."""
        log_total = self._total.log()
        return self._peak + log_total, log_total - self._moment / self._total


class _HeadLogprobs(torch.autograd.Function):
    """`(logprobs [M], entropy [U])`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        statistics = _RunningSoftmax(hidden.shape[0], hidden.device)
        chosen = torch.zeros(targets.shape, device=hidden.device)
        for start, stop in _slices(hidden, weight, options.ranks):
            logits = _logits(hidden, weight, bias, start, stop, options.scale)
            picked = logits[positions, (targets - start).clamp(0, stop - start - 1)]
            chosen = torch.where((targets >= start) & (targets < stop), picked, chosen)
            statistics.add(logits)
        if options.ranks is not None:
            chosen = options.ranks.total(chosen)
            statistics.join(options.ranks)
        log_normaliser, entropy = statistics.result()
        ctx.save_for_backward(hidden, weight, bias, positions, targets, log_normaliser, entropy)
        ctx.options = options
        return chosen - log_normaliser[positions], entropy

    @staticmethod
    def backward(ctx: Any, logprob_grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, positions, targets, log_normaliser, entropy = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        row_grad = torch.zeros_like(entropy).index_add_(0, positions, logprob_grad)[:, None]
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=hidden.dtype) if wants_weight else None
        bias_grad = torch.empty_like(bias) if wants_bias else None
        for start, stop in _slices(hidden, weight, ctx.options.ranks):
            logits = _logits(hidden, weight, bias, start, stop, ctx.options.scale)
            logits -= log_normaliser[:, None]
            slope = logits.exp()
            if ctx.options.entropy_gradient:
                slope *= -(row_grad + entropy_grad[:, None] * (logits + entropy[:, None]))
            else:
                slope *= -row_grad
            inside = ((targets >= start) & (targets < stop)).nonzero()[:, 0]
            place = (positions[inside], targets[inside] - start)
            slope.index_put_(place, logprob_grad[inside], accumulate=True)
            slope *= ctx.options.scale
            narrow = slope.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad += narrow @ weight[start:stop].to(hidden.dtype)
            if weight_grad is not None:
                torch.mm(narrow.T, hidden, out=weight_grad[start:stop])
            if bias_grad is not None:
                bias_grad[start:stop] = slope.sum(0)
        if ctx.options.ranks is not None:
            hidden_grad, weight_grad, bias_grad = (
                None if grad is None else ctx.options.ranks.total(grad)
                for grad in (hidden_grad, weight_grad, bias_grad)
            )
        narrow_hidden_grad = None if hidden_grad is None else hidden_grad.to(hidden.dtype)
        narrow_weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
        return narrow_hidden_grad, narrow_weight_grad, bias_grad, None, None, None


def _slices(hidden: Tensor, weight: Tensor, ranks: VocabularyRanks | None) -> list[tuple[int, int]]:
    """Ranges of this rank's part of the vocabulary, so that one slice of logits stays small."""
    first, last = ranks.range(weight.shape[0]) if ranks is not None else (0, weight.shape[0])
    width = max(_SMALLEST_SLICE, _SLICE_ELEMENTS // max(1, hidden.shape[0]))
    return [(start, min(start + width, last)) for start in range(first, last, width)]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int, scale: float
) -> Tensor:
    """`[U, stop - start]` float32 logits of one slice, scaled; fresh memory."""
    logits = (hidden @ weight[start:stop].to(hidden.dtype).T).float()
    if bias is not None:
        logits += bias[start:stop].float()
    return logits.mul_(scale) if scale != 1.0 else logits
