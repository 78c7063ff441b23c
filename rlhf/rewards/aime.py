r"""Integers from 0 to 999, the answers of the AIME: microseconds a response, no parsing of mathematics.

Where the answer may stand is the option `rule`. Boxes and `Answer:` lines are *finals*: the last one counts
however many there are, and nothing else does. A last box that is cut off or empty is no answer.

How a final is read:
- Leading zeros, `$…$`, `\(…\)`, bold, `\text{…}` and the like, a closing full stop and a decimal part of
  zeros change nothing: `025`, `**25.**`, `\boxed{\text{25}}` and `25.0` are 25.
- Of an equation the right side counts (`m + n = 25`), unless its left side holds more than one statement.
- A unit may follow: degrees, a percent sign, up to three words. A word that changes the value (`25 million`,
  `25 or more`) is no unit, nor is a letter that could be a variable (`25x`).
- All else is wrong: numbers below 0 or above 999 (so every thousands comma), decimals, fractions, powers and
  roots, whatever their value; two numbers in one final (`24 or 25`).

Finals that contradict each other: the last one counts, as a model may correct itself. More than `candidates`
different integers are a list of guesses, which is no answer; `candidates: 1` refuses every contradiction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from rlhf.rewards.exact import boxes, canonical, integer, numbers
from rlhf.rewards.grade import Grade, Kind, Response, Status, failed, register
from rlhf.rewards.reasoning import Reasoning, answer_part


class AimeRule(StrEnum):
    """Where the answer may stand."""

    boxed = "boxed"
    r"""In the last `\boxed{}` or `\fbox{}`."""
    answer_line = "answer_line"
    """Behind the last `Answer:` on its line, or on the line below when nothing follows."""
    either = "either"
    """In the last box or behind the last `Answer:`, whichever comes later."""
    last_number = "last_number"
    """The last number of the response (of its last 1 000 characters), which must have ended by itself: for
    models that were asked for no form. A reward that listing numbers can earn."""


@dataclass
class AimeSpec:
    """Options of `aime`."""

    rule: AimeRule = AimeRule.either
    """Where the answer may stand."""
    reasoning: Reasoning = Reasoning.keep
    """Whether the text before `</think>` is read."""
    candidates: int = 10
    """Most different integers that all boxes and `Answer:` lines together may name."""

    def check(self) -> list[str]:
        """Sentences about impossible values."""
        return [] if self.candidates > 0 else [f"args.candidates={self.candidates} must be at least 1."]


_TAIL = 1000
"""Characters from the end in which `last_number` looks."""
_LONGEST = 300
"""Characters of a final; a longer one is no answer."""
_LINE = re.compile(r"(?<![A-Za-z])answer[*_}]*[ \t]*[:：][*_}\s]*", re.IGNORECASE)
_WRAPPED = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textrm|textit|mathbf|mathrm|mathit|mbox|boldsymbol)\s*\{(.*)\}|\{(.*)\}",
    re.DOTALL,
)
_DELIMITERS = (r"\(", r"\)", r"\[", r"\]")
_PARENTHESES = re.compile(r"\([^()]*\)")
_SEVERAL = re.compile(r"[,;<>!≤≥≠]|\\(?:le|ge|ne|lt|gt)|\b(?:or|and)\b")
"""What the left side of an equation holds when it is more than one statement."""
_SPACE = r"(?:[ ~]|\\[ ,;:!]|\\q?quad)"
_POWER = r"(?:\s*(?:\^\{?[23]\}?|[²³]))?"
_NUMBER = re.compile(
    rf"""
    ([-−+]?[0-9]+(?:\.0*)?)
    (?: {_SPACE}*(?:\^\s*\{{?\s*\\circ\s*\}}?|°|\\degree|\\?%)
      | {_SPACE}*\\(?:text|textrm|mathrm|mbox)\s*\{{([A-Za-z .~-]*)\}}{_POWER}
      | {_SPACE}+([A-Za-z]{{2,}}(?:[ ][A-Za-z]{{2,}}){{0,2}}){_POWER}
    )?
    """,
    re.VERBOSE,
)
_NO_UNITS = frozenset(
    (
        *(
            "or",
            "and",
            "not",
            "but",
            "to",
            "than",
            "more",
            "less",
            "over",
            "mod",
            "plus",
            "minus",
            "times",
            "pi",
        ),
        *("hundred", "thousand", "million", "billion", "trillion", "dozen", "half", "squared", "cubed"),
    )
)
"""Words behind a number that change what it says."""
_IN_RANGE = re.compile(r"[0-9]{1,3}")


def grade(response: Response, gold: str | None, spec: AimeSpec) -> Grade:
    """Whether the answer that `spec.rule` finds is the integer `gold`.

    `gold_unparsable` when `gold` is no integer from 0 to 999. `no_answer` when no final is found, when the
    last one is empty, cut off or longer than 300 characters, and when they name more than `spec.candidates`
    integers. Every other text in the place of the answer is wrong, and `ok`.
    """
    target = None if gold is None else integer(gold)
    if target is None or not _IN_RANGE.fullmatch(target):
        return failed(KIND.label, Status.gold_unparsable)
    text = answer_part(response.text, spec.reasoning)
    found = None if text is None else _find(text, response.finished, spec)
    if not found:
        return failed(KIND.label, Status.no_answer)
    return Grade(accuracy=float(found == target), extracted=found, grader=KIND.label)


def read(final: str) -> str:
    """The integer that `final` states, in canonical form (of any size); else its text without wrapping."""
    bare = _bare(final)
    left, equals, right = bare.rpartition("=")
    if equals and not _SEVERAL.search(_PARENTHESES.sub("", left)):
        bare = _bare(right)
    match = _NUMBER.fullmatch(bare)
    if match and _NO_UNITS.isdisjoint((match[2] or match[3] or "").lower().split()):
        return canonical(match[1])
    return bare


def _find(text: str, finished: bool, spec: AimeSpec) -> str | None:
    """The answer in `text` under the rule, as `read` gives it; None when there is none."""
    if spec.rule is AimeRule.last_number:
        return next(reversed(list(numbers(text[-_TAIL:]))), None) if finished else None
    finals = [] if spec.rule is AimeRule.answer_line else boxes(text, _LONGEST)
    if spec.rule is not AimeRule.boxed:
        finals += _lines(text)
    if not finals:
        return None
    readings = {start: read(content) for start, content in finals if content is not None}
    if len({value for value in readings.values() if _IN_RANGE.fullmatch(value)}) > spec.candidates:
        return None
    return readings.get(max(start for start, _ in finals))


def _lines(text: str) -> list[tuple[int, str | None]]:
    """Start of every `Answer:` and what follows it on its line, or on the next line that holds anything."""
    found: list[tuple[int, str | None]] = []
    for marker in _LINE.finditer(text):
        begin, last = marker.end(), min(len(text), marker.end() + _LONGEST + 1)
        end = text.find("\n", begin, last)
        whole = end >= 0 or last == len(text)
        found.append((marker.start(), text[begin : end if end >= 0 else last] if whole else None))
    return found


def _bare(text: str) -> str:
    """`text` without blanks, dollars, bold, a full stop and macros around it."""
    text, before = text.replace(r"\$", "").replace("$", ""), None
    while text != before:
        before = text
        text = text.strip().removeprefix(r"\displaystyle").lstrip(" *_`~").rstrip(" *_`~.")
        for delimiter in _DELIMITERS:
            text = text.removeprefix(delimiter).removesuffix(delimiter)
        if text.endswith("}") and text.count("}") > text.count("{"):
            text = text[:-1]
        wrapped = _WRAPPED.fullmatch(text)
        if wrapped:
            text = wrapped[1] if wrapped[1] is not None else wrapped[2]
    return text


KIND = register(Kind(name="aime", version=1, spec=AimeSpec, grade=grade))
