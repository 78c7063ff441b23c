"""DAPO's scorer against the golden table of the paper sheet (dapo.md §6.5)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.rewards.dapo_math import DapoSpec, grade, normalize
from rlhf.rewards.grade import Response, Status

GOLDEN = [
    ("Answer: $540$", "540", 1),
    ("ANSWER: 540", "540", 1),
    ("Answer:\n540", "540", 1),
    (r"Answer: \boxed{540}", "540", 1),
    ("Answer: $540$ points", "540", 1),
    ("answer : 1,234", "1234", 1),
    ("Answer: x = 5", "5", 1),
    ("Answer: 5 = x", "5", 0),
    ("Answer: 540.", "540", 0),
    ("**Answer:** 540", "540", 0),
    ("Answer: **540**", "540", 0),
    ("Answer: 0540", "540", 0),
    ("Answer: 5.0", "5", 0),
    ("Answer: $$540$$", "540", 0),
    ("Answer: 540°", "540", 0),
    ("Answer: 540 </s>", "540", 0),
    ("Answer: 12\nAnswer: 540", "540", 1),
    ("Answer: 540\nAnswer: 12", "540", 0),
    ("Answer: 540 because Answer: 12", "540", 0),
    ("Answer: 540 because Answer: 12", "12", 0),
    (r"\boxed{540}", "540", 0),
    ("The answer is 540", "540", 0),
    (r"Answer: 540^\circ", "540", 1),
    (r"Answer: \text{540}", "540", 1),
    (r"Answer: \frac12", r"\frac{1}{2}", 1),
    (r"Answer: \sqrt2", r"\sqrt{2}", 1),
    ("Answer: 1,000 dollars", "1000", 1),
    ("Answer: 540", "1,080", 0),
    ("Answer: 540" + "." * 290, "540", 0),
    ("Answer: 540\n" + "." * 288, "540", 1),
    ("Answer: 540\n" + "." * 300, "540", 0),
]


@pytest.mark.parametrize(("text", "gold", "right"), GOLDEN)
def test_golden(text: str, gold: str, right: int) -> None:
    assert grade(Response(text=text), gold, DapoSpec()).accuracy == right


def test_box_fallback_is_the_newer_reference() -> None:
    newer = DapoSpec(box_fallback=True)
    assert grade(Response(text=r"\boxed{540}"), "540", newer).accuracy == 1
    assert grade(Response(text=r"\boxed{1,234}"), "1234", newer).accuracy == 1
    assert grade(Response(text=r"\boxed{540}" + "." * 100), "540", newer).accuracy == 0
    assert grade(Response(text="Answer: 12\n" + r"\boxed{540}"), "540", newer).accuracy == 0


def test_statuses() -> None:
    none = grade(Response(text="I do not know"), "540", DapoSpec())
    assert (none.accuracy, none.status, none.extracted) == (0.0, Status.no_answer, None)
    wrong = grade(Response(text="Answer: $ 12 $ points"), "540", DapoSpec())
    assert (wrong.accuracy, wrong.status, wrong.extracted) == (0.0, Status.ok, "12")
    assert wrong.grader == "dapo_math@1"
    assert grade(Response(text="Answer: 5"), None, DapoSpec()).status is Status.gold_unparsable
    assert grade(Response(text="Answer: 5"), "", DapoSpec()).status is Status.gold_unparsable


def test_truncated_answers_count() -> None:
    assert grade(Response(text="Answer: 540", finished=False), "540", DapoSpec()).accuracy == 1


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("x = y = 5", "5"),
        ("an answer, a gold", "answer,gold"),
        (r"\text{a}, \text{and} b", "a,b"),
        (r"\mbox{5}", "5"),
        (r"5\text{m}", "5"),
        ("10 square feet", "10"),
        ("$5$ or $6$", "5"),
        (r"\frac34", r"\frac{3}{4}"),
        (r"\sqrt3x", r"\sqrt{3}x"),
        ("1,234,567", "1234567"),
        ("1,234.5", "1,234.5"),
        (r"\overline{AB}", "AB"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ],
)
def test_normalize(raw: str, normal: str) -> None:
    assert normalize(raw) == normal


def test_normal_form_is_stable() -> None:
    """Metamorphic: normalizing twice changes nothing more, for every answer of the table."""
    for text, gold, _ in GOLDEN:
        for answer in (text, gold):
            assert normalize(normalize(answer)) == normalize(answer)


@pytest.mark.parametrize("name", ["aime24", "aime25", "aime26", "math500"])
def test_golds(data_dir: Path, name: str) -> None:
    """Normalizing a gold twice changes nothing more, and every gold on an `Answer:` line is right."""
    with open(data_dir / f"{name}.jsonl") as lines:
        golds = [json.loads(line)["answer"] for line in lines]
    for gold in golds:
        assert normalize(normalize(gold)) == normalize(gold)
        assert grade(Response(text=f"So it is.\nAnswer: {gold}"), gold, DapoSpec()).accuracy == 1, gold


def test_hostile_text_is_quick() -> None:
    for text in ("Answer:" * 100_000, "$" * 100_000, r"\text{" * 50_000, "Answer: " + "frac" * 50_000):
        assert grade(Response(text=text), "540", DapoSpec()).accuracy == 0
        assert grade(Response(text=text), "540", DapoSpec(tail=5_000)).accuracy == 0
