r"""The rule-based scorer of DAPO (arXiv 2503.14476, §2.4 and the released code): an `Answer:` line, compared
as strings after Minerva's normalization (Lewkowycz et al. 2022, arXiv 2206.14858, appendix D.1).

It is kept as the published numbers were made with it, with all that it refuses: `540.`, `**540**`, `5.0`,
`0540` and `540°` are wrong for 540 or 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf.rewards.exact import last_box
from rlhf.rewards.grade import Grade, Kind, Response, Status, failed, register


@dataclass
class DapoSpec:
    """Options of `dapo_math`."""

    tail: int = 300
    """Characters from the end of the response that are looked at (published: 300)."""
    box_fallback: bool = False
    r"""Whether the last `\boxed{}` counts when no `Answer:` line is found. False is the published scorer;
    newer versions of the reference code fall back to a box in the last 100 characters."""

    def check(self) -> list[str]:
        """Sentences about impossible values."""
        return [] if self.tail > 0 else [f"args.tail={self.tail} must be at least 1 character."]


_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_BOX_TAIL = 100

_SUBSTITUTED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
"""Minerva's ordered literal replacements."""

_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue"),
    *("points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals"),
    *("edges", "students", "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}"),
    *("\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;"),
    *(",\\!", "{,}", '"', "\\dots"),
)
"""Minerva's filler and unit words, deleted wherever they stand, in this order."""

_UNWRAPPED = (
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)
_DOLLARS = re.compile(r".*?\$(.*?)\$.*")


def grade(response: Response, gold: str | None, spec: DapoSpec) -> Grade:
    """Whether the last `Answer:` line of the response's tail equals `gold` after normalization.

    ±1 is the part's `values: [-1, 1]`; `accuracy` stays 0 or 1. The answer of a truncated response counts,
    as in the reference.
    """
    target = normalize(gold) if gold is not None else ""
    if not target:
        return failed(KIND.label, Status.gold_unparsable)
    answer = extract(response.text[-spec.tail :], spec.box_fallback)
    if answer is None:
        return failed(KIND.label, Status.no_answer)
    return Grade(accuracy=float(answer == target), extracted=answer, grader=KIND.label)


def extract(tail: str, box_fallback: bool) -> str | None:
    """The normalized answer in `tail`, or None."""
    lines = _ANSWER.findall(tail)
    if lines:
        return normalize(lines[-1])
    box = last_box(tail[-_BOX_TAIL:]) if box_fallback else None
    return None if box is None else normalize(box)


def normalize(answer: str) -> str:
    """Minerva's normal form of an answer, in the order of the published code (dapo.md §6.4)."""
    answer = answer.rsplit("=", 1)[-1]
    for old, new in _SUBSTITUTED:
        answer = answer.replace(old, new)
    for filler in _REMOVED:
        answer = answer.replace(filler, "")
    answer = _DOLLARS.sub(r"$\1$", answer)
    for pattern, replacement in _UNWRAPPED:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer.strip()


KIND = register(Kind(name="dapo_math", version=1, spec=DapoSpec, grade=grade))
