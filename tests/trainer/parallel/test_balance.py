"""Rows to ranks: groups together, costs even, the same every time."""

from __future__ import annotations

import pytest

from tests.trainer.samples import make_row, random_rows, tiny_model
from trainer.parallel.balance import Costs, deal
from trainer.policy import Policy

CHEAP = Costs(per_key=0.0, shares_prompts=True)


def test_costs_count_a_shared_prompt_once_and_attention_by_its_keys() -> None:
    rows = [make_row([1] * 10, [2] * 5), make_row([1] * 10, [2] * 3)]
    assert CHEAP.of_rows(rows) == 10 + 4 + 2
    assert Costs(0.0, shares_prompts=False).of_rows(rows) == 2 * 10 + 4 + 2
    keys = 55 + (4 * 10 + 10) + (2 * 10 + 3)
    assert Costs(0.5, shares_prompts=True).of_rows(rows) == 16 + 0.5 * keys
    assert CHEAP.of_rows([make_row([1] * 10, [])]) == 0


def test_costs_of_a_model() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    weights = sum(p.numel() for p in layers.parameters()) + 48  # the last norm
    assert Costs.of(Policy(model)).per_key == pytest.approx(4 * 2 * 48 / (2 * weights))


def test_a_long_row_outweighs_many_short_ones_of_as_many_tokens() -> None:
    long = make_row([1], [2] * 400, group=0)
    short = [make_row([1], [2] * 40, group=1 + index) for index in range(10)]
    counted = deal([long, *short], 2, CHEAP)
    priced = deal([long, *short], 2, Costs(per_key=0.02, shares_prompts=True))
    assert len(counted[0]) == 1
    assert len(priced[0]) == 1
    squared = Costs(per_key=0.02, shares_prompts=True)
    assert squared.of_rows([long]) > 2 * sum(squared.of_rows([row]) for row in short)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_goes_to_one_rank_and_groups_stay_together(ranks: int) -> None:
    rows = random_rows(groups=6, samples=4)
    shares = deal(rows, ranks, CHEAP)
    assert sorted(index for share in shares for index in share) == list(range(len(rows)))
    assert all(share == sorted(share) for share in shares)
    owners = [{rows[index].group for index in share} for share in shares]
    assert sum(map(len, owners)) == 6
    assert shares == deal(rows, ranks, CHEAP)


def test_loads_are_even() -> None:
    rows = random_rows(groups=64, samples=4, longest=60)
    costs = Costs(per_key=0.01, shares_prompts=True)
    for ranks in (2, 4):
        loads = [
            sum(costs.of_rows([r for r in rows if r.group == group]) for group in groups)
            for groups in ({rows[i].group for i in share} for share in deal(rows, ranks, costs))
        ]
        assert max(loads) < 1.05 * min(loads)


def test_rows_without_a_shared_prompt_are_dealt_one_by_one() -> None:
    rows = random_rows(groups=1, samples=4, shortest=5, longest=5)
    shares = deal(rows, 2, Costs(per_key=0.0, shares_prompts=False))
    assert list(map(len, shares)) == [2, 2]
