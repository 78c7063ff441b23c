"""Token weights: the sheet's toy values, masks, and invariance to every split of a mini-batch."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from rlhf.algorithms.aggregation import row_mean, row_sum, token_weights
from rlhf.algorithms.config import Aggregation, Ratio
from rlhf.algorithms.losses import build_loss
from tests.algorithms.toy import Bigram, grpo, micro_batch


def full(lengths: list[int]) -> list[list[bool]]:
    return [[True] * length for length in lengths]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", 0.2),
        ("token_mean_group", 0.2),
        ("seq_mean_token_mean", 0.5),
        ("seq_mean_token_sum", 1.0),
        ("seq_mean_token_sum_norm", 0.125),
    ],
)
def test_toy_values(mode: str, expected: float) -> None:
    """Lengths (2, 8), token losses (1, 0), one group, L = 8."""
    weights = token_weights(full([2, 8]), [0, 0], Aggregation(mode), max_tokens=8).weights
    assert sum(weights[0]) == pytest.approx(expected)


def test_token_mean_group_averages_groups() -> None:
    """Groups of 2 + 8 and 4 + 1 tokens: one token of the first weighs 1/20, of the second 1/10."""
    weights = token_weights(full([2, 8, 4, 1]), ["a", "a", "b", "b"], Aggregation.token_mean_group).weights
    assert weights == [[0.05] * 2, [0.05] * 8, [0.1] * 4, [0.1]]


@pytest.mark.parametrize("mode", list(Aggregation))
def test_masked_tokens_count_neither_above_nor_below(mode: Aggregation) -> None:
    masks = [[True, False, True], [False] * 4, [True] * 3, [False] * 2]
    got = token_weights(masks, [0, 0, 1, 2], mode, max_tokens=10)
    without = token_weights(full([2, 3]), [0, 1], mode, max_tokens=10).weights
    assert got.weights == [[without[0][0], 0.0, without[0][1]], [0.0] * 4, without[1], [0.0] * 2]
    assert got.empty_responses == 2


@pytest.mark.parametrize("mode", list(Aggregation))
def test_fully_masked_mini_batch_is_zeros_and_says_so(mode: Aggregation) -> None:
    got = token_weights([[False] * 3, []], [0, 1], mode, max_tokens=5)
    assert got.weights == [[0.0] * 3, []]
    assert got.empty_responses == 2


def test_missing_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set rollout\.max_new_tokens"):
        token_weights(full([2]), [0], Aggregation.seq_mean_token_sum_norm)
    with pytest.raises(ValueError, match="1 masks for 2 groups"):
        token_weights(full([2]), [0, 0], Aggregation.token_mean)


def test_row_sums_and_means() -> None:
    values, rows = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 2])
    assert row_sum(values, rows, 4).tolist() == [3.0, 0.0, 3.0, 0.0]
    assert row_mean(values, rows, 4).tolist() == [1.5, 0.0, 3.0, 0.0]


def splits_of(count: int) -> list[list[list[int]]]:
    """1 x 32, 4 x 8, 32 x 1, random dynamic splits in random order, and uneven 2 and 4 ranks."""
    order = list(range(count))
    fixed = [[order], [order[i : i + 8] for i in range(0, count, 8)], [[i] for i in order]]
    shuffled = random.Random(5)
    dynamic = []
    for _ in range(3):
        shuffled.shuffle(order)
        cuts = [0, *sorted(shuffled.sample(range(1, count), 6)), count]
        dynamic.append([order[a:b] for a, b in pairwise(cuts)])
    ranks = [[order[:3], order[3:]], [order[:1], order[1:20], order[20:22], order[22:]]]
    return fixed + dynamic + ranks


@pytest.mark.parametrize("ratio", list(Ratio))
@pytest.mark.parametrize("mode", list(Aggregation))
def test_gradient_does_not_depend_on_the_split(mode: Aggregation, ratio: Ratio) -> None:
    """Micro-batches, dynamic splits and simulated ranks of unequal token counts, fp32 losses."""
    policy, chance = Bigram(), random.Random(1)
    lengths = [chance.randint(1, 30) for _ in range(32)]
    responses = policy.rows(lengths)
    masks = [[chance.random() > 0.1 for _ in range(length)] for length in lengths]
    weights = token_weights(masks, [i // 4 for i in range(32)], mode, max_tokens=30).weights
    advantages = torch.randn(32, generator=policy.generator)
    old = [
        policy.logprobs(r).detach().float() + 0.1 * torch.randn(len(r), generator=policy.generator)
        for r in responses
    ]
    loss = build_loss(grpo(ratio=ratio))

    def gradient(split: list[list[int]]) -> torch.Tensor:
        for rows in split:
            sizes = torch.tensor([lengths[i] for i in rows])
            inputs = micro_batch(
                torch.cat([policy.logprobs(responses[i]) for i in rows]).float(),
                old=torch.cat([old[i] for i in rows]),
                advantages=advantages[rows].repeat_interleave(sizes),
                weights=torch.tensor([w for i in rows for w in weights[i]]),
                row_ids=torch.arange(len(rows)).repeat_interleave(sizes),
            )
            loss(inputs).loss.backward()
        return policy.gradient()

    whole, *others = [gradient(split) for split in splits_of(32)]
    assert whole.abs().max() > 1e-3
    for other in others:
        assert torch.allclose(other, whole, rtol=1e-5, atol=1e-6)
