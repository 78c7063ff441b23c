"""The exact-integer rules: a golden table for each, and properties that hold for any integer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rlhf.rewards.exact import ExactRule, ExactSpec, canonical, grade, integer, last_box, numbers
from rlhf.rewards.grade import Response, Status, build_spec, find_kind


def verdict(text: str, gold: str | None, rule: str, finished: bool = True, **options: object) -> float:
    spec = ExactSpec(rule=ExactRule(rule), **options)  # type: ignore[arg-type]
    return grade(Response(text=text, finished=finished), gold, spec).accuracy


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("11 + 21 = 32", ["11", "21", "32"]),
        ("11-21", ["11", "21"]),
        ("11 - 21", ["11", "21"]),
        ("= -5", ["-5"]),
        ("x=-5, (-6), [-7], $-8$", ["-5", "-6", "-7", "-8"]),
        ("−7", ["-7"]),
        ("f(2)-3", ["2", "3"]),
        ("1,234 and 12,345,678.00", ["1234", "12345678"]),
        (r"1{,}234 and 1,\!234", ["1234", "1234"]),
        ("1,2345", ["1", "2345"]),
        ("1, 2, 3", ["1", "2", "3"]),
        ("025", ["25"]),
        ("-0", ["0"]),
        ("7.0", ["7"]),
        ("7.50", ["7.5"]),
        ("0.5 and .5", ["0.5", "0.5"]),
        ("...32", ["32"]),
        ("the sum is 32.", ["32"]),
        ("1.2.3", ["1.2", "3"]),
        ("50% of $20 is 10cm", ["50", "20", "10"]),
        ("x2 and R2D2 and x2.5", []),
        ("3/4", ["3/4"]),
        ("10^3, 10^{3}, 2**5", ["10^3", "10^{3}", "2**5"]),
        (r"\frac{1}{2}, \dfrac {1} {2}, \sqrt{16}, \sqrt[3]{8}", None),
        (r"\frac12 and \sqrt2", []),
        ("答案是32。", ["32"]),
        ("٣", []),
        ("", []),
    ],
)
def test_numbers(text: str, found: list[str] | None) -> None:
    if found is None:
        found = [r"\frac{1}{2}", r"\dfrac {1} {2}", r"\sqrt{16}", r"\sqrt[3]{8}"]
    assert list(numbers(text)) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("540", "540"),
        (" $540$. ", "540"),
        (r"\boxed{540}", "540"),
        (r"$\boxed{540}$", "540"),
        ("**540**", "540"),
        (r"\(540\)", "540"),
        ("$540", "540"),
        (r"\$540", "540"),
        ("+5", "5"),
        ("-1,234.0", "-1234"),
        ("0540", "540"),
        ("540 points", None),
        ("50%", None),
        ("7.5", None),
        ("1e3", None),
        ("3/1", None),
        ("5 6", None),
        ("", None),
        ("-", None),
    ],
)
def test_integer(text: str, value: str | None) -> None:
    assert integer(text) == value


@pytest.mark.parametrize(
    ("rule", "text", "right"),
    [
        ("last_number", "10 + 22 = 32", 1),
        ("last_number", "32 is 10 + 22", 0),
        ("last_number", "It is 32.0 or so", 1),
        ("last_number", "I say 032!", 1),
        ("last_number", "32/1", 0),
        ("last_number", "-32", 0),
        ("last_number", "thirty-two", 0),
        ("any_mention", "32 is 10 + 22", 1),
        ("any_mention", "it is 132", 0),
        ("any_mention", "it is 3.2", 0),
        ("answer_line", "Answer: 32", 1),
        ("answer_line", "**Answer:** 32", 1),
        ("answer_line", "**Answer: 32**", 1),
        ("answer_line", "answer : $32$.", 1),
        ("answer_line", "Answer:\n32", 1),
        ("answer_line", "Answer: 31\nAnswer: 32", 1),
        ("answer_line", "Answer: 32\nAnswer: 31", 0),
        ("answer_line", "Answer: 32 apples", 0),
        ("answer_line", "Answer: 32 or 31", 0),
        ("answer_line", "The answer is 32", 0),
        ("boxed", r"so \boxed{32}", 1),
        ("boxed", r"so $\boxed{\$32}$", 1),
        ("boxed", r"\boxed{32} or \boxed{31}", 0),
        ("boxed", r"\boxed{31} or \boxed{32}", 1),
        ("boxed", r"\boxed{32 or 31}", 0),
        ("boxed", r"\fbox{32}", 1),
        ("boxed", r"\boxed{32", 0),
        ("boxed", "32", 0),
    ],
)
def test_rules(rule: str, text: str, right: int) -> None:
    assert verdict(text, "32", rule) == right


def test_strict_rule_needs_an_end() -> None:
    """The demo's rule: the last number is right and the response ended by itself."""
    assert verdict("so 32", "32", "last_number", finished=True) == 1
    cut = grade(Response(text="so 32", finished=False), "32", ExactSpec())
    assert (cut.accuracy, cut.status, cut.extracted) == (0.0, Status.no_answer, None)
    assert verdict("so 32", "32", "last_number", finished=False, must_end=False) == 1
    assert verdict("so 32", "32", "any_mention", finished=False) == 1
    assert verdict("so 32", "32", "any_mention", finished=False, must_end=True) == 0
    assert verdict("Answer: 32", "32", "answer_line", finished=False) == 1


