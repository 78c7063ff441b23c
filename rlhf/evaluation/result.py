"""`Result`: the numbers of one evaluation, from the responses and their verdicts alone."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.evaluation import estimators
from rlhf.evaluation.proportions import mean
from rlhf.evaluation.runner import GRADED, Problem
from rlhf.evaluation.statistics import score
from rlhf.metrics import duration
from rollout.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Every number of one evaluation. Shares are in [0, 1], lengths in tokens."""

    samples: int
    """Responses to each problem (`n`)."""
    accuracy: float
    """avg@n: the mean over problems of the share of right responses; unbiased for one response."""
    low: float
    high: float
    """95 % interval for problems like these."""
    se: float
    """Standard error for problems like these; which problems, and sampling, are both in it."""
    se_rerun: float | None
    """Standard error of a rerun on these very problems; None with one response each, which tells nothing."""
    pass_at: dict[int, float]
    """Unbiased pass@k, for powers of two up to n / 2 (beyond that its variance is large)."""
    majority: float | None
    """maj@n over the answers that were read; None with one response each."""
    counts: dict[str, float]
    """Rates and lengths, see `RATES`."""
    per_problem: list[float]
    """Share of right responses, in the order of problems."""

    def headline(self) -> str:
        """The score and its error bar."""
        value = _with_interval(self.samples, self.accuracy, self.low, self.high)
        return f"{value} on {len(self.per_problem)} problems"

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of every number, the score first."""
        rerun = "unknown from one response each" if self.se_rerun is None else f"{self.se_rerun:.2%}"
        found = [
            ("score (95 % interval for problems like these)", self.headline()),
            ("standard error, problems like these", f"{self.se:.2%}"),
            ("standard error, these problems asked again", rerun),
        ]
        found += [(f"pass@{k}", f"{value:.1%}") for k, value in self.pass_at.items()]
        if self.majority is not None:
            found.append((f"maj@{self.samples}", f"{self.majority:.1%}"))
        return found + [(RATES[name], show(name, value)) for name, value in self.counts.items()]

    def plain(self) -> dict[str, Any]:
        """As JSON types; what is no number becomes null."""
        return typing.cast(dict[str, Any], _finite(asdict(self)))


RATES = {
    "truncated": "responses cut at the limit",
    "unanswered": "responses without an answer",
    "ungraded": "responses that no grader judged (they count as wrong)",
    "accuracy_finished": "right among those that were not cut (not the score)",
    "length_mean": "mean length, tokens",
    "length_right": "mean length of right responses",
    "length_wrong": "mean length of wrong responses",
}
"""Names in `Result.counts` and what they are."""


def summarize(problems: Sequence[Problem], samples: int) -> Result:
    """The numbers of responses in the order of problems, `samples` to each.

    Raises `ValueError` when there are none, or not `samples` of each problem.
    """
    rows = _rows(problems, samples)
    grades = _grades(rows)
    bars = score(grades)
    whole = set(grades.flat) <= {0.0, 1.0}
    return Result(
        samples=samples,
        accuracy=bars.mean,
        low=bars.question_interval.low,
        high=bars.question_interval.high,
        se=bars.question_se,
        se_rerun=bars.rerun_se if samples > 1 else None,
        pass_at=_pass_at(grades, samples) if whole else {},
        majority=_majority(rows) if samples > 1 else None,
        counts=_counts(problems),
        per_problem=[float(rate) for rate in grades.mean(axis=1)],
    )


def progress(problems: Sequence[Problem], samples: int, total: int, seconds_left: float) -> str:
    """The score of what is answered so far, in one line."""
    bars = score(_grades(_rows(problems, samples)))
    value = _with_interval(samples, bars.mean, *bars.question_interval)
    length = mean([problem.length for problem in problems])
    cut = mean([problem.finish_reason == FinishReason.LENGTH for problem in problems])
    return (
        f"{len(problems) // samples}/{total} problems  {value}  length {length:.0f}  truncated {cut:.1%}  "
        f"{duration(seconds_left)} left"
    )


def _rows(problems: Sequence[Problem], samples: int) -> list[Sequence[Problem]]:
    """The responses by problem. Raises `ValueError` unless there are `samples` of each."""
    rows = [problems[start : start + samples] for start in range(0, len(problems), samples)]
    if not rows or any(len({answer.id for answer in row}) != 1 or len(row) != samples for row in rows):
        raise ValueError(f"{len(problems)} responses are not {samples} to each problem, in order.")
    return rows


def _grades(rows: Sequence[Sequence[Problem]]) -> estimators.Array:
    return estimators.matrix([[answer.accuracy for answer in row] for row in rows])


def _with_interval(samples: int, accuracy: float, low: float, high: float) -> str:
    name = f"avg@{samples}" if samples > 1 else "accuracy"
    return f"{name} {accuracy:.1%} [{low:.1%}, {high:.1%}]"


def show(name: str, value: float) -> str:
    """One of `Result.counts` in words."""
    if math.isnan(value):
        return "none"
    return f"{value:.0f}" if name.startswith(("length", "ungraded")) else f"{value:.1%}"


def _pass_at(grades: estimators.Array, samples: int) -> dict[int, float]:
    powers = [2**exponent for exponent in range(1, samples.bit_length()) if 2**exponent <= samples // 2]
    return {k: estimators.pass_at_k(grades, k).mean for k in powers}


def _majority(rows: Sequence[Sequence[Problem]]) -> float:
    """Right responses vote for the gold answer, whatever form they gave it: the grader's own equality."""
    golds = [str(row[0].answer) for row in rows]
    votes = [
        [gold if answer.accuracy == 1 else _wrong(answer.extracted, gold) for answer in row]
        for row, gold in zip(rows, golds, strict=True)
    ]
    return estimators.maj_at_k(votes, golds, len(rows[0])).mean


def _wrong(extracted: str | None, gold: str) -> str | None:
    """A wrong answer's vote; one that is spelled as the gold and was judged wrong must not become right."""
    return None if extracted is None else f"wrong: {extracted}" if extracted == gold else extracted


def _counts(problems: Sequence[Problem]) -> dict[str, float]:
    finished = [p.accuracy for p in problems if p.finish_reason == FinishReason.STOP]
    right = [p.length for p in problems if p.accuracy == 1]
    wrong = [p.length for p in problems if p.accuracy < 1]
    return {
        "truncated": mean([p.finish_reason == FinishReason.LENGTH for p in problems]),
        "unanswered": mean([p.extracted is None for p in problems]),
        "ungraded": float(sum(p.status not in GRADED for p in problems)),
        "accuracy_finished": mean(finished) if finished else math.nan,
        "length_mean": mean([p.length for p in problems]),
        "length_right": mean(right) if right else math.nan,
        "length_wrong": mean(wrong) if wrong else math.nan,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
