"""Aggregation: one weight a token, from counts of the whole mini-batch.

A loss is then `sum(weight * token_loss)`. As the weights hold the global denominators, that sum does not
depend on how the mini-batch is split over micro-batches or ranks; a mean of micro-batch means would
(lengths 2 and 8, losses 1 and 0: 0.5 instead of 0.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from rlhf.algorithms.config import Aggregation


@dataclass(slots=True, kw_only=True)
class TokenWeights:
    """The share of every token of a mini-batch in its loss."""

    weights: list[list[float]]
    """One list a response, one number a token; zero where the mask is."""
    empty_responses: int
    """Responses without a token to learn from. They count neither above nor below the fraction line."""


def token_weights(
    masks: Sequence[Sequence[bool]],
    groups: Sequence[Hashable],
    mode: Aggregation,
    max_tokens: int = 0,
) -> TokenWeights:
    """Weights of one mini-batch, from the counts of all of it.

    masks: one a response, True on tokens to learn from. groups: the group of each response. max_tokens:
    the response limit `L`, used by seq_mean_token_sum_norm only. A mini-batch without a token to learn
    from gives zeros. Raises ValueError when a length or the limit is missing.
    """
    if len(masks) != len(groups):
        raise ValueError(f"{len(masks)} masks for {len(groups)} groups: one of each a response.")
    if mode is Aggregation.seq_mean_token_sum_norm and max_tokens < 1:
        raise ValueError(
            f"algorithm.aggregation={mode} divides by the response limit, which is {max_tokens}: "
            "set rollout.max_new_tokens."
        )
    lengths = [sum(map(bool, mask)) for mask in masks]
    shares = _shares(lengths, groups, mode, max_tokens)
    return TokenWeights(
        weights=[[share if token else 0.0 for token in mask] for share, mask in zip(shares, masks)],
        empty_responses=lengths.count(0),
    )


def _shares(
    lengths: list[int], groups: Sequence[Hashable], mode: Aggregation, max_tokens: int
) -> list[float]:
    """The weight of one token of each response; 0 for a response without tokens."""
    group_tokens: Counter[Hashable] = Counter()
    for length, group in zip(lengths, groups):
        group_tokens[group] += length
    responses = sum(length > 0 for length in lengths)
    filled_groups = sum(count > 0 for count in group_tokens.values())

    def share(length: int, group: Hashable) -> float:
        if length == 0:
            return 0.0
        match mode:
            case Aggregation.token_mean:
                return 1.0 / sum(lengths)
            case Aggregation.token_mean_group:
                return 1.0 / (filled_groups * group_tokens[group])
            case Aggregation.seq_mean_token_mean:
                return 1.0 / (responses * length)
            case Aggregation.seq_mean_token_sum:
                return 1.0 / responses
            case Aggregation.seq_mean_token_sum_norm:
                return 1.0 / (responses * max_tokens)

    return [share(length, group) for length, group in zip(lengths, groups)]


def row_sum(values: torch.Tensor, row_ids: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum of each row's tokens: `[M]` values and row numbers to `[rows]`."""
    return values.new_zeros(rows).index_add_(0, row_ids, values)


def row_mean(values: torch.Tensor, row_ids: torch.Tensor, rows: int) -> torch.Tensor:
    """Mean over each row's tokens, `[M]` to `[rows]`; 0 for a row without tokens."""
    counts = torch.bincount(row_ids, minlength=rows).clamp(min=1)
    return row_sum(values, row_ids, rows) / counts
