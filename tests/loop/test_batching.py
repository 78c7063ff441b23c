"""Groups -> rows: advantages, masks, global weights, mini-batches."""

from __future__ import annotations

import pytest

from rlhf.algorithms.config import Aggregation, AlgorithmConfig, OverlongConfig
from rlhf.batching import assign_advantages, mini_batches, plain_rows
from rlhf.config import LoopConfig
from rollout.types import FinishReason
from tests.loop.groups import group, trajectory


def test_advantages_are_the_groups_own() -> None:
    groups = [
        group([trajectory(1, r) for r in (1, 0, 0, 0)], "a"),
        group([trajectory(1, 5.0), trajectory(1, 3.0)], "b"),
    ]
    assign_advantages(groups, AlgorithmConfig())
    first = [t.advantage for t in groups[0].trajectories]
    assert first == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert [t.advantage for t in groups[1].trajectories] == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-5)


def test_token_mean_weights_come_from_the_whole_mini_batch() -> None:
    groups = [group([trajectory(2), trajectory(8)], "a"), group([trajectory(5), trajectory(5)], "b")]
    algorithm = AlgorithmConfig(aggregation=Aggregation.token_mean)
    built = mini_batches(groups, algorithm, LoopConfig(prompts=2, group_size=2), max_new_tokens=8)
    (rows,) = built.batches
    assert [row.token_weights[0] for row in rows] == pytest.approx([1 / 20] * 4)
    assert [row.group for row in rows] == [0, 0, 1, 1]
    split = mini_batches(
        groups, algorithm, LoopConfig(prompts=2, group_size=2, mini_batch=1), max_new_tokens=8
    )
    assert [row.token_weights[0] for rows in split.batches for row in rows] == pytest.approx([1 / 10] * 4)
    assert [row.group for rows in split.batches for row in rows] == [0, 0, 1, 1]


def test_masked_and_aborted_responses_teach_nothing_and_are_counted() -> None:
    members = [
        trajectory(2),
        trajectory(4, finish=FinishReason.LENGTH),
        trajectory(3, finish=FinishReason.ABORT),
        trajectory(0),
    ]
    algorithm = AlgorithmConfig(
        aggregation=Aggregation.token_mean, overlong=OverlongConfig(mask_truncated=True)
    )
    built = mini_batches([group(members)], algorithm, LoopConfig(prompts=1, group_size=4), max_new_tokens=4)
    assert built.empty_responses == 3
    assert [row.token_weights for row in built.rows] == [[0.5, 0.5]]


def test_epochs_repeat_the_same_rows() -> None:
    groups = [group([trajectory(1)], str(i)) for i in range(4)]
    built = mini_batches(
        groups, AlgorithmConfig(), LoopConfig(prompts=4, group_size=1, mini_batch=2, epochs=3), 4
    )
    assert len(built.batches) == 6
    assert built.batches[0][0] is built.batches[2][0]
    assert len(built.rows) == 4


def moved(prompts: int, mini_batch: int, epochs: int = 1) -> list[int]:
    """Groups of the rows that want old log-probs of their own."""
    groups = [group([trajectory(1)], str(i)) for i in range(prompts)]
    loop = LoopConfig(prompts=prompts, group_size=1, mini_batch=mini_batch, epochs=epochs)
    return [row.group for row in mini_batches(groups, AlgorithmConfig(), loop, 4).moved]


def test_old_logprobs_are_wanted_where_the_policy_has_moved() -> None:
    assert moved(4, 4) == []
    assert moved(6, 2) == [2, 3, 4, 5]
    assert moved(4, 2, epochs=2) == [0, 1, 2, 3]
    assert moved(3, 3, epochs=2) == [0, 1, 2]
    assert mini_batches([], AlgorithmConfig(), LoopConfig(prompts=2), 4).moved == []


def test_a_short_or_empty_rollout() -> None:
    groups = [group([trajectory(1)], str(i)) for i in range(3)]
    loop = LoopConfig(prompts=4, group_size=1, mini_batch=2)
    assert [len(rows) for rows in mini_batches(groups, AlgorithmConfig(), loop, 4).batches] == [2, 1]
    assert mini_batches([], AlgorithmConfig(), loop, 4).batches == []
    assign_advantages([], AlgorithmConfig())


def test_plain_rows_weigh_nothing() -> None:
    rows = plain_rows([group([trajectory(2), trajectory(0)])])
    assert [row.token_weights for row in rows] == [[0.0, 0.0], []]
