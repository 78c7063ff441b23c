r"""Exact integer answers: four rules, no parsing of mathematics, microseconds a response.

How a number is written (all four rules): an optional minus that touches the digits and does not follow a
digit, letter or closing bracket (`11-21` holds 11 and 21, `= -5` holds -5); digits, or groups of three behind
commas (`1,234`, also `1{,}234`); an optional decimal part. Numbers are equal when their values are:
leading zeros fall away (`025` = 25) and a decimal part of zeros too (`7.0` = 7, `7.5` is never an integer).
Digits inside a word (`x2`, `\sqrt2`) are no number. `3/4`, `2^5`, `\frac{1}{2}` and `\sqrt{16}` are each
read as one expression, which is no integer, whatever its value. A percent sign or a unit beside a number is
ignored where a number is looked for in text, and refused where the whole answer must be one; dollars never
matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from rlhf.rewards.grade import Grade, Kind, Response, Status, failed, register
from rlhf.rewards.reasoning import Reasoning, answer_part


class ExactRule(StrEnum):
    """Where the answer is looked for."""

    last_number = "last_number"
    """The last number of the response (of its last 1 000 characters); by default the response must have ended
    by itself."""
    any_mention = "any_mention"
    """Any number of the response: a measure of what the model knows, easily gamed as a reward."""
    answer_line = "answer_line"
    """What follows the last `marker` on its line, and nothing else may stand there."""
    boxed = "boxed"
    r"""All that stands in the last `\boxed{}`."""


@dataclass
class ExactSpec:
    """Options of `exact_integer`."""

    rule: ExactRule = ExactRule.last_number
    """Where the answer is looked for."""
    must_end: bool | None = None
    """Whether a truncated response fails. None: true for `last_number`, false for the other rules."""
    marker: str = "Answer:"
    """What `answer_line` looks for, in any case, blanks before its last character allowed (`Answer :`)."""
    reasoning: Reasoning = Reasoning.keep
    """Whether the text before `</think>` is read."""

    def check(self) -> list[str]:
        """Sentences about impossible values."""
        if not self.marker.strip():
            return ['args.marker is empty: name the text before the answer, for example "Answer:".']
        return []

    @property
    def ends(self) -> bool:
        """`must_end` with the rule's own default filled in."""
        return self.rule is ExactRule.last_number if self.must_end is None else self.must_end


_TAIL = 1000
"""Characters from the end in which `last_number` looks."""
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_TOKEN = re.compile(
    rf"""
    (?P<macro>\\(?:[dt]?frac\s*\{{[^{{}}]*\}}\s*\{{[^{{}}]*\}}|sqrt\s*(?:\[\d+\])?\{{[^{{}}]*\}}))
    | (?P<word>[A-Za-z_][A-Za-z_\d]*(?:\.\d+)*)
    | (?P<number>(?:(?<![\w)\]}}])[-−])?(?:{_DIGITS}(?:\.\d+)?|(?<![\d.])\.\d+))
      (?P<tail>(?:(?:/|\^|\*\*)\{{?-?\d+(?:[.,]\d+)*\}}?)+)?
    """,
    re.ASCII | re.VERBOSE,
)
_WHOLE = re.compile(rf"[-−+]?(?:{_DIGITS}(?:\.\d+)?|\.\d+)", re.ASCII)
_WRAPPERS = (
    ("$", "$"),
    (r"\(", r"\)"),
    ("**", "**"),
    (r"\boxed{", "}"),
    (r"\text{", "}"),
    (r"\mathbf{", "}"),
)


def grade(response: Response, gold: str | None, spec: ExactSpec) -> Grade:
    """Whether the answer that `spec.rule` finds is the integer `gold`.

    `no_answer` when nothing is found or when the response had to end and did not; `gold_unparsable` when
    `gold` is no integer.
    """
    target = integer(gold) if gold is not None else None
    if target is None:
        return failed(KIND.label, Status.gold_unparsable)
    if spec.ends and not response.finished:
        return failed(KIND.label, Status.no_answer)
    text = answer_part(response.text, spec.reasoning)
    found = None if text is None else _find(text, target, spec)
    if found is None:
        return failed(KIND.label, Status.no_answer)
    return Grade(accuracy=float(found == target), extracted=found, grader=KIND.label)


