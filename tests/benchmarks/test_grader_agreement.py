"""The answers that `grader_agreement.py` makes are right or wrong as it says, and we judge them so."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.benchmarks import grader_agreement as bench


def test_right_answers_are_respelled() -> None:
    assert bench.integer_respelled("1234") == "1,234"
    assert bench.integer_respelled("-5") == "-5.0"
    assert bench.integer_respelled("x") is None
    assert bench.formula_respelled(r"-\frac{3}{4}") == "-3/4"
    assert bench.formula_respelled(r"\left(1, \frac{x}{2}\right]") == r"(1,\dfrac{x}{2}]"
    assert bench.formula_respelled("7") is None
    assert bench.as_decimal(r"-\frac{3}{4}") == "-0.75"
    assert bench.as_decimal(r"\frac{1}{3}") is None


def test_wrong_answers_are_wrong() -> None:
    assert bench.sign_flipped("7") == "-7"
    assert bench.sign_flipped("-7") == "7"
    assert bench.sign_flipped("p - q") == "-(p - q)"
    assert bench.sign_flipped("-p - q") == "-(-p - q)"
    assert [bench.sign_flipped(answer) for answer in ("0", "(1,2)", "x=5", r"\pm 2")] == [None] * 4
    assert bench.pair_swapped(r"\left( 3, \frac{\pi}{2} \right)") == r"(\frac{\pi}{2}, 3)"
    assert [bench.pair_swapped(answer) for answer in ("(2,2)", "(1,2,3)", "1,2", "[1,2)")] == [None] * 4
    for seed in range(20):
        changed = bench.digit_changed(r"\frac{10}{3}", random.Random(seed))
        assert changed is not None
        assert sum(a != b for a, b in zip(changed, r"\frac{10}{3}", strict=True)) == 1
    assert bench.digit_changed("x", random.Random(0)) is None


def test_a_case_of_each_kind(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seventh problem: no wrong case states the gold, and we judge all of them as they should be."""
    monkeypatch.setattr(bench, "DATA", data_dir)
    made = list(bench.cases())
    assert len(made) == 2347
    chosen = made[::7]
    found = bench.graded("math_verify", {}, [(case.gold, case.response) for case in chosen])
    wrong = [case for case, trajectory in zip(chosen, found) if bool(trajectory.accuracy) is not case.right]
    assert wrong == []
    assert bench.by_library([("1/2", "0.5"), ("1/2", "0.6"), (r"\sqrt{8}", r"2\sqrt{2}")]) == [
        True,
        False,
        True,
    ]
