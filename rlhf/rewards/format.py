"""A reward for form: 1 when the whole response matches a regular expression, else 0."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf.rewards.grade import Grade, Kind, Response, Status, register


@dataclass
class FormatSpec:
    """Options of `format`."""

    pattern: str = ""
    r"""Regular expression that the whole response, surrounding blanks aside, must match; `.` matches line
    breaks too. Example: `.*\nAnswer: -?\d+`. It runs in the killable workers: nested repetition can run
    away on hostile text."""
    must_end: bool = False
    """Whether a truncated response fails."""

    def check(self) -> list[str]:
        """Sentences about impossible values."""
        if not self.pattern:
            return ["args.pattern is empty: give the regular expression that a whole response must match."]
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            return [f"args.pattern={self.pattern!r} is no regular expression: {error}."]
        return []


def grade(response: Response, gold: str | None, spec: FormatSpec) -> Grade:
    """1 when the whole stripped text matches `spec.pattern`, else 0 and `no_answer`; `gold` is unused."""
    matches = re.fullmatch(spec.pattern, response.text.strip(), re.DOTALL) is not None
    if matches and (response.finished or not spec.must_end):
        return Grade(accuracy=1.0, grader=KIND.label)
    return Grade(accuracy=0.0, grader=KIND.label, status=Status.no_answer)


KIND = register(Kind(name="format", version=1, spec=FormatSpec, grade=grade, grading=False, isolated=True))
