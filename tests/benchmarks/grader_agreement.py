r"""Do our graders accept what is right, and do others agree?

`python -m tests.benchmarks.grader_agreement [--others /tmp/grader-venv/bin/python]`

1. *Golds and reference solutions grade themselves right*: every row of every evaluation set, by the grader
   that its benchmark uses, and by the library alone where plain text would settle it. Every miss is printed.
2. *Agreement on MATH-500* (with `--others`, a Python that has the graders of `other_graders.py`): reference
   solutions, respelled right answers and wrong ones made by rule, each with its known verdict. One line a
   grader and kind of answer, then every case on which one of the others and we differ.

Data: the shared sets (`WHETSTONE_DATA`). About a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rlhf.rewards import math as math_kind
from rlhf.rewards.base import Scorer
from rlhf.rewards.config import RewardConfig, RewardPartConfig
from rlhf.rewards.exact import last_box
from rlhf.rewards.sandbox import Job, WorkerPool
from rollout.types import FinishReason, Group, Prompt, Trajectory

DATA = Path(os.environ.get("WHETSTONE_DATA", Path(__file__).parents[3] / "shared" / "data"))
OTHERS = ("prm800k", "hendrycks", "minerva", "library")
RIGHT = ("reference solution", "integer respelled", "formula respelled", "fraction as a decimal")
"""Kinds of cases that are right; the others are wrong."""
GSM8K_LINE = {"rule": "answer_line", "marker": "####"}


@dataclass(slots=True)
class Case:
    """A response with its known verdict."""

    id: str
    kind: str
    """Which rule made it."""
    gold: str
    response: str
    right: bool


def load(name: str) -> list[dict[str, Any]]:
    """The rows of one shared data set."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def boxed(answer: str) -> str:
    """A response that states `answer`."""
    return rf"Hence the answer is $\boxed{{{answer}}}$."


def graded(kind: str, args: dict[str, Any], pairs: list[tuple[str, str]]) -> list[Trajectory]:
    """Our verdicts on `(gold, response)` pairs, in order, as a run gives them."""
    groups = [
        Group(
            id=str(index),
            prompt=Prompt(id=str(index), token_ids=[], text="", answer=gold, source="b"),
            born=0,
            trajectories=[
                Trajectory(
                    prompt_ids=[],
                    response_ids=[],
                    logprobs=[],
                    finish_reason=FinishReason.STOP,
                    version_spans=[],
                    sample_index=0,
                    seed=0,
                    text=response,
                )
            ],
        )
        for index, (gold, response) in enumerate(pairs)
    ]
    with Scorer(RewardConfig(parts={"answer": RewardPartConfig(kind=kind, args=args)})) as scorer:
        scorer.score(groups)
    return [group.trajectories[0] for group in groups]


def library_job() -> Any:
    """What a worker does for `by_library`: the library's verdict, plain text never compared."""
    math_kind.warm_up()
    return lambda pair: math_kind.equal(*pair)


def by_library(pairs: list[tuple[str, str]]) -> list[bool]:
    """The library's verdict on `(gold, answer)` formulas."""
    job = Job("tests.benchmarks.grader_agreement:library_job")
    pool = WorkerPool({"library": job}, workers=1, timeout_s=10.0, memory_mb=2048)
    outcomes = pool.map([("library", pair) for pair in pairs])
    pool.close()
    return [outcome.value is True for outcome in outcomes]


def report(
    title: str, ids: list[str], pairs: list[tuple[str, str]], verdicts: list[tuple[bool, str]]
) -> None:
    """One row of the table and every miss beneath it."""
    right = sum(verdict for verdict, _ in verdicts)
    print(f"| {title} | {right}/{len(ids)} | {100 * right / len(ids):.1f} % |", flush=True)
    for name, (gold, _), (verdict, status) in zip(ids, pairs, verdicts):
        if not verdict:
            print(f"    missed {name} ({status}): {gold}")


