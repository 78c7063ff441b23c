"""The shaping parts: form and length."""

from __future__ import annotations

import math

import pytest

from rlhf.rewards import format, length
from rlhf.rewards.grade import Response, Status, build_spec, find_kind


@pytest.mark.parametrize(
    ("text", "finished", "value"),
    [
        ("We add.\nAnswer: 32", True, 1.0),
        ("  We add.\nStill.\nAnswer: -32 \n", True, 1.0),
        ("We add.\nAnswer: 32 apples", True, 0.0),
        ("Answer: 32\nand more", True, 0.0),
        ("", True, 0.0),
        ("We add.\nAnswer: 32", False, 1.0),
    ],
)
def test_format(text: str, finished: bool, value: float) -> None:
    spec = format.FormatSpec(pattern=r".*\nAnswer: -?\d+")
    got = format.grade(Response(text=text, finished=finished), None, spec)
    assert got.accuracy == value
    assert got.status == (Status.ok if value else Status.no_answer)


def test_format_may_ask_for_an_end() -> None:
    spec = format.FormatSpec(pattern="a+", must_end=True)
    assert format.grade(Response(text="aa", finished=False), None, spec).accuracy == 0.0
    assert format.grade(Response(text="aa"), None, spec).accuracy == 1.0


@pytest.mark.parametrize(
    ("shape", "tokens", "value"),
    [
        ("linear", 0, 0.0),
        ("linear", 100, 0.0),
        ("linear", 101, -0.01),
        ("linear", 150, -0.5),
        ("linear", 200, -1.0),
        ("linear", 900, -1.0),
        ("cosine", 100, 0.0),
        ("cosine", 125, -(1 - math.cos(math.pi / 4)) / 2),
        ("cosine", 150, -0.5),
        ("cosine", 200, -1.0),
        ("target", 100, 0.0),
        ("target", 75, -0.25),
        ("target", 125, -0.25),
        ("target", 0, -1.0),
        ("target", 900, -1.0),
    ],
)
def test_length(shape: str, tokens: int, value: float) -> None:
    spec = build_spec(find_kind("length"), {"shape": shape, "free": 100, "limit": 200})
    got = length.grade(Response(text="", length=tokens), None, spec).accuracy
    assert got == pytest.approx(value, abs=1e-12)
    assert math.copysign(1.0, got) == 1.0 or got < 0  # never -0.0


def test_length_falls_monotonically() -> None:
    for shape in (length.LengthShape.linear, length.LengthShape.cosine):
        spec = length.LengthSpec(shape=shape, free=10, limit=50)
        values = [length.grade(Response(text="", length=n), None, spec).accuracy for n in range(60)]
        assert values == sorted(values, reverse=True)
