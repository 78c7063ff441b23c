"""Packing: what lands where, what is left out, what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.samples import make_row, random_rows
from trainer.packing import pack


def test_layout_of_one_group() -> None:
    rows = [make_row([1, 2, 3], [4, 5, 6]), make_row([1, 2, 3], [7])]
    (batch,) = pack(rows, 100, share_prompts=True)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5]  # The last response token is only a target.
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert batch.predictors.tolist() == [2, 3, 4, 2]
    assert batch.targets.tolist() == [4, 5, 6, 7]
    assert batch.row_ids.tolist() == [0, 0, 0, 1]
    assert batch.spans[0].response_starts == [3, 5]
    assert batch.spans[0].response_lengths == [2, 0]
    assert batch.rows == 2
    assert batch.row_indices == [0, 1]
    assert batch.unshared_tokens == 8


def test_without_sharing_every_row_has_its_prompt() -> None:
    rows = [make_row([1, 2, 3], [4, 5, 6]), make_row([1, 2, 3], [7])]
    (batch,) = pack(rows, 100, share_prompts=False)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.predictors.tolist() == [2, 3, 4, 7]
    assert batch.tokens == batch.unshared_tokens == 8


def test_group_over_the_budget_is_split_and_its_prompt_repeated() -> None:
    rows = [make_row([1, 2, 3, 4], [5] * 4) for _ in range(5)]
    batches = pack(rows, 11, share_prompts=True)  # 4 + 2 * 3 fits, 4 + 3 * 3 does not.
    assert [batch.tokens for batch in batches] == [10, 10, 7]
    assert sorted(index for batch in batches for index in batch.row_indices) == [0, 1, 2, 3, 4]
    assert all(batch.input_ids[:4].tolist() == [1, 2, 3, 4] for batch in batches)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [30, 64, 1000])
def test_every_row_once_and_within_budget(budget: int, share: bool) -> None:
    rows = random_rows(groups=12, samples=4, seed=budget, shortest=0)
    batches = pack(rows, budget, share)
    present = sorted(index for batch in batches for index in batch.row_indices)
    assert present == [index for index, row in enumerate(rows) if row.response_ids]
    for batch in batches:
        assert batch.tokens <= budget
        assert batch.tokens == batch.position_ids.numel() == sum(span.length for span in batch.spans)
        for place, index in enumerate(batch.row_indices):
            mine = batch.row_ids == place
            assert batch.targets[mine].tolist() == rows[index].response_ids
            assert torch.allclose(batch.advantages[mine], torch.tensor(rows[index].advantages))


def test_first_fit_fills_the_batches() -> None:
    rows = [make_row([1] * 5, [2] * 6, group) for group in range(9)]
    assert [batch.tokens for batch in pack(rows, 30, True)] == [30, 30, 30]


def test_row_over_the_budget_stands_alone() -> None:
    rows = [make_row([1] * 5, [2] * 30, 0), make_row([1] * 5, [2] * 3, 1)]
    assert [batch.tokens for batch in pack(rows, 10, True)] == [34, 7]


def test_only_empty_responses_make_no_batch() -> None:
    assert pack([make_row([1, 2], [])], 10, True) == []


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="group 0 have different prompts"):
        pack([make_row([1, 2], [3]), make_row([1, 3], [3])], 100, True)
    with pytest.raises(ValueError, match="empty prompt"):
        pack([make_row([], [3])], 100, True)
    row = make_row([1], [2, 3])
    row.old_logprobs = [0.0]
    with pytest.raises(ValueError, match="old_logprobs has 1 entries for 2"):
        pack([row], 100, True)
    row.old_logprobs = [0.0, 0.0]
    with pytest.raises(ValueError, match="set on 1 of 2 rows"):
        pack([row, make_row([1], [2])], 100, True)