def themselves() -> None:
    """Part 1: every gold and every reference solution."""
    print("| set, what is graded, grader | right | rate |\n|---|---|---|")
    solutions: list[tuple[str, str, str, dict[str, Any]]] = [
        ("math500", "solution", "math_verify", {}),
        ("gsm8k_test", "solution", "exact_integer", GSM8K_LINE),
        ("gsm8k_test", "solution", "exact_integer", {"rule": "last_number"}),
    ]
    golds: list[tuple[str, str, str, dict[str, Any]]] = [
        (f"aime{year}", "boxed gold", kind, {}) for year in (24, 25, 26) for kind in ("aime", "math_verify")
    ]
    golds += [("amc23", "boxed gold", "exact_integer", {"rule": "boxed"})]
    golds += [(name, "boxed gold", "math_verify", {}) for name in ("amc23", "olympiadbench", "minerva_math")]
    for name, what, kind, args in solutions + golds:
        rows = load(name)
        pairs = [
            (row["answer"], row["solution"] if what == "solution" else boxed(row["answer"])) for row in rows
        ]
        found = graded(kind, args, pairs)
        verdicts = [(trajectory.accuracy == 1.0, str(trajectory.grade_status)) for trajectory in found]
        rule = f" {args['rule']}" if args else ""
        report(f"{name}, {what}, {kind}{rule}", [row["id"] for row in rows], pairs, verdicts)
    for name in ("math500", "olympiadbench", "minerva_math"):
        rows = load(name)
        pairs = [(math_kind.bare(row["answer"]), math_kind.bare(row["answer"])) for row in rows]
        verdicts = [(verdict, "library") for verdict in by_library(pairs)]
        report(
            f"{name}, gold, math_verify by the library alone", [row["id"] for row in rows], pairs, verdicts
        )
    several()


def several() -> None:
    """OlympiadBench's rows of several answers: in another order they are right, without one of them wrong."""
    rows = [row for row in load("olympiadbench") if row["level"].endswith("multiple")]
    lists = [math_kind.listed(math_kind.bare(row["answer"])) for row in rows]
    kept = [(row, parts) for row, parts in zip(rows, lists) if len(set(parts)) == len(parts) > 1]
    names = [row["id"] for row, _ in kept]
    turned = [(row["answer"], boxed(", ".join(reversed(parts)))) for row, parts in kept]
    found = graded("math_verify", {}, turned)
    verdicts = [(trajectory.accuracy == 1.0, str(trajectory.grade_status)) for trajectory in found]
    report("olympiadbench, several answers in reverse order, math_verify", names, turned, verdicts)
    short = [(row["answer"], boxed(", ".join(parts[:-1]))) for row, parts in kept]
    found = graded("math_verify", {}, short)
    verdicts = [(trajectory.accuracy == 0.0, str(trajectory.grade_status)) for trajectory in found]
    report("olympiadbench, several answers but the last one, refused, math_verify", names, short, verdicts)


def cases() -> Iterator[Case]:
    """Part 2: what both sides grade, from MATH-500 alone."""
    rows = load("math500")
    for index, row in enumerate(rows):
        name, gold = row["id"], row["answer"]
        yield Case(name, "reference solution", gold, row["solution"], True)
        made = {
            "integer respelled": integer_respelled(gold),
            "formula respelled": formula_respelled(gold),
            "fraction as a decimal": as_decimal(gold),
            "digit changed": digit_changed(gold, random.Random(index)),
            "sign flipped": sign_flipped(gold),
            "pair swapped": pair_swapped(gold),
            "another problem's answer": next(
                other["answer"]
                for other in rows[index + 1 :] + rows
                if math_kind.bare(other["answer"].split("=")[-1]) != math_kind.bare(gold.split("=")[-1])
            ),
        }
        for kind, answer in made.items():
            if answer is not None:
                yield Case(name, kind, gold, boxed(answer), kind in RIGHT)


def integer_respelled(answer: str) -> str | None:
    """`1234` as `1,234`, `5` as `5.0`; None for what is no integer."""
    if not re.fullmatch(r"-?\d+", answer):
        return None
    return f"{int(answer):,}" if len(answer) > 3 else f"{answer}.0"


def formula_respelled(answer: str) -> str | None:
    r"""`\frac` as `/` or `\dfrac`, no growing brackets, other blanks; None when that changes nothing."""
    whole = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer)
    if whole:
        return f"{whole[1]}{whole[2]}/{whole[3]}"
    other = re.sub(r"\\left|\\right", "", answer).replace(r"\frac", r"\dfrac").replace(", ", ",")
    return other if other != answer else None


