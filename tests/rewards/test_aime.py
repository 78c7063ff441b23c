r"""Grader kind `aime`: where the answer may stand, what it may look like, and what earns nothing."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import pytest

from rlhf.rewards.aime import AimeRule, AimeSpec, grade, read
from rlhf.rewards.exact import boxes
from rlhf.rewards.grade import Grade, Response, Status, build_spec, find_kind
from rlhf.rewards.reasoning import Reasoning, answer_part

RULES = tuple(AimeRule)
FORMS = {
    AimeRule.boxed: ("so $\\boxed{{{0}}}$.",),
    AimeRule.answer_line: ("17\nAnswer: {0}", "**Answer:** {0}\n"),
    AimeRule.either: ("\\boxed{{17}}\nAnswer: {0}", "Answer: 17\n\\boxed{{{0}}}"),
    AimeRule.last_number: ("we get 17 and so {0}",),
}
"""How a response states an answer under each rule."""

SPELLINGS = (
    *("{0}", "00{0}", "{0}.0", "{0}.", "${0}$", "$$ {0} $$", r"\({0}\)", "**{0}**", "x = {0}", "{0} points"),
    *(r"\text{{{0}}}", r"{0}^\circ", r"{0} \text{{ cm}}"),
)
"""Ways to write the same integer."""


def verdict(
    text: str, gold: str | None = "540", rule: AimeRule = AimeRule.either, **options: object
) -> Grade:
    return grade(Response(text=text), gold, AimeSpec(rule=rule, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "\\boxed{12}\nAnswer: 34\nso 56",
            {"boxed": "12", "answer_line": "34", "either": "34", "last_number": "56"},
        ),
        (
            "Answer: 34\n\\boxed{12}",
            {"boxed": "12", "answer_line": "34", "either": "12", "last_number": "12"},
        ),
        ("it is 56", {"boxed": None, "answer_line": None, "either": None, "last_number": "56"}),
        ("Answer: \\boxed{012}", {"boxed": "12", "answer_line": "12", "either": "12", "last_number": "12"}),
        ("\\boxed{1} \\boxed{2}", {"boxed": "2", "answer_line": None, "either": "2", "last_number": "2"}),
        ("\\boxed{1} \\boxed{2", {"boxed": None, "answer_line": None, "either": None, "last_number": "2"}),
        ("Answer: 1\nAnswer:", {"boxed": None, "answer_line": None, "either": None, "last_number": "1"}),
    ],
)
def test_where_the_answer_may_stand(text: str, expected: dict[str, str | None]) -> None:
    assert {rule.value: verdict(text, rule=rule).extracted for rule in RULES} == expected


@pytest.mark.parametrize(
    ("final", "reading"),
    [
        ("025", "25"),
        (" $25$. ", "25"),
        (r"\(25\)", "25"),
        (r"\text{25}", "25"),
        (r"\displaystyle{\mathbf{25}}", "25"),
        ("**25**", "25"),
        ("25.000", "25"),
        ("−25", "-25"),
        ("1025", "1025"),
        ("1,025", "1,025"),
        ("24.5", "24.5"),
        ("m+n=25", "25"),
        ("|S| = 5 \\cdot 5 = 25", "25"),
        ("f(1, 2) = 25", "25"),
        ("a = 24, b = 25", "a = 24, b = 25"),
        ("n >= 25", "n >= 25"),
        (r"m \ne n = 25", r"m \ne n = 25"),
        ("25 = x", "x"),
        (r"25\,\text{cm}^{2}", "25"),
        ("25 square feet", "25"),
        ("25°", "25"),
        (r"25^{\circ}", "25"),
        (r"25\%", "25"),
        ("25 thousand", "25 thousand"),
        (r"25\text{ or }26", r"25\text{ or }26"),
        ("25 m", "25 m"),
        ("25 is not the right one", "25 is not the right one"),
        ("24 25", "24 25"),
        ("٢٥", "٢٥"),
        ("", ""),
    ],
)
def test_how_a_final_is_read(final: str, reading: str) -> None:
    assert read(final) == reading
    assert read(read(final)) == read(final)


def test_statuses() -> None:
    for gold in (None, "", "1000", "-1", "2.5", "1/2", "x"):
        assert verdict(r"\boxed{5}", gold).status is Status.gold_unparsable
    assert verdict("Answer: 1000", "999") == Grade(accuracy=0.0, extracted="1000", grader="aime@1")
    assert verdict("Answer: many", "999") == Grade(accuracy=0.0, extracted="many", grader="aime@1")
    assert verdict("nothing").status is Status.no_answer


def test_a_cut_off_response_keeps_its_finals_and_has_no_last_number() -> None:
    cut = Response(text=r"\boxed{540} because 540", finished=False)
    assert [grade(cut, "540", AimeSpec(rule=rule)).accuracy for rule in RULES] == [1.0, 0.0, 1.0, 0.0]


def test_contradicting_finals() -> None:
    """The last one counts; `candidates: 1` wants agreement; a long list of guesses is no answer."""
    text = "\\boxed{12}\nWait.\n\\boxed{540}"
    assert verdict(text).accuracy == 1
    assert verdict(text, candidates=1).status is Status.no_answer
    assert verdict("\\boxed{540}\nAnswer: 0540", candidates=1).accuracy == 1
    guesses = "".join(rf"\boxed{{{number}}} " for number in range(531, 541))
    assert verdict(guesses).accuracy == 1
    assert verdict(guesses + r"\boxed{1} \boxed{540}").status is Status.no_answer
    with pytest.raises(ValueError, match=r"args\.candidates=0 must be at least 1"):
        build_spec(find_kind("aime"), {"candidates": 0})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a</think>b", ["a</think>b", "b", "b"]),
        ("<think>a</think>b</think>c", ["<think>a</think>b</think>c", "c", "c"]),
        ("<think>a", ["<think>a", None, None]),
        ("</think>a<think>b", ["</think>a<think>b", "a<think>b", "a<think>b"]),
        ("a", ["a", "a", None]),
        ("a</think>", ["a</think>", "", ""]),
    ],
)
def test_reasoning(text: str, parts: list[str | None]) -> None:
    assert [answer_part(text, rule) for rule in Reasoning] == parts


def test_reasoning_in_every_grader() -> None:
    """The same three outcomes for each kind that has the option."""
    texts = (r"<think>\boxed{540}</think> Hm.", r"<think>\boxed{540}", r"\boxed{540}")
    right = {"keep": [1, 1, 1], "drop": [0, 0, 1], "require": [0, 0, 0]}
    for kind, args in (("aime", {}), ("exact_integer", {"rule": "boxed"}), ("math_verify", {})):
        for rule, expected in right.items():
            spec = build_spec(find_kind(kind), {**args, "reasoning": rule})
            got = [find_kind(kind).grade(Response(text=text), "540", spec) for text in texts]
            assert [grade.accuracy for grade in got] == expected, (kind, rule)
            assert all(grade.accuracy or grade.status is Status.no_answer for grade in got)
            closed = Response(text=r"<think>\boxed{12}</think>\boxed{540}")
            assert find_kind(kind).grade(closed, "540", spec).accuracy == 1


def test_value_not_spelling() -> None:
    """Metamorphic: zeros, dollars, bold, full stops and units never change a verdict; one digit does."""
    rng = random.Random(0)
    for value in [0, 1, 9, 10, 99, 100, 998, 999, *(rng.randrange(1000) for _ in range(200))]:
        digits = str(value)
        place = rng.randrange(len(digits))
        other = digits[:place] + str((int(digits[place]) + rng.randrange(1, 10)) % 10) + digits[place + 1 :]
        for spelling in SPELLINGS:
            for rule, forms in FORMS.items():
                for form in forms:
                    text = form.format(spelling.format(digits))
                    assert verdict(text, digits, rule).accuracy == 1, text
                    assert verdict(text, digits.zfill(3), rule).accuracy == 1, text
                    assert verdict(form.format(spelling.format(other)), digits, rule).accuracy == 0, text
        assert verdict(rf"\boxed{{{value + 1000:,}}}", digits).accuracy == 0


@pytest.mark.parametrize("name", ["aime24", "aime25", "aime26"])
def test_golds_match_themselves(data_dir: Path, name: str) -> None:
    with open(data_dir / f"{name}.jsonl") as lines:
        golds = [json.loads(line)["answer"] for line in lines]
    assert len(golds) == 30
    for gold in golds:
        assert read(read(gold)) == read(gold)
        for rule, forms in FORMS.items():
            for form in forms:
                assert verdict(form.format(gold), gold, rule).accuracy == 1


EVERY = "".join(rf"\boxed{{{number}}} " for number in range(1000))
PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nFind $m+n$.\n\nRemember "
    'to put your answer on its own line after "Answer:" or within \\boxed{}.'
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        PROMPT,
        r"\boxed{}",
        "Answer:",
        EVERY,
        EVERY.replace("\\boxed{", "Answer: ").replace("}", "\n"),
        r"<think>\boxed{GOLD}</think> so \boxed{OTHER}",
        "Answer: GOLD\nNo, it is another.\nAnswer: OTHER",
        r"\boxed{GOLD or OTHER}",
        r"\boxed{GOLD, OTHER}",
        "Answer: GOLD or OTHER",
        r"\boxed{" + ", ".join(map(str, range(1000))) + "}",
        r"\boxed{9^{9^{9^9}}}",
        r"\boxed{GOLD",
        r"\boxed{GOLD}\boxed{",
        "The answer is GOLD.",
    ],
)
def test_what_earns_nothing(text: str) -> None:
    """For every gold, the first and the last of a list included."""
    for gold in ("0", "1", "540", "998", "999"):
        other = "541" if gold != "541" else "542"
        hostile = text.replace("GOLD", gold).replace("OTHER", other)
        for rule in (AimeRule.boxed, AimeRule.answer_line, AimeRule.either):
            assert verdict(hostile, gold, rule).accuracy == 0, (gold, rule)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" + "{" * 5_000 + "540" + "}" * 5_001,
        "{" * 10_000,
        r"\boxed{" * 15_000,
        r"\boxed{" * 15_000 + "}" * 15_000,
        "Answer:" * 15_000,
        "answer" + "*" * 100_000,
        "Answer: " + "}" * 100_000,
        r"\boxed{" + r"\text{" * 50 + "}" * 51,
        r"\boxed{" + "=" * 250 + "}",
        r"\boxed{5" + "0" * 100_000 + "}",
        "1," * 50_000,
    ],
)
def test_hostile_text_is_quick(text: str) -> None:
    for rule in RULES:
        began = time.process_time()
        assert verdict(text, rule=rule).accuracy == 0
        assert time.process_time() - began < 1.0


def test_any_thread() -> None:
    found: list[Grade] = []
    thread = threading.Thread(target=lambda: found.append(verdict("Answer: 0540")))
    thread.start()
    thread.join()
    assert found == [verdict("Answer: 0540")]


def test_boxes() -> None:
    assert boxes(r"\boxed{1} \fbox{\frac{1}{2}}", 99) == [(0, "1"), (10, r"\frac{1}{2}")]
    assert boxes(r"\boxed{a\boxed {b}c}", 99) == [(0, r"a\boxed {b}c"), (8, "b")]
    assert boxes(r"\boxed{1} \boxed{2", 99) == [(0, "1"), (10, None)]
    assert boxes(r"\boxed{123}", 3) == [(0, "123")]
    assert boxes(r"\boxed{1234}", 3) == [(0, None)]
    assert boxes("none", 99) == []
