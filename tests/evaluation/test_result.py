"""The numbers of an evaluation, by hand."""

from __future__ import annotations

import json
import math

import pytest

from rlhf.evaluation.result import progress, summarize
from rlhf.evaluation.runner import Problem


def response(problem: str, sample: int, right: bool, **fields: object) -> Problem:
    """One response; a right one says 7 in one of two spellings, a wrong one 8."""
    values: dict[str, object] = {
        "id": problem, "prompt": problem, "answer": "7", "response": "", "extracted": "7.0" if right else "8",
        "accuracy": float(right), "grades": {}, "reward": 0.0, "rewards": {}, "status": "ok",
        "finish_reason": "stop", "length": 10 if right else 20, "sample": sample,
    }  # fmt: skip
    return Problem(**(values | fields))  # type: ignore[arg-type]


def rows(*verdicts: str) -> list[Problem]:
    """`"1100"` is a problem with four responses, two of them right."""
    return [
        response(f"p{number}", sample, mark == "1")
        for number, marks in enumerate(verdicts)
        for sample, mark in enumerate(marks)
    ]


def test_numbers_by_hand() -> None:
    found = summarize(rows("1100", "1000", "1111"), samples=4)
    assert found.accuracy == pytest.approx(7 / 12)
    assert found.per_problem == [0.5, 0.25, 1.0]
    # sd of (1/2, 1/4, 1) over sqrt 3
    assert found.se == pytest.approx(math.sqrt(((1 / 12) ** 2 + (1 / 3) ** 2 + (5 / 12) ** 2) / 2 / 3))
    # sum of p (1 - p) / 3: 1/12 + 1/16 + 0
    assert found.se_rerun == pytest.approx(math.sqrt(1 / 12 + 1 / 16) / 3)
    # pass@2 = 1 - C(wrong, 2) / C(4, 2)
    assert found.pass_at == {2: pytest.approx((5 / 6 + 1 / 2 + 1) / 3)}
    # a tie of two against two counts half, three eights win, all sevens win
    assert found.majority == pytest.approx((0.5 + 0 + 1) / 3)
    assert found.counts["length_right"] == 10
    assert found.counts["length_wrong"] == 20
    assert found.low < found.accuracy < found.high


def test_a_wrong_answer_that_is_spelled_as_the_gold_does_not_become_right_by_vote() -> None:
    problems = [response("p", sample, False, extracted="7") for sample in range(2)]
    assert summarize(problems, samples=2).majority == 0


def test_one_response_each_says_nothing_of_a_rerun() -> None:
    found = summarize(rows("1", "0", "0"), samples=1)
    assert (found.se_rerun, found.majority, found.pass_at) == (None, None, {})
    assert "unknown from one response each" in dict(found.rows()).values()


def test_what_was_cut_unanswered_or_ungraded_is_counted() -> None:
    problems = [
        response("a", 0, True),
        response("b", 0, False, finish_reason="length", extracted=None, status="no_answer"),
        response("c", 0, False, status="timeout", extracted=None),
    ]
    counts = summarize(problems, samples=1).counts
    assert counts["truncated"] == pytest.approx(1 / 3)
    assert counts["unanswered"] == pytest.approx(2 / 3)
    assert counts["ungraded"] == 1
    assert counts["accuracy_finished"] == 0.5


def test_missing_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="7 responses are not 4 to each problem"):
        summarize(rows("1100", "100"), samples=4)


def test_what_is_no_number_becomes_null() -> None:
    plain = summarize(rows("0", "0"), samples=1).plain()
    assert plain["counts"]["length_right"] is None
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_progress_is_one_line() -> None:
    line = progress(rows("10", "11"), samples=2, total=8, seconds_left=75)
    assert line.startswith("2/8 problems  avg@2 75.0% [")
    assert line.endswith("left")
