r"""The math-verify grader: golden tables for version 0.9.0 (rl-extras.md §4.2), ours and the library's."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import threading
from pathlib import Path

import pytest

from rlhf.rewards import math as grader
from rlhf.rewards.grade import Grade, Response, Status
from rlhf.rewards.math import Extract, MathSpec, grade, listed, prepare, same_list, spelled_out
from rlhf.rewards.reasoning import Reasoning

LENIENT = MathSpec(extract=Extract.lenient)


@pytest.fixture(scope="module", autouse=True)
def quiet_library() -> None:
    assert importlib.metadata.version("math-verify") == "0.9.0"
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("1/2", "0.5", True),
        ("1/3", "0.333", False),
        ("1/3", "0.333333", True),
        (r"$\sqrt{2}$", "1.41421356", True),
        (r"$\sqrt{2}$", "1.4142", False),
        ("10", "$10$ cm", True),
        ("$(1,2)$", "$(2,1)$", False),
        (r"${1,3}\cup{2,4}$", "${1,2,3,4}$", True),
        ("$1<x<2$", "$(1,2)$", True),
        ("$(1,2)$", "$1<x<2$", False),
        ("$5$", "$a+b=2+3=5$", True),
        ("540", r"\boxed{540}", True),
        ("540", "Answer: 540", True),
        ("540", r"The answer is 539. Wait, so \boxed{540}", True),
        ("540", r"\boxed{539} or \boxed{540}", False),
        ("540", r"\boxed{540} so \boxed{539}", False),
        ("540", "x", False),
        ("25", "025", True),
        ("25", r"\boxed{025}", True),
        ("1000", "1,000", True),
        ("7", "7.0", True),
        ("$x=5$", "5", True),
        ("5", "$x=5$", True),
        ("$a+b=5$", "5", True),
    ],
)
def test_library_as_it_is(gold: str, text: str, right: bool) -> None:
    """What the library itself says, the fused boxes included: if this changes, our version must rise."""
    from math_verify import parse, verify

    assert verify(parse(gold), parse(text)) is right


def test_library_fuses_neighboring_boxes() -> None:
    from math_verify import parse

    assert str(parse(r"\boxed{539} or \boxed{540}")[0]) == "539540"


def test_library_misreads_a_bare_latex_gold() -> None:
    from math_verify import parse

    assert str(parse(r"\left( 3, \frac{\pi}{2} \right)")[0]) == "3"


BOXED = [
    ("1/2", "0.5", 1),
    ("1/3", "0.333", 0),
    ("1/3", "0.333333", 1),
    (r"\sqrt{2}", "1.41421356", 1),
    (r"\sqrt{2}", "1.4142", 0),
    (r"10\%", "0.1", 1),
    (r"10\%", "10", 1),
    (r"10\%", r"10\%", 1),
    ("10", r"10\text{ cm}", 1),
    ("{1,2}", "1,2", 1),
    (r"\{1,2\}", r"\{2,1\}", 1),
    ("(1,2)", "(2,1)", 0),
    (r"{1,3}\cup{2,4}", "{1,2,3,4}", 1),
    ("1<x<2", "(1,2)", 1),
    ("(1,2)", "1<x<2", 0),
    ("5", "a+b=2+3=5", 1),
    ("a+b=5", "5", 1),
    ("x=5", "5", 1),
    ("5", "x=5", 1),
    ("25", "025", 1),
    ("1000", "1,000", 1),
    ("7", "7.0", 1),
    ("540", "x", 0),
    (r"\frac{1}{2}", r"\frac12", 1),
    (r"\frac{1}{2}", r"\dfrac 1 2", 1),
    (r"$\frac{1}{2}$", r"\tfrac1{2}", 1),
    (r"\boxed{\frac{1}{2}}", "1/2", 1),
    (r"\frac{3}{4}", r"\frac{4}{3}", 0),
    (r"\sqrt2", r"\sqrt{2}", 1),
    (r"2\pi", r"\frac{4\pi}2", 1),
    ("p - q", "p-q", 1),
    ("p - q", "-q+p", 1),
    ("p - q", "q-p", 0),
    (r"\text{Evelyn}", "Evelyn", 1),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})", 1),
    (r"\left( 3, \frac{\pi}{2} \right)", "3", 0),
    ("x^2+2x+1", "(x+1)^2", 1),
    ("540", "539.9999", 0),
    ("540", "-540", 0),
]


@pytest.mark.parametrize(("gold", "answer", "right"), BOXED)
def test_boxed(gold: str, answer: str, right: int) -> None:
    got = grade(Response(text=rf"It is $\boxed{{{answer}}}$."), gold, MathSpec())
    assert (got.accuracy, got.status) == (right, Status.ok)


def test_gold_comes_first() -> None:
    """The relation is not symmetric; an interval as gold refuses the inequality."""
    assert grade(Response(text=r"\boxed{(1,2)}"), "1<x<2", MathSpec()).accuracy == 1
    assert grade(Response(text=r"\boxed{1<x<2}"), "(1,2)", MathSpec()).accuracy == 0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"\boxed{539} or \boxed{540}", 1),
        (r"\boxed{540} or \boxed{539}", 0),
        (r"\boxed{540}, \boxed{539}", 0),
        (r"\boxed{539}\boxed{540}", 1),
        (r"\boxed{540} and \boxed{54", 0),
    ],
)
def test_last_box_only(text: str, right: int) -> None:
    """Boxes are never fused, and listing candidates does not pay."""
    assert grade(Response(text=text), "540", MathSpec()).accuracy == right
    assert grade(Response(text=text), "540", LENIENT).accuracy == right or r"\boxed{54" in text


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("540", "Answer: 540", 1),
        ("540", r"The answer is 539. Wait, so \boxed{540}", 1),
        ("540", "The final answer is 539", 0),
        ("1/2", "The final answer is 0.5.", 1),
        ("10", "it is $10$ cm", 1),
        (r"\frac{1}{2}", r"so $\frac12$.", 1),
    ],
)
def test_lenient(gold: str, text: str, right: int) -> None:
    assert grade(Response(text=text), gold, LENIENT).accuracy == right
    boxed = grade(Response(text=text), gold, MathSpec())
    assert boxed.status is (Status.ok if "boxed" in text else Status.no_answer)


def test_statuses() -> None:
    spec = MathSpec()
    assert grade(Response(text="540"), "540", spec).status is Status.no_answer
    assert grade(Response(text=r"\boxed{}"), "540", spec).status is Status.no_answer
    assert grade(Response(text=r"\boxed{" + "1+" * 300 + "1}"), "601", spec).status is Status.no_answer
    assert grade(Response(text=r"\boxed{5}"), None, spec).status is Status.gold_unparsable
    assert grade(Response(text=r"\boxed{5}"), "", spec).status is Status.gold_unparsable
    assert grade(Response(text=r"\boxed{5}"), "}{", spec).status is Status.gold_unparsable
    assert grade(Response(text="nothing here"), "540", LENIENT).status is Status.no_answer
    assert grade(Response(text=r"\boxed{5}"), "5", spec).grader == "math_verify@2"


def settled(answer: str, gold: str) -> float | None:
    """The verdict that text alone gives, None when it leaves the answer to the library."""
    prepared = prepare(Response(text=rf"\boxed{{{answer}}}"), gold, MathSpec())
    return prepared.accuracy if isinstance(prepared, Grade) else None


def test_plain_text_settles_the_easy_cases() -> None:
    assert settled("540", "540") == 1
    assert settled("0540.0", "540") == 1
    assert settled("541", "540") == 0
    assert settled("1,234", "1234") == 1
    assert settled(r"\dfrac{1}{2}", r"\frac12") == 1
    assert settled("0.5", r"\frac{1}{2}") == 1
    assert settled(r"\left(1, 2\right)", "(1,2)") == 1
    assert settled("1/3", "0.5") == 0
    assert settled("0.333333", "1/3") is None
    assert settled("1/0", "5") is None
    assert settled("x+1", "1+x") is None
    assert settled(r"10\%", "10") is None


def test_shortcut_agrees_with_the_library() -> None:
    """Wherever text settles a verdict, the library gives the same one."""
    from math_verify import verify

    numbers = [
        "5",
        "-5",
        "5.0",
        "0.5",
        "1/2",
        r"\frac{1}{2}",
        r"-\frac{1}{2}",
        "12",
        "1.2",
        "100",
        "0",
        "1,234",
    ]
    for gold in numbers:
        for answer in numbers:
            shortcut = settled(answer, gold)
            assert shortcut is not None or "1,234" in (answer, gold)
            if shortcut is not None:
                parsed = grader._parse_box(answer, lenient=False)
                assert shortcut == verify(grader._parse_gold(gold), parsed), (answer, gold)


def test_prepared_response_gets_the_same_verdict() -> None:
    """Metamorphic: cutting a response down to its answer changes nothing, and cutting twice neither."""
    for gold, answer, right in BOXED:
        full = Response(text="Some words. " * 50 + rf"Thus $\boxed{{{answer}}}$", finished=False, length=99)
        cut = prepare(full, gold, MathSpec())
        if isinstance(cut, Response):
            assert cut.length == 0
            assert prepare(cut, gold, MathSpec()) == cut
            assert grade(cut, gold, MathSpec()).accuracy == right


def test_spelled_out() -> None:
    assert spelled_out(r"\frac43") == r"\frac{4}{3}"
    assert spelled_out(r"\frac 59") == r"\frac{5}{9}"
    assert spelled_out(r"\frac{270}7") == r"\frac{270}{7}"
    assert spelled_out(r"\frac9{19}") == r"\frac{9}{19}"
    assert spelled_out(r"\frac\pi2") == r"\frac{\pi}{2}"
    assert spelled_out(r"11\sqrt2") == r"11\sqrt{2}"
    assert spelled_out(r"\sqrt[3]{8}") == r"\sqrt[3]{8}"
    assert spelled_out(r"\frac{\sqrt{2}}{3}") == r"\frac{\sqrt{2}}{3}"


def test_malformed_latex_is_not_repaired() -> None:
    assert grade(Response(text=r"\boxed{\frac{1}{2}"), r"\frac{1}{2}", MathSpec()).accuracy == 0
    assert grade(Response(text=r"\boxed{frac12}"), r"\frac{1}{2}", MathSpec()).accuracy == 0
    assert grade(Response(text=r"\boxed{sqrt2}"), r"\sqrt{2}", MathSpec()).accuracy == 0


@pytest.mark.parametrize(("name", "rows"), [("math500", 150), ("olymmath_en", 50), ("minerva_math", 50)])
def test_golds_match_themselves(data_dir: Path, name: str, rows: int) -> None:
    """Every gold is readable, and equals itself through the library (no shortcut)."""
    from math_verify import verify

    with open(data_dir / f"{name}.jsonl") as lines:
        answers = [json.loads(line)["answer"] for line in lines][:rows]
    for answer in answers:
        gold = grader._parse_gold(answer)
        assert gold, answer
        assert verify(gold, grader._parse_box(answer, lenient=False)), answer


@pytest.mark.parametrize(
    ("latex", "parts"),
    [
        ("1,3;5", ["1", "3", "5"]),
        ("(1,2), (3,4)", ["(1,2)", "(3,4)"]),
        (r"\{1,2\}", [r"\{1,2\}"]),
        (r"f(x,y)=1 \text{ or } f(x,y)=2", ["f(x,y)=1", "f(x,y)=2"]),
        ("1, 2, and 3", ["1", "2", "3"]),
        (r"\frac{1,5}{2}", [r"\frac{1,5}{2}"]),
        (r"\text{north}, \text{land}", [r"\text{north}", r"\text{land}"]),
        ("", []),
    ],
)
def test_listed(latex: str, parts: list[str]) -> None:
    assert listed(latex) == parts


def test_same_list() -> None:
    """A matching of equal answers, each used once; a number with commas and a single answer are no lists."""
    assert same_list("f(x)=x, f(x)=-x", "f(x)=-x, f(x)=x")
    assert same_list("(x+1)^2, x^2-1", "(x-1)(x+1), x^2+2x+1")
    assert same_list("1, 1, 2", r"2, 1, \frac{2}{2}")
    assert not same_list("1, 1, 2", "2, 2, 1")
    assert not same_list("1, 2", "1, 2, 3")
    assert not same_list("1,234", "234, 1")
    assert not same_list("5", "5")


@pytest.mark.parametrize("reasoning", list(Reasoning))
@pytest.mark.parametrize("extract", list(Extract))
def test_cut_responses_are_read_alike(reasoning: Reasoning, extract: Extract) -> None:
    """Metamorphic: what `prepare` leaves of a response is graded as the response, and left alone by it."""
    spec = MathSpec(extract=extract, reasoning=reasoning)
    for text in (
        r"<think>\boxed{2x}</think> so \boxed{x+x+0}",
        r"<think>\boxed{x+x+0}</think> so \boxed{3x}",
        r"<think>\boxed{x+x+0}</think> <think>",
        "<think>$3x$</think> so $x+x+0$",
        r"\boxed{x+x+0}",
    ):
        cut = prepare(Response(text=text), "2x", spec)
        whole = grade(Response(text=text), "2x", spec)
        if isinstance(cut, Grade):
            assert cut == whole
        else:
            assert prepare(cut, "2x", spec) == cut
            assert grade(cut, "2x", spec) == whole


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Find $x$ and put it into \\boxed{}.",
        "".join(rf"\boxed{{{number}}} " for number in range(1000)),
        r"\boxed{540} but no, \boxed{541}",
        r"\boxed{540, 541}",
        r"\boxed{540 \text{ or } 541}",
        r"\boxed{" + ", ".join(map(str, range(1000))) + "}",
        r"\boxed{" + ", ".join(map(str, range(500, 550))) + "}",
        r"\boxed{" + "{" * 5_000 + "540" + "}" * 5_001,
        r"\boxed{x}",
        r"\boxed{540",
    ],
)
def test_what_earns_nothing(text: str) -> None:
    assert grade(Response(text=text), "540", MathSpec()).accuracy == 0


def test_any_thread() -> None:
    found: list[Grade] = []
    response = Response(text=r"\boxed{\frac{2}{4}x}")
    thread = threading.Thread(target=lambda: found.append(grade(response, r"\frac{x}{2}", MathSpec())))
    thread.start()
    thread.join()
    assert found == [grade(response, r"\frac{x}{2}", MathSpec())]
    assert found[0].accuracy == 1


def test_several_answers_in_any_order(data_dir: Path) -> None:
    """OlympiadBench's rows of several answers: reversed they are right, one short they are wrong."""
    with open(data_dir / "olympiadbench.jsonl") as lines:
        rows = [row for row in map(json.loads, lines) if row["level"].endswith("multiple")]
    assert len(rows) == 94
    for row in rows[::4]:
        parts = listed(grader.bare(row["answer"]))
        if len(set(parts)) == len(parts) > 1:
            turned, short = (rf"\boxed{{{', '.join(some)}}}" for some in (parts[::-1], parts[:-1]))
            assert grade(Response(text=turned), row["answer"], MathSpec()).accuracy == 1, row["answer"]
            assert grade(Response(text=short), row["answer"], MathSpec()).accuracy == 0, row["answer"]


def test_reference_solutions_are_right(data_dir: Path) -> None:
    """All of MATH-500: the box that a solution ends with is its answer."""
    with open(data_dir / "math500.jsonl") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 500
    assert [
        row["id"]
        for row in rows
        if not grade(Response(text=row["solution"]), row["answer"], MathSpec()).accuracy
    ] == []
