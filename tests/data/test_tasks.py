"""Procedural tasks: closed counts, exact prompts, splits that are disjoint by unordered operands."""

from __future__ import annotations

import itertools
from math import comb
from typing import Any

import pytest

from rlhf.data.config import DataConfig, SourceConfig
from rlhf.data.examples import Example
from rlhf.data.splits import Splits, load_splits
from rlhf.data.tasks import build_task
from rlhf.errors import UserError


def task(path: str, **args: Any) -> list[Example]:
    return list(build_task(path, "t", args))


def cut(path: str, validation: int, heldout: int, **args: Any) -> Splits:
    sources = {"t": SourceConfig(path=path, args=args)}
    return load_splits(DataConfig(sources=sources, validation=validation, heldout=heldout))


def everything(splits: Splits) -> list[Example]:
    return [*splits.train["t"], *splits.validation, *splits.heldout]


def test_the_demo() -> None:
    rows = task("sums")
    assert len(rows) == 90 * 90
    by_prompt = {row.prompt: row for row in rows}
    row = by_prompt["What is 11 + 21? Answer with the number only."]
    assert row.answer == "32"
    assert row.key == by_prompt["What is 21 + 11? Answer with the number only."].key
    assert row.row["operands"] == [11, 21]
    splits = cut("sums", 200, 200)
    assert (len(splits.validation), len(splits.heldout)) == (200, 200)
    left = len(everything(splits)) + splits.counts["t"].withheld
    assert left == 8100
    assert {row.key for row in everything(splits)} == {row.key for row in rows}


@pytest.mark.parametrize(
    ("path", "args"),
    [
        ("sums", {}),
        ("sums", {"terms": 3, "digits": 1}),
        ("sums", {"terms": 3, "digits": 3, "size": 3000}),
        ("products", {"low": 0, "high": 19}),
        ("products", {"terms": 3, "low": 2, "high": 12}),
    ],
)
def test_splits_are_disjoint_by_unordered_operands(path: str, args: dict[str, Any]) -> None:
    splits = cut(path, 40, 50, **args)
    sides = [splits.train["t"], splits.validation, splits.heldout]
    operands = [{tuple(sorted(row.row["operands"])) for row in side} for side in sides]
    assert [len(side) for side in operands[1:]] == [40, 50]
    for left, right in itertools.combinations(operands, 2):
        assert not left & right


def test_training_keeps_both_orders() -> None:
    splits = cut("sums", 0, 10, digits=1)
    prompts = {tuple(row.row["operands"]) for row in splits.train["t"]}
    assert all((b, a) in prompts for a, b in prompts)
    assert len({tuple(sorted(p)) for p in prompts}) == comb(11, 2) - 10


@pytest.mark.parametrize(
    ("path", "operands", "answer"), [("sums", [3, 4, 5], "12"), ("products", [3, 4, 5], "60")]
)
def test_three_terms(path: str, operands: list[int], answer: str) -> None:
    rows = task(path, terms=3, digits=1)
    assert len(rows) == 1000
    row = next(row for row in rows if row.row["operands"] == operands)
    assert row.answer == answer
    assert (
        row.prompt
        == f"What is {' + '.join('345') if path == 'sums' else '3 * 4 * 5'}? Answer with the number only."
    )


def test_every_answer_is_right() -> None:
    for row in task("sums", digits=2) + task("products", digits=2):
        left, right = row.row["operands"]
        assert row.answer == str(left + right if row.row["task"] == "sums" else left * right)


def test_digits_and_bounds() -> None:
    assert {n for row in task("sums", digits=1) for n in row.row["operands"]} == set(range(10))
    assert {n for row in task("sums", low=7, high=9) for n in row.row["operands"]} == {7, 8, 9}
    drawn = [n for row in task("sums", digits=4, size=500) for n in row.row["operands"]]
    assert min(drawn) >= 1000
    assert max(drawn) <= 9999


def test_a_draw_is_distinct_and_a_function_of_its_seed() -> None:
    first, again, other = (task("sums", digits=5, size=400, seed=s) for s in (1, 1, 2))
    assert [row.prompt for row in first] == [row.prompt for row in again]
    assert [row.prompt for row in first] != [row.prompt for row in other]
    assert len({row.prompt for row in first}) == 400


