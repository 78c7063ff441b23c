r"""Mathematical equality by the `math-verify` library: fractions, roots, sets, intervals, percentages, units.

Chosen here, and tested against the library's version 0.9.0:
- *Last box only.* The library fuses neighboring boxes (`\boxed{539} or \boxed{540}` becomes 539540); only the
  last one is handed to it.
- *Gold first.* `verify(gold, answer)` is not symmetric: an inequality as gold accepts the interval, not the
  other way round.
- *Gold wrapped.* A bare LaTeX gold is misread (`\left( 3, \frac{\pi}{2} \right)` becomes 3), so it is boxed.
- *Malformed LaTeX is not repaired* in answers (a reward that repairs teaches it), but TeX's own shorthand is
  spelled out on both sides: `\frac43` and `\sqrt2` are valid.
- *Strings and numbers first.* Equal formulas are right, numbers that differ are wrong; neither needs SymPy.
- *Several answers.* A list in the box is compared in any order, element by element where the library, which
  pairs what it has sorted, says no. Several boxes are no list.
- *Letters are variables.* The library drops a last letter or two as a unit (`2c`, `2ab` and `x^2 + c` become
  2, 2 and unreadable); here only longer words, `\text{…}` and `cm`, `km`, `kg` and the like are.
- *What it cannot read* is tried once more without a left side (`m_{\max} = n^2 - 1`) and never as a list.
- *No time limit of its own.* The library's uses `signal.alarm`, which works on a main thread only, and SymPy
  can spend hours on a tower of powers: this kind always runs in the killable processes of `sandbox.py`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rlhf.errors import UserError
from rlhf.rewards.exact import integer, last_box
from rlhf.rewards.grade import Grade, Kind, Response, Status, failed, register
from rlhf.rewards.reasoning import THINK_END, Reasoning, answer_part


class Extract(StrEnum):
    """Which part of a response is the answer."""

    boxed = "boxed"
    r"""The last `\boxed{}`, nothing else; for rewards."""
    lenient = "lenient"
    r"""The last `\boxed{}` if there is one, else what the library finds in the tail: "answer is …", the last
    formula, the last number. For evaluating models that were not asked for a box."""


@dataclass
class MathSpec:
    """Options of `math_verify`."""

    extract: Extract = Extract.boxed
    """Which part of a response is the answer."""
    max_chars: int = 512
    """A longer answer counts as none (the longest of MATH-500 has 159 characters); `lenient` looks at no more
    than this much from the end."""
    reasoning: Reasoning = Reasoning.keep
    """Whether the text before `</think>` is read."""

    def check(self) -> list[str]:
        """Sentences about impossible values."""
        return [] if self.max_chars > 0 else [f"args.max_chars={self.max_chars} must be at least 1."]


def grade(response: Response, gold: str | None, spec: MathSpec) -> Grade:
    """Whether the answer of the response equals `gold` mathematically. May run for hours: see the module."""
    settled = prepare(response, gold, spec)
    if isinstance(settled, Grade):
        return settled
    assert gold is not None
    target = bare(gold)
    parsed_gold = _parse_gold(target)
    if not parsed_gold:
        return failed(KIND.label, Status.gold_unparsable)
    text = settled.text.removeprefix(THINK_END)
    answer = last_box(text)
    if answer is not None:
        right = equal(target, answer)
    else:
        parsed, answer = _parse_text(text)
        right = _verify(parsed_gold, parsed) if parsed else None
    if right is None:
        return failed(KIND.label, Status.no_answer)
    return Grade(accuracy=float(right), extracted=answer, grader=KIND.label)


def equal(gold: str, answer: str) -> bool | None:
    """Whether two formulas, without box and dollars, are equal by the library; None when it cannot read
    `answer`. May run for hours."""
    parsed = _read(answer, lenient=False)
    return _verify(_parse_gold(gold), parsed) or same_list(gold, answer) if parsed else None


def prepare(response: Response, gold: str | None, spec: MathSpec) -> Grade | Response:
    """The verdict where plain text settles it, else the response cut down to its answer."""
    target = bare(gold) if gold is not None else ""
    if not target or len(target) > spec.max_chars:
        return failed(KIND.label, Status.gold_unparsable)
    text = answer_part(response.text, spec.reasoning) or ""
    box = last_box(text)
    closed = "" if spec.reasoning is Reasoning.keep else THINK_END
    if box is None:
        if spec.extract is Extract.boxed or not text.strip():
            return failed(KIND.label, Status.no_answer)
        return Response(text=closed + text[-spec.max_chars :])
    answer = bare(box)
    if not answer or len(answer) > spec.max_chars:
        return failed(KIND.label, Status.no_answer)
    same = _settled(answer, target)
    if same is None:
        return Response(text=rf"{closed}\boxed{{{answer}}}")
    return Grade(accuracy=float(same), extracted=integer(answer) or answer, grader=KIND.label)


_NUMBER = re.compile(
    r"(-?)(?:\\[dt]?frac\{(\d{1,9})\}\{(\d{1,9})\}|(\d{1,9})/(\d{1,9})|(\d{1,15}(?:\.\d{1,15})?))"
)
_BASED = re.compile(r"(\d[\dA-Za-z]*)_\{?(\d+)\}?")
_SPACING = re.compile(r"\s+|\\[,;:! ]|\\(?:left|right)(?![A-Za-z])")
_FAR_APART = Fraction(1, 1000)


def _settled(answer: str, target: str) -> bool | None:
    """Whether two formulas are equal where that needs no SymPy; None where it does.

    Equal up to spacing is right. Of two plain numbers, equal ones are right, those more than a thousandth
    apart wrong; closer ones are left to the library, which compares floats to six decimals. Two numbers with
    a base (`52_8`) are compared here, as the library drops it; one side may leave it out.
    """
    answer, target = _plain(answer), _plain(target)
    if answer == target:
        return True
    based, gold_based = _BASED.fullmatch(answer), _BASED.fullmatch(target)
    if based and gold_based:
        return based.groups() == gold_based.groups()
    whole, gold_whole = integer(answer), integer(target)
    if whole is not None and gold_whole is not None:
        return whole == gold_whole
    number, gold_number = _rational(answer), _rational(target)
    if number is None or gold_number is None:
        return None
    if number == gold_number:
        return True
    return False if abs(number - gold_number) > _FAR_APART else None


def _plain(latex: str) -> str:
    """A formula without what TeX ignores: blanks, thin spaces, the growing of brackets, shorthand."""
    return _SPACING.sub("", spelled_out(latex)).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")


def _rational(latex: str) -> Fraction | None:
    """The value of a plain number, decimal or fraction; None for everything else."""
    match = _NUMBER.fullmatch(latex)
    if match is None:
        return None
    sign, above, below, left, right, number = match.groups()
    if number is None and int(below or right) == 0:
        return None
    value = Fraction(number) if number is not None else Fraction(int(above or left), int(below or right))
    return -value if sign else value


_ARGUMENT = r"(\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|[^\s{}\\])"
_FRACTION = re.compile(rf"(\\[dt]?frac)\s*{_ARGUMENT}\s*{_ARGUMENT}")
_ROOT = re.compile(r"(\\sqrt)\s*(\\[A-Za-z]+|[^\s{}\\\[])")


def spelled_out(latex: str) -> str:
    r"""TeX's shorthand with its braces: `\frac43` -> `\frac{4}{3}`, `\sqrt2` -> `\sqrt{2}`."""

    def fraction(match: re.Match[str]) -> str:
        parts = (part if part.startswith("{") else f"{{{part}}}" for part in match.groups()[1:])
        return match[1] + "".join(parts)

    return _ROOT.sub(r"\1{\2}", _FRACTION.sub(fraction, latex))