def as_decimal(answer: str) -> str | None:
    r"""`\frac{3}{4}` as `0.75`; None for what is no fraction or has no short decimal form."""
    whole = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer)
    if whole is None:
        return None
    value = f"{int(whole[2]) / int(whole[3]):.6g}"
    return whole[1] + value if Fraction(value) == Fraction(int(whole[2]), int(whole[3])) else None


def digit_changed(answer: str, rng: random.Random) -> str | None:
    """One digit replaced by another; no leading zero comes out of it."""
    places = [match.start() for match in re.finditer(r"\d", answer)]
    if not places:
        return None
    place = rng.choice(places)
    digit = rng.choice([digit for digit in "123456789" if digit != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def sign_flipped(answer: str) -> str | None:
    """The negative of a number or an expression; None for pairs, lists, equations, text and zero."""
    if answer == "0" or re.search(r"[=,<>]|\\(?:text|le|ge|pm|begin|in|cup|\$|%)|^[([]", answer):
        return None
    if answer.startswith("-"):
        return answer[1:] if re.fullmatch(r"[^+-]*", answer[1:]) else f"-({answer})"
    return f"-{answer}" if re.fullmatch(r"[^+-]*", answer) else f"-({answer})"


def pair_swapped(answer: str) -> str | None:
    """`(a, b)` as `(b, a)`; None for what is no pair of two different things."""
    bare = re.sub(r"\\left|\\right| ", "", answer)
    if not bare.startswith("(") or not bare.endswith(")"):
        return None
    parts = math_kind.listed(bare[1:-1])
    return f"({parts[1]}, {parts[0]})" if len(parts) == 2 and parts[0] != parts[1] else None


def other_verdicts(python: str, made: list[Case]) -> list[dict[str, bool]]:
    """What the other graders say, from a process of their own."""
    lines = "".join(json.dumps({"gold": case.gold, "response": case.response}) + "\n" for case in made)
    script = Path(__file__).with_name("other_graders.py")
    done = subprocess.run([python, str(script)], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def agreement(python: str) -> None:
    """Part 2: the tables."""
    made = list(cases())
    found = graded("math_verify", {}, [(case.gold, case.response) for case in made])
    verdicts = [
        {"ours": trajectory.accuracy == 1.0, **others}
        for trajectory, others in zip(found, other_verdicts(python, made))
    ]
    names = ("ours", *OTHERS)
    kinds = list(dict.fromkeys(case.kind for case in made))
    print("\nverdicts as they should be\n\n| answers | cases | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for kind in kinds:
        chosen = [index for index, case in enumerate(made) if case.kind == kind]
        cells = [str(sum(verdicts[index][name] == made[index].right for index in chosen)) for name in names]
        print(f"| {kind} | {len(chosen)} | " + " | ".join(cells) + " |")
    print("\nagreement with ours\n\n| answers | cases | " + " | ".join(OTHERS) + " |")
    print("|---|---|" + "---|" * len(OTHERS))
    for kind in [*kinds, "all"]:
        chosen = [index for index, case in enumerate(made) if kind in (case.kind, "all")]
        same = [
            sum(verdicts[i][name] == verdicts[i]["ours"] for i in chosen) / len(chosen) for name in OTHERS
        ]
        print(f"| {kind} | {len(chosen)} | " + " | ".join(f"{100 * rate:.2f} %" for rate in same) + " |")
    strings = 0
    print("\nevery case that somebody judges differently from us, or that we get wrong")
    for case, said in zip(made, verdicts):
        if case.right and said == dict.fromkeys(names, True) | {"hendrycks": False}:
            strings += 1
        elif len(set(said.values())) > 1 or said["ours"] != case.right:
            answer = last_box(case.response) or ""
            said_so = " ".join(f"{name}={int(verdict)}" for name, verdict in said.items())
            print(
                f"{case.kind} [{int(case.right)}] {said_so}  gold {case.gold!r} answer {answer!r} ({case.id})"
            )
    print(f"and {strings} right answers that hendrycks alone refuses, because it compares strings")


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--others", default="", help="Python that has the graders of other_graders.py")
    python = parser.parse_args().others
    themselves()
    if python:
        agreement(python)
    else:
        print("\nno --others: see tests/benchmarks/other_graders.py for how to make that Python")


if __name__ == "__main__":
    main()
