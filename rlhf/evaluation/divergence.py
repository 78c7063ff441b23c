"""How much the same greedy evaluation differs from configuration to configuration (LayerCast, section 3).

A configuration is a batch size, a thread count, a machine: whatever must not matter and does. Pure functions
of token ids and top-1 probabilities, one list a configuration, in the same order of configurations
everywhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

AGREED = -1
"""The divergence index of sequences that do not diverge."""

Responses = Sequence[Sequence[int]]
"""Token ids of one example's response under each configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """The paper's metrics over one set of problems."""

    std_accuracy: float
    """Std@Acc, as a share."""
    std_length: float
    """Avg_Std@Output_Length, tokens."""
    index: float
    """Mean divergence index of the problems that diverge; -1 when none does."""
    percent: float
    """Div_Percent: problems that diverge, in percent."""
    std_top1: float
    """Avg_Std@top1_prob, as a probability (the paper prints it times 10 000)."""


def divergence_index(responses: Responses) -> int:
    """First position at which not all responses have the same token; `AGREED` where there is none.

    A response that has ended has no token: of two that agree until one ends, it is that one's length. Raises
    ValueError for fewer than two responses.
    """
    _at_least_two(responses, "divergence_index")
    shortest, longest = (pick(map(len, responses)) for pick in (min, max))
    for position in range(shortest):
        if len({response[position] for response in responses}) > 1:
            return position
    return AGREED if shortest == longest else shortest


def divergence_percent(examples: Sequence[Responses]) -> float:
    """Div_Percent: the share of examples whose responses diverge, 0 to 100."""
    return 100 * statistics.fmean(divergence_index(responses) != AGREED for responses in examples)


def mean_divergence_index(examples: Sequence[Responses]) -> float:
    """Mean `divergence_index` of the examples that diverge, `AGREED` when none does.

    The paper does not say what the others count as. Read it beside `divergence_percent`.
    """
    found = [index for responses in examples if (index := divergence_index(responses)) != AGREED]
    return statistics.fmean(found) if found else float(AGREED)


def std_accuracy(accuracies: Sequence[float]) -> float:
    """Std@Acc: sample standard deviation (ddof 1) of the configurations' accuracies. ValueError below two."""
    _at_least_two(accuracies, "std_accuracy")
    return statistics.stdev(accuracies)


def mean_std_length(examples: Sequence[Responses]) -> float:
    """Avg_Std@Output_Length: mean over examples of the sample standard deviation of the length, in tokens."""
    return statistics.fmean(statistics.stdev(map(len, responses)) for responses in examples)


def mean_std_top1(examples: Sequence[Responses], top1: Sequence[Sequence[Sequence[float]]]) -> float:
    """Avg_Std@top1_prob: sample standard deviation of the largest token probability, its mean over the
    positions before divergence, and the mean of that over examples.

    `top1[e][c][t]` is that probability of example `e` under configuration `c` at position `t`; in greedy
    decoding it is the token's own. Examples that diverge at their first token have no such position and are
    left out; NaN when all do.
    """
    spreads = []
    for responses, probabilities in zip(examples, top1, strict=True):
        index = divergence_index(responses)
        positions = len(responses[0]) if index == AGREED else index
        if positions:
            columns = list(zip(*(row[:positions] for row in probabilities), strict=True))
            spreads.append(statistics.fmean(map(statistics.stdev, columns)))
    return statistics.fmean(spreads) if spreads else math.nan


def divergence(
    examples: Sequence[Responses],
    top1: Sequence[Sequence[Sequence[float]]],
    accuracies: Sequence[float],
) -> Divergence:
    """All of the metrics. `examples[e][c]` is a response, `top1` as in `mean_std_top1`, `accuracies[c]`.

    Raises ValueError without examples or with fewer than two configurations.
    """
    if not examples:
        raise ValueError("divergence of no examples: there was nothing to compare.")
    return Divergence(
        std_accuracy=std_accuracy(accuracies),
        std_length=mean_std_length(examples),
        index=mean_divergence_index(examples),
        percent=divergence_percent(examples),
        std_top1=mean_std_top1(examples, top1),
    )


def _at_least_two(values: Sequence[object], name: str) -> None:
    if len(values) < 2:
        raise ValueError(f"{name} compares configurations, and there are {len(values)}: give at least two.")
