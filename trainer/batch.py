"""What the learner eats: `Row` (one response) and `TokenBatch` (a packed, padding-free micro-batch)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(slots=True, kw_only=True)
class Row:
    """One response with all that a loss needs, in plain lists; cheap to move between processes."""

    prompt_ids: list[int]
    response_ids: list[int]
    group: int
    """Rows of one group share `prompt_ids`; the prompt is then computed once."""
    advantages: list[float]
    """One per response token."""
    token_weights: list[float]
    """One per response token: its share of the loss. Carries the aggregation mode, every mask and the
    *global* denominator, so that summing over any split of the batch gives the same gradient."""
    rollout_logprobs: list[float]
    """Behaviour log-probs, one per response token, recorded by the engine."""
    old_logprobs: list[float] | None = None
    """Proximal log-probs; None means the current ones, detached."""
    reference_logprobs: list[float] | None = None
    """Log-probs of the frozen reference, when a KL term asks for them."""
    slot: int = 0
    """Adapter slot, 0 for a single adapter or none."""


@dataclass(slots=True, kw_only=True)
class GroupSpan:
    """Where one group lies in a packed batch: a prompt, then its responses, each seeing prompt + itself.

    A response of `R` tokens takes `R - 1` packed tokens: the last one is only ever a target.
    """

    prompt_start: int
    prompt_length: int
    response_starts: list[int]
    response_lengths: list[int]

    @property
    def length(self) -> int:
        """Packed tokens that the group takes."""
        return self.prompt_length + sum(self.response_lengths)


@dataclass(slots=True, kw_only=True)
class TokenBatch:
    """A packed micro-batch: `N` tokens on one line, `M` response tokens to learn from.

    With prefix sharing each `GroupSpan` holds all responses of a group behind one prompt; without it,
    one response each.
    """

    input_ids: torch.Tensor
    """`[N]` int64."""
    position_ids: torch.Tensor
    """`[N]` int64; a response goes on where its prompt ends."""
    spans: list[GroupSpan]
    predictors: torch.Tensor
    """`[M]` int64: index into `[0, N)` of the position whose hidden state predicts the token."""
    targets: torch.Tensor
    """`[M]` int64: the response tokens."""
    row_ids: torch.Tensor
    """`[M]` int64: which row of the micro-batch a token belongs to, `0..rows-1`, contiguous."""
    rows: int
    advantages: torch.Tensor
    """`[M]` float32."""
    token_weights: torch.Tensor
    """`[M]` float32, see `Row.token_weights`."""
    rollout_logprobs: torch.Tensor
    """`[M]` float32."""
    old_logprobs: torch.Tensor | None
    """`[M]` float32 or None."""
    reference_logprobs: torch.Tensor | None
    """`[M]` float32 or None."""
    slots: torch.Tensor
    """`[rows]` int64 adapter slot of each row."""
    unshared_tokens: int
    """Tokens that the same rows would take with every prompt repeated; the saving is `1 - N / unshared`."""
    row_indices: list[int]
    """Place of each row of the micro-batch in the list that was packed."""

    @property
    def tokens(self) -> int:
        """Packed tokens `N`."""
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        return replace(self, **moved)