def test_held_out_does_not_depend_on_the_size_of_the_other_sets() -> None:
    small, large = cut("sums", 0, 50), cut("sums", 300, 50)
    assert [row.prompt for row in small.heldout] == [row.prompt for row in large.heldout]
    assert [row.prompt for row in cut("sums", 0, 80).heldout[:50]] == [row.prompt for row in small.heldout]


def test_held_out_sums_look_like_all_sums() -> None:
    """A hash picks them, so their mean is that of all pairs: 109, with a standard error of 36.7/sqrt(200)."""
    answers = [int(row.answer or 0) for row in cut("sums", 200, 200).heldout]
    assert abs(sum(answers) / 200 - 109) < 3 * 36.7 / 200**0.5


def test_question_text_is_settable() -> None:
    assert task("sums", digits=1, question="{expression} =")[12].prompt == "1 + 2 ="


@pytest.mark.parametrize(
    ("path", "args", "sentence"),
    [
        ("sums", {"terms": 4}, "data.sources.t.args: terms=4 must be 2 or 3."),
        ("sums", {"digits": 0}, "data.sources.t.args: digits=0 must lie in 1..9."),
        (
            "sums",
            {"low": 5, "high": 5},
            "data.sources.t.args: low=5 and high=5 leave fewer than two numbers.",
        ),
        ("sums", {"size": 0}, "data.sources.t.args: size=0 must be at least 1."),
        ("sums", {"question": "Add."}, "data.sources.t.args: question must contain {expression}."),
        ("sums", {"digits": "two"}, "data.sources.t.args.digits=two must be a whole number."),
        ("sums", {"digits": True}, "data.sources.t.args.digits=True must be a whole number."),
        ("sums", {"question": 3}, "data.sources.t.args.question=3 must be a text."),
        (
            "sums",
            {"digit": 2},
            "data.sources.t.args.digit is unknown: the arguments are terms, digits, low, high, size, seed,",
        ),
        ("sumz", {}, "data.sources.t.path=sumz is no task: use sums, products or reasoning_gym:<name>."),
        (
            "reasoning_gym:chain_sums",
            {},
            "data.sources.t.path: reasoning-gym has no task 'chain_sums': did you mean chain_sum?",
        ),
        ("reasoning_gym:chain_sum", {"terms": 2}, "data.sources.t.args: chain_sum refuses them"),
        (
            "reasoning_gym:chain_sum",
            {"size": -1},
            "data.sources.t.args.size=-1 must be a whole number of 1 or more.",
        ),
    ],
)
def test_bad_arguments(path: str, args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        task(path, **args)
    assert str(caught.value).startswith(sentence)


ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_reasoning_gym_rows_are_distinct_and_scored_by_their_own_scorer() -> None:
    import reasoning_gym

    rows = task("reasoning_gym:chain_sum", size=150, **ONE_DIGIT)
    assert len(rows) == len({row.prompt for row in rows}) == 150
    scorer = reasoning_gym.get_score_answer_fn("chain_sum")
    assert all(scorer(row.answer, row.row) == 1.0 for row in rows)


def test_reasoning_gym_repeats_are_not_counted_twice() -> None:
    """One-digit sums and differences of two terms have no more than 9 * 9 * 2 questions."""
    assert len(task("reasoning_gym:chain_sum", size=2000, **ONE_DIGIT)) <= 200


@pytest.mark.parametrize("name", ["chain_sum", "products", "gcd", "leg_counting", "letter_counting"])
def test_reasoning_gym_splits_are_disjoint(name: str) -> None:
    splits = cut(f"reasoning_gym:{name}", 20, 30, size=300)
    keys = [{row.key for row in side} for side in (splits.train["t"], splits.validation, splits.heldout)]
    assert [len(side) for side in keys[1:]] == [20, 30]
    for left, right in itertools.combinations(keys, 2):
        assert not left & right


def test_reasoning_gym_operands_in_another_order_are_one_problem() -> None:
    rows = task("reasoning_gym:products", size=150, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    keys = {tuple(sorted(map(int, row.row["metadata"]["expression"].split(" * ")))): row.key for row in rows}
    assert len(set(keys.values())) == len(keys) < len(rows)
