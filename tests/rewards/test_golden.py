"""Every grader against `golden.tsv`, a table made by hand: what each says to one response."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.rewards import aime, dapo_math, exact
from rlhf.rewards import math as math_kind
from rlhf.rewards.grade import Kind, Response, Status

GRADERS: tuple[tuple[Kind, object], ...] = (
    (aime.KIND, aime.AimeSpec()),
    (exact.KIND, exact.ExactSpec()),
    (dapo_math.KIND, dapo_math.DapoSpec()),
    (math_kind.KIND, math_kind.MathSpec()),
    (math_kind.KIND, math_kind.MathSpec(extract=math_kind.Extract.lenient)),
)
"""In the order of the letters in the table's first column."""


def rows() -> list[tuple[str, str, str]]:
    """Verdicts, gold and response of every row."""
    lines = Path(__file__).with_name("golden.tsv").read_text(encoding="utf-8").split("\n")
    cells = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return [(verdicts, gold, response.replace("⏎", "\n")) for verdicts, gold, response, *_ in cells]


def verdict(kind: Kind, spec: object, gold: str, response: str) -> str:
    """The letter that the table has for this verdict."""
    found = kind.grade(Response(text=response), gold, spec)
    if found.status is Status.ok:
        return str(int(found.accuracy))
    return {Status.no_answer: "-", Status.gold_unparsable: "?"}[found.status]


def test_the_table_is_large_and_has_no_row_twice() -> None:
    table = rows()
    assert len(table) >= 150
    assert len({(gold, response) for _, gold, response in table}) == len(table)
    assert {len(verdicts) for verdicts, _, _ in table} == {len(GRADERS)}


@pytest.mark.parametrize("column", range(len(GRADERS)), ids=["aime", "exact", "dapo", "math", "lenient"])
def test_golden(column: int) -> None:
    kind, spec = GRADERS[column]
    wrong = [
        f"{gold!r} {response!r}: {found}, not {verdicts[column]}"
        for verdicts, gold, response in rows()
        if (found := verdict(kind, spec, gold, response)) != verdicts[column]
    ]
    assert wrong == []