_STRAY = re.compile(r"(?<!\\)\$|(?<=\d)\.(?![\d.])|(?<![.t])\.\s*$")
r"""Dollars around mathematics and the points of `1./3.`, at which the library stops; not that of `\right.`"""


def bare(answer: str) -> str:
    """An answer, gold or not, without its box, dollars and stray points."""
    box = last_box(answer)
    return _STRAY.sub("", answer if box is None else box).strip()


_BREAKS = re.compile(
    r"[(\[{]|[)\]}]|(,|;|\\text\s*\{,?\s*(?:or|and)\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z]))"
)


def listed(latex: str) -> list[str]:
    r"""The answers of a list: parts between commas, semicolons, "or" and "and" outside of all brackets."""
    parts, begin, depth = [], 0, 0
    for token in _BREAKS.finditer(latex):
        if token[1] is None:
            depth += 1 if token[0] in "([{" else -1
        elif depth == 0:
            parts.append(latex[begin : token.start()])
            begin = token.end()
    parts.append(latex[begin:])
    return [part.strip() for part in parts if part.strip()]


def same_list(gold: str, answer: str) -> bool:
    """Whether two lists of answers hold equal ones in any order, each as often; False where `gold` is none.

    The library pairs elements that it has sorted as they are written: `(x+1)^2, x^2-1` is to it another list
    than `x^2+2x+1, (x-1)(x+1)`.
    """
    golds, answers = listed(gold), listed(answer)
    if integer(gold) is not None or len(golds) < 2 or len(golds) != len(answers):
        return False
    left = [_parse_box(part, lenient=False) for part in answers]
    for part in golds:
        parsed = _parse_gold(part)
        match = next((index for index, other in enumerate(left) if _verify(parsed, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    """The library's verdict, gold first, without its own time limit."""
    return bool(_library().verify(gold, answer, timeout_seconds=None))


@lru_cache(maxsize=1)
def _library() -> Any:
    """The `math_verify` module, silenced: it warns once a process that its time limits are off."""
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise UserError(
            "kind=math_verify needs the package math-verify: install it, or choose kind=exact_integer."
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify


@lru_cache(maxsize=2)
def _latex_config(lenient: bool) -> Any:
    """How LaTeX is read: as the library's authors advise for rewards, or lenient (gold answers)."""
    from latex2sympy2_extended import NormalizationConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=lenient, nits=lenient, boxed="all", equations=False
    )
    return _library().LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    """Parsed once for all responses of a group."""
    return _read(gold, lenient=True)


def _read(latex: str, *, lenient: bool) -> list[Any]:
    """`_parse_box`, or the right side where the library cannot read a single equation."""
    parsed = _parse_box(latex, lenient=lenient)
    if "=" in latex and all(isinstance(found, str) for found in parsed) and len(listed(latex)) == 1:
        parsed = parsed + _parse_box(latex.rpartition("=")[2], lenient=lenient)
    return parsed


_VARIABLES = re.compile(r"(?<=[\d}\s])((?:[cdghlmost]|ab|am|bc|by|cc|lt|mp|mt|pm|rd|rs|st|th)s?)(?=\s*$)")
"""What the library takes for a unit at the end of a formula, and what may as well be one or two variables."""


def _parse_box(content: str, *, lenient: bool) -> list[Any]:
    """SymPy objects (and strings) that stand for `content`; empty when nothing was read.

    A percentage goes outside the formula, where the library sees it.
    """
    content = _VARIABLES.sub(r"{\1}", spelled_out(content))
    number = re.fullmatch(r"(.*[^\\\s])\s*\\?%", content.strip(), re.DOTALL)
    text = f"${number[1]}$%" if number else rf"\boxed{{{content}}}"
    return _library().parse(text, (_latex_config(lenient),), parsing_timeout=None)


def _parse_text(text: str) -> tuple[list[Any], str | None]:
    """What the library finds in free text, and how it is spelled there."""
    configs = (_latex_config(False), _library().ExprExtractionConfig())
    parsed = _library().parse(spelled_out(text), configs, parsing_timeout=None)
    return parsed, str(parsed[-1]) if parsed else None


def warm_up() -> None:
    """Import the library and parse once, so that the first answer does not pay for it within its limit."""
    _verify(_parse_gold("1"), _parse_box(r"\frac{1}{2}", lenient=False))


KIND = register(
    Kind(
        name="math_verify",
        version=2,
        spec=MathSpec,
        grade=grade,
        prepare=prepare,
        isolated=True,
        warm_up=warm_up,
    )
)
