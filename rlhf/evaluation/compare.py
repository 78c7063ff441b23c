"""`rlhf eval compare A B`: two models on the same problems, or a sentence about why that cannot be said."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from rlhf.errors import UserError
from rlhf.evaluation.answers import Finished, finished
from rlhf.evaluation.paired import paired
from rlhf.evaluation.runner import Problem
from rlhf.evaluation.stamp import MEANINGS, differences

ALLOW = "allow="


def compare(first: str, second: str, allowed: Collection[str] = ()) -> str:
    """Subtract the score in `first` from that in `second`, problem by problem; the result as text.

    Each is the folder of an evaluation, or a run's `evaluations/step-N.json`.

    Raises `UserError` when a folder holds no whole evaluation, when the stamps differ in what matters and
    `allowed` does not name it, or when no problem is in both.
    """
    for name in allowed:
        if name not in MEANINGS:
            raise UserError(f"{ALLOW}{name} is no part of a stamp: the parts are {', '.join(MEANINGS)}.")
    places = [Path(first), Path(second)]
    one, other = map(finished, places)
    found = differences(one.stamp, other.stamp, allowed)
    if found:
        parts = ",".join(sentence.partition(" ")[0] for sentence in found)
        raise UserError(
            f"these scores must not be subtracted: {'; '.join(found)}. Measure again under one protocol, or "
            f"say {ALLOW}{parts} if you know that it does not matter."
        )
    return _text(places, (one, other))


def parse(arguments: Sequence[str]) -> tuple[str, str, list[str]]:
    """`A B [allow=part,part]`. Raises `UserError` with the usage."""
    allowed = [part for word in arguments if word.startswith(ALLOW) for part in word[len(ALLOW) :].split(",")]
    folders = [word for word in arguments if not word.startswith(ALLOW)]
    if len(folders) != 2:
        raise UserError(
            f"rlhf eval compare takes two folders of evaluations and perhaps {ALLOW}PART,PART; it was given "
            f"{len(folders)}."
        )
    return folders[0], folders[1], [part for part in allowed if part]


def _rates(problems: Sequence[Problem], *, by_text: bool) -> dict[str, float]:
    """Share of right responses by problem: by place where the problems are the same, else by text."""
    grades: dict[str, list[float]] = {}
    for problem in problems:
        grades.setdefault(problem.prompt if by_text else problem.id, []).append(problem.accuracy)
    return {
        key if by_text else str(place): sum(found) / len(found)
        for place, (key, found) in enumerate(grades.items())
    }


def _text(places: Sequence[Path], both: tuple[Finished, Finished]) -> str:
    by_text = both[0].stamp["data"]["digest"] != both[1].stamp["data"]["digest"]
    rates = [_rates(one.problems, by_text=by_text) for one in both]
    shared = [key for key in rates[0] if key in rates[1]]
    if not shared:
        raise UserError(f"{places[0]} and {places[1]} have no prompt in common.")
    first, second = ([rate[key] for key in shared] for rate in rates)
    result = paired(second, first)
    low, high = result.interval
    lines = [
        f"{place}: {one.accuracy:.1%}  {one.stamp['model']['description']}"
        for place, one in zip(places, both, strict=True)
    ]
    lines.append(
        f"second - first: {result.difference:+.1%} [{low:+.1%}, {high:+.1%}], standard error "
        f"{result.se:.2%}, p {result.p_value:.3g} ({'all' if result.exact else 'random'} sign flips), "
        f"{len(shared)} problems"
    )
    missing = len(rates[0]) + len(rates[1]) - 2 * len(shared)
    if missing:
        lines.append(f"{missing} problems are in one of them only and are left out.")
    return "\n".join(lines)