def numbers(text: str) -> Iterator[str]:
    """Every number of `text` in canonical form; expressions (`3/4`, `2^5`) come as they are written."""
    if "," in text:
        text = text.replace("{,}", ",").replace(r",\!", ",")
    for token in _TOKEN.finditer(text):
        if token["macro"] or token["tail"]:
            yield token[0]
        elif token["number"]:
            yield canonical(token["number"])


def canonical(number: str) -> str:
    """One spelling for each value: no commas, no leading zeros, no decimal part of zeros, no `-0`."""
    negative = number[0] in "-−"
    whole, _, decimals = number.lstrip("-−+").replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    value = (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
    return f"-{value}" if negative and value != "0" else value


def integer(text: str) -> str | None:
    """The canonical integer that `text` consists of (dollars, a box and a full stop aside), or None."""
    bare = unwrap(text)
    if not _WHOLE.fullmatch(bare):
        return None
    value = canonical(bare)
    return None if "." in value else value


def unwrap(text: str) -> str:
    r"""`text` without surrounding blanks, a closing full stop, `$…$`, `**…**`, `\boxed{…}` and the like."""
    text = text.replace("{,}", ",").replace(r",\!", ",")
    before = None
    while text != before:
        before = text
        text = text.strip().removesuffix(".")
        for left, right in _WRAPPERS:
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
                text = text[len(left) : len(text) - len(right)]
        text = text.removeprefix("\\$").removeprefix("$")
    return text


def last_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` or `\fbox{…}`; None when there is none
    or when the last one is cut off.

    One pass from the box onwards: linear in the length of the text.
    """
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    return None if start < 0 else _closed(text, text.index("{", start) + 1, len(text))


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def boxes(text: str, longest: int) -> list[tuple[int, str | None]]:
    r"""Where every `\boxed{…}` and `\fbox{…}` starts and what stands in it, nested ones included, in order.

    None for one that is cut off or holds more than `longest` characters, so that the time is bounded by
    `longest` times the number of boxes.
    """
    return [
        (box.start(), _closed(text, box.end(), min(len(text), box.end() + longest + 1)))
        for box in _BOX.finditer(text)
    ]


_BRACE = re.compile(r"[{}]")


def _closed(text: str, begin: int, end: int) -> str | None:
    """The text from `begin` to the brace that closes the one before it; None when `end` comes first."""
    depth = 1
    for brace in _BRACE.finditer(text, begin, end):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[begin : brace.start()]
    return None


def _find(text: str, target: str, spec: ExactSpec) -> str | None:
    """The canonical answer in `text` under the rule, or None."""
    if spec.rule is ExactRule.boxed:
        content = last_box(text)
    elif spec.rule is ExactRule.answer_line:
        content = _line_after(spec.marker, text)
    else:
        any_counts = spec.rule is ExactRule.any_mention
        found = list(numbers(text if any_counts else text[-_TAIL:]))
        if any_counts and target in found:
            return target
        return found[-1] if found else None
    if content is None:
        return None
    return integer(content) or unwrap(content) or None


def _line_after(marker: str, text: str) -> str | None:
    """The rest of the line behind the last `marker`, or the line below when nothing follows; no bold."""
    stem, last = marker.strip()[:-1], marker.strip()[-1]
    pattern = re.escape(stem) + r"[ \t]*" + re.escape(last) + r"\**\s*([^\n]*)"
    found = re.findall(pattern, text, re.IGNORECASE)
    return found[-1].strip().removesuffix(".").strip("* ") if found else None


KIND = register(Kind(name="exact_integer", version=1, spec=ExactSpec, grade=grade))
