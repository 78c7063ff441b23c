"""What ranks tell each other survives the way: rows, arguments, arrays; no pickle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.trainer.samples import make_row, random_rows
from trainer.batch import Row
from trainer.packing import pack
from trainer.parallel.messages import Message, rows_from_arrays, rows_to_arrays


def sent(batches: list[list[Row]]) -> list[list[Row]]:
    """`batches` after they were bytes."""
    content = Message("update", {"order": [0]}, rows_to_arrays(batches)).encode()
    return rows_from_arrays(Message.decode(content).arrays)


def test_rows_arrive_as_they_were_up_to_float32() -> None:
    rows = random_rows(groups=3, samples=2)
    rows[0].old_logprobs = [-0.5] * len(rows[0].response_ids)
    rows[1].slot = 3
    batches = [rows[:4], [], [*rows[4:], make_row([7, 8], [], group=9)]]
    arrived = sent(batches)
    assert [len(batch) for batch in arrived] == [4, 0, 3]
    for got, row in zip((r for b in arrived for r in b), (r for b in batches for r in b), strict=True):
        for item in dataclasses.fields(Row):
            mine, theirs = getattr(got, item.name), getattr(row, item.name)
            assert mine == (pytest.approx(theirs, abs=1e-6) if isinstance(theirs, list) else theirs)


def test_what_is_packed_from_them_is_the_same_to_the_last_bit() -> None:
    rows = random_rows(groups=3, samples=2)
    for mine, theirs in zip(pack(sent([rows])[0], 60, True), pack(rows, 60, True), strict=True):
        assert torch.equal(mine.input_ids, theirs.input_ids)
        assert torch.equal(mine.token_weights, theirs.token_weights)
        assert torch.equal(mine.advantages, theirs.advantages)


def test_a_prompt_is_sent_once() -> None:
    rows = [make_row(list(range(1000)), [1, 2], group=0) for _ in range(16)]
    assert len(Message("update", {}, rows_to_arrays([rows])).encode()) < 4 * 1000 + 4096


def test_commands_and_arguments() -> None:
    message = Message.decode(Message("weights", {"dtype": "bfloat16", "rate": 0.1}).encode())
    assert message == Message("weights", {"dtype": "bfloat16", "rate": 0.1}, {})
    assert sent([]) == []