def test_statuses_and_extraction() -> None:
    spec = ExactSpec()
    assert grade(Response(text="no digits"), "32", spec).status is Status.no_answer
    assert grade(Response(text="32"), None, spec).status is Status.gold_unparsable
    assert grade(Response(text="32"), "3.5", spec).status is Status.gold_unparsable
    assert grade(Response(text="32"), "", spec).status is Status.gold_unparsable
    wrong = grade(Response(text="1,031.0"), "32", spec)
    assert (wrong.extracted, wrong.status, wrong.grader) == ("1031", Status.ok, "exact_integer@1")
    words = grade(Response(text="Answer: many"), "32", ExactSpec(rule=ExactRule.answer_line))
    assert (words.extracted, words.status, words.accuracy) == ("many", Status.ok, 0.0)


def test_gold_may_be_spelled_like_an_answer() -> None:
    for gold in ("1234", "1,234", "1234.0", "$1234$", r"\boxed{1234}", "01234"):
        assert verdict("1,234", gold, "last_number") == 1


def test_own_marker() -> None:
    spec = build_spec(find_kind("exact_integer"), {"rule": "answer_line", "marker": "####"})
    assert grade(Response(text="so\n#### 1,072"), "1072", spec).accuracy == 1
    assert grade(Response(text="Answer: 1072"), "1072", spec).status is Status.no_answer


@pytest.mark.parametrize("args", [{"rule": "answer_line", "marker": "####"}, {"rule": "last_number"}])
def test_gsm8k_solutions_are_right(data_dir: Path, args: dict[str, str]) -> None:
    """All of GSM8K's test set: no kind of its own is needed for it."""
    spec = build_spec(find_kind("exact_integer"), args)
    with open(data_dir / "gsm8k_test.jsonl") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 1319
    assert [
        row["id"] for row in rows if not grade(Response(text=row["solution"]), row["answer"], spec).accuracy
    ] == []


@pytest.mark.parametrize("answer", ["1250", "1,250", "$1,250", "1250.00", "$1,250.00.", "**1250**", " 1250 "])
def test_gsm8k_answers(answer: str) -> None:
    spec = build_spec(find_kind("exact_integer"), {"rule": "answer_line", "marker": "####"})
    assert grade(Response(text=f"So it is.\n#### {answer}"), "1250", spec).accuracy == 1
    assert grade(Response(text=f"So it is.\n#### {answer}"), "125", spec).accuracy == 0


def test_only_the_tail_counts() -> None:
    assert verdict("32" + " x" * 2000, "32", "last_number") == 0
    assert verdict("32" + " x" * 2000, "32", "any_mention") == 1


def test_value_not_spelling() -> None:
    """Metamorphic: commas, zeros, signs and wrapping never change a verdict."""
    rng = random.Random(0)
    for _ in range(500):
        value = rng.randrange(-(10 ** rng.randrange(1, 12)), 10 ** rng.randrange(1, 12))
        other = value + rng.choice([-10, -1, 1, 10, 1000])
        sign, digits = ("-", str(-value)) if value < 0 else ("", str(value))
        for spelled in (
            f"{value}",
            f"{value:,}",
            f"{sign}00{digits}",
            f"{value}.00",
            f"${value}$",
            f"**{value}**.",
            rf"\boxed{{{value}}}",
        ):
            for rule, text in (
                ("last_number", f"We get 17, so it is {spelled}"),
                ("answer_line", f"17\nAnswer: {spelled}"),
                ("boxed", rf"17 \boxed{{{spelled}}}"),
            ):
                assert verdict(text, str(value), rule) == 1, (text, value)
                assert verdict(text, str(other), rule) == 0, (text, other)
            assert canonical(spelled.strip("$*.")) == str(value) or "boxed" in spelled


@pytest.mark.parametrize(
    "text", ["9" * 100_000, "-" * 100_000, "{" * 100_000, "1," * 50_000, r"\frac{" * 20_000]
)
def test_hostile_text_is_quick(text: str) -> None:
    for rule in ExactRule:
        assert verdict(text, "32", rule.name) == 0
        assert verdict(rf"\boxed{{{text}}}", "32", rule.name) == 0


def test_last_box() -> None:
    assert last_box(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_box(r"\boxed{1} \boxed{2}") == "2"
    assert last_box(r"\boxed{1} \boxed{2") is None
    assert last_box(r"\boxed{}") == ""
    assert last_box("none") is None
