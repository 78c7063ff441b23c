"""Splits: sizes, disjointness across sources, duplicates, and what is counted."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.config import DataConfig, SourceConfig, SourceKind, SourceUse
from rlhf.data.splits import Splits, load_splits
from rlhf.errors import UserError


def rows_of(count: int, prefix: str = "p") -> list[dict[str, str]]:
    return [{"prompt": f"{prefix}{i}", "answer": str(i)} for i in range(count)]


def from_rows(rows: list[dict[str, Any]], **settings: Any) -> Splits:
    return load_splits(DataConfig(**settings), rows)


def jsonl(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(examples: list[Any]) -> set[str]:
    return {example.text for example in examples}


def test_sizes_add_up() -> None:
    splits = from_rows(rows_of(100), validation=10, heldout=20)
    assert [len(splits.train["rows"]), len(splits.validation), len(splits.heldout)] == [70, 10, 20]
    sides = [prompts(splits.train["rows"]), prompts(splits.validation), prompts(splits.heldout)]
    assert len(set.union(*sides)) == 100


def test_nothing_is_held_out_unless_asked() -> None:
    splits = from_rows(rows_of(5))
    assert (len(splits.train["rows"]), splits.validation, splits.heldout) == (5, [], [])


def test_split_does_not_depend_on_the_order_of_rows() -> None:
    forward, backward = (from_rows(rows, heldout=20) for rows in (rows_of(100), rows_of(100)[::-1]))
    assert [e.text for e in forward.heldout] == [e.text for e in backward.heldout]


def test_a_hundred_copies_count_once() -> None:
    """The published DAPO-Math-17k repeats each problem about a hundred times."""
    splits = from_rows(rows_of(20) * 100, heldout=5)
    assert (len(splits.train["rows"]), len(splits.heldout)) == (15, 5)
    count = splits.counts["rows"]
    assert (count.read, count.duplicates, count.conflicts, count.withheld) == (2000, 1980, 0, 0)


def test_copies_that_are_kept_do_not_cross_the_split() -> None:
    splits = from_rows(rows_of(20) * 3, heldout=5, deduplicate=False)
    assert (len(splits.train["rows"]), len(splits.heldout)) == (45, 5)
    assert splits.counts["rows"].withheld == 10
    assert not prompts(splits.train["rows"]) & prompts(splits.heldout)


def test_white_space_and_case_do_not_make_another_problem() -> None:
    rows = [*rows_of(10, "Find  X "), *rows_of(10, "find x ")]
    splits = from_rows(rows, heldout=4)
    assert splits.counts["rows"].withheld == 4
    assert not {e.key for e in splits.train["rows"]} & {e.key for e in splits.heldout}


def test_conflicting_answers_are_counted() -> None:
    splits = from_rows([*rows_of(4), {"prompt": "p1", "answer": "other"}, {"prompt": "p2", "answer": "2"}])
    count = splits.counts["rows"]
    assert (count.duplicates, count.conflicts) == (2, 1)
    assert splits.lines() == [
        "rows: 6 rows, left out 2 duplicates, 1 of them with another answer",
        "train 4, validation 0, held out 0",
    ]


def test_dedicated_held_out_source_is_kept_apart_from_training(tmp_path: Path) -> None:
    sources = {
        "train": SourceConfig(path=jsonl(tmp_path / "train.jsonl", rows_of(50))),
        "test": SourceConfig(path=jsonl(tmp_path / "test.jsonl", rows_of(8)), use=SourceUse.heldout),
    }
    splits = load_splits(DataConfig(sources=sources, validation=5))
    assert prompts(splits.heldout) == {f"p{i}" for i in range(8)}
    assert {example.source for example in splits.heldout} == {"test"}
    assert (list(splits.train), len(splits.train["train"]), len(splits.validation)) == (["train"], 37, 5)
    assert splits.counts["train"].withheld == 8
    assert len(load_splits(DataConfig(sources=sources, heldout=3)).heldout) == 3


def test_two_sources_with_overlapping_problems_do_not_leak() -> None:
    """Held-out sums of one source are not trained on through the other, in either order of the operands."""
    sources = {
        "small": SourceConfig(path="sums", args={"low": 10, "high": 40}),
        "all": SourceConfig(path="sums", args={"low": 10, "high": 60}, use=SourceUse.train),
    }
    splits = load_splits(DataConfig(sources=sources, heldout=50))
    held = {example.key for example in splits.heldout}
    assert len(held) == 50
    assert not held & {example.key for pool in splits.train.values() for example in pool}
    assert splits.counts["all"].withheld >= 50


@pytest.mark.parametrize("heldout", ["task", "file"])
def test_a_file_that_asks_what_a_task_asks_does_not_leak(tmp_path: Path, heldout: str) -> None:
    """`sums:11,21` of the task and the text of the file are one problem, in either order of the operands."""
    rows = [
        {"prompt": "what is 21 + 11?  Answer with the number only.", "answer": "32"},
        {"prompt": "What is 11 + 21? Answer with the number only.", "answer": "32"},
        {"prompt": "What is 2 + 2?", "answer": "4"},
    ]
    used = {"task": SourceUse.train, "file": SourceUse.train, heldout: SourceUse.heldout}
    sources = {
        "task": SourceConfig(path="sums", use=used["task"], args={"low": 10, "high": 30}),
        "file": SourceConfig(path=jsonl(tmp_path / "a.jsonl", rows), use=used["file"]),
    }
    splits = load_splits(DataConfig(sources=sources))
    trained = prompts([example for pool in splits.train.values() for example in pool])
    assert not {e.key for e in splits.heldout} & {e.key for pool in splits.train.values() for e in pool}
    if heldout == "task":
        assert trained == {"What is 2 + 2?"}
    else:
        assert len(trained) == 21 * 21 - 2
        assert len(splits.heldout) == 2


def test_which_problems_are_held_out_does_not_depend_on_a_second_source(tmp_path: Path) -> None:
    task = {"sums": SourceConfig(path="sums", args={"low": 10, "high": 30})}
    alone = load_splits(DataConfig(sources=task, heldout=20)).heldout
    row = {"prompt": alone[0].text, "answer": "0"}
    file = {"file": SourceConfig(path=jsonl(tmp_path / "a.jsonl", [row]), use=SourceUse.train)}
    assert load_splits(DataConfig(sources={**file, **task}, heldout=20)).heldout == alone


def test_ids_that_repeat_are_refused() -> None:
    rows = [{"prompt": f"p{i}", "answer": "1", "uid": f"u{i % 3}"} for i in range(4)]
    with pytest.raises(UserError) as caught:
        from_rows(rows, fields={"prompt": "prompt", "answer": "answer", "id": "uid"})
    assert str(caught.value) == (
        "data.fields.id=uid names two rows of rows 'u0': name a column without repeats, or leave it out and "
        "rows are numbered."
    )


def test_copies_of_a_row_may_share_its_id() -> None:
    rows = [{"prompt": f"p{i % 3}", "answer": "1", "uid": f"u{i % 3}"} for i in range(6)]
    fields = {"prompt": "prompt", "answer": "answer", "id": "uid"}
    assert len(from_rows(rows, fields=fields).train["rows"]) == 3


def test_a_column_that_cannot_be_recorded_is_refused_at_load() -> None:
    good = {"prompt": "p0", "answer": "1", "when": datetime.date(2026, 1, 2), "cost": Decimal("1.5")}
    assert len(from_rows([good]).train["rows"]) == 1
    with pytest.raises(UserError) as caught:
        from_rows([good, {**good, "prompt": "p1", "when": {1, 2}}])
    assert str(caught.value) == (
        "the row rows:1: column 'when' holds a set, which cannot be recorded: turn that column into text or "
        "drop it."
    )


@pytest.mark.parametrize(("size", "expected"), [(10, (7, 3)), (9, (6, 3)), (1, (1, 0)), (0, (0, 0))])
def test_evaluation_rows_are_taken_by_weight(tmp_path: Path, size: int, expected: tuple[int, int]) -> None:
    sources = {
        "a": SourceConfig(path=jsonl(tmp_path / "a.jsonl", rows_of(50, "a")), weight=2.1),
        "b": SourceConfig(path=jsonl(tmp_path / "b.jsonl", rows_of(50, "b")), weight=0.9),
    }
    heldout = load_splits(DataConfig(sources=sources, heldout=size)).heldout
    assert tuple(sum(example.source == name for example in heldout) for name in "ab") == expected


def test_weights_go_with_the_sources_that_are_left(tmp_path: Path) -> None:
    sources = {
        "a": SourceConfig(path=jsonl(tmp_path / "a.jsonl", rows_of(5, "a")), weight=3.0),
        "b": SourceConfig(
            path=jsonl(tmp_path / "b.jsonl", rows_of(5, "b")), weight=1.0, use=SourceUse.validation
        ),
    }
    assert load_splits(DataConfig(sources=sources)).weights == {"a": 3.0}


def test_rows_from_python_replace_the_configured_sources() -> None:
    assert list(load_splits(DataConfig(path="sums"), rows_of(3)).train) == ["rows"]


def test_rows_from_python_fill_the_source_that_waits_for_them() -> None:
    sources = {
        "mine": SourceConfig(kind=SourceKind.rows),
        "sums": SourceConfig(path="sums", args={"digits": 1}),
    }
    splits = load_splits(DataConfig(sources=sources), rows_of(3))
    assert {name: len(pool) for name, pool in splits.train.items()} == {"mine": 3, "sums": 100}


def test_ids_are_unique(tmp_path: Path) -> None:
    splits = from_rows(rows_of(50), validation=5, heldout=5)
    ids = [e.id for side in (splits.train["rows"], splits.validation, splits.heldout) for e in side]
    assert len(set(ids)) == 50


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        (
            rows_of(10),
            {"heldout": 11},
            "data.heldout=11 asks 11 problems of rows, which has 10 left: lower data.heldout or add data.",
        ),
        (
            rows_of(10),
            {"heldout": 6, "validation": 5},
            "data.validation=5 asks 5 problems of rows, which has 4 left: lower data.validation or add data.",
        ),
        (
            rows_of(10),
            {"heldout": 5, "validation": 5},
            "data.validation=5 and data.heldout=5 leave no training rows: lower them or add data.",
        ),
        ([], {}, "dataset has no rows."),
        (
            None,
            {},
            "there are no data: set data.path, data.sources, or hand rows to rlhf.train(dataset=...).",
        ),
        (
            None,
            {"sources": {"a": SourceConfig(path="sums", use=SourceUse.train)}, "heldout": 5},
            "data.heldout=5 has no source to come from: set data.sources.<name>.use to heldout or all, or "
            "data.heldout=0.",
        ),
    ],
)
def test_impossible_splits(rows: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_splits(DataConfig(**settings), rows)
    assert str(caught.value) == sentence


def test_empty_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(UserError, match=r"data.path=.*a.jsonl has no rows."):
        load_splits(DataConfig(path=path))
