"""A reward for length: 0 where the length is right, falling to -1 where it is not.

This is a plain shaping part. DAPO's soft overlong punishment belongs to the algorithm, which knows the
response limit (`rlhf/algorithms/overlong.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from rlhf.rewards.grade import Grade, Kind, Response, register


class LengthShape(StrEnum):
    """How the value falls between `free` and `limit` tokens."""

    linear = "linear"
    """`-(n - free) / (limit - free)`."""
    cosine = "cosine"
    """`-(1 - cos(pi (n - free) / (limit - free))) / 2`: flat at both ends."""
    target = "target"
    """`-|n - free| / (limit - free)`: too short costs as much as too long."""


@dataclass
class LengthSpec:
    """Options of `length`."""

    shape: LengthShape = LengthShape.linear
    """How the value falls."""
    free: int = 0
    """Response tokens (the end token included) that cost nothing; for `target` the length that is best."""
    limit: int = 0
    """Response tokens from which the value is -1; must be above `free`."""

    def check(self) -> list[str]:
        """Sentences about impossible values."""
        if self.free < 0:
            return [f"args.free={self.free} is negative: give a number of tokens."]
        if self.limit <= self.free:
            return [
                f"args.limit={self.limit} must be above args.free={self.free}: there the value reaches -1."
            ]
        return []


def grade(response: Response, gold: str | None, spec: LengthSpec) -> Grade:
    """The value in [-1, 0] as `Grade.accuracy`; `gold` is unused."""
    share = (response.length - spec.free) / (spec.limit - spec.free)
    if spec.shape is LengthShape.target:
        share = abs(share)
    share = min(max(share, 0.0), 1.0)
    penalty = (1.0 - math.cos(math.pi * share)) / 2.0 if spec.shape is LengthShape.cosine else share
    return Grade(accuracy=0.0 - penalty, grader=KIND.label)


KIND = register(Kind(name="length", version=1, spec=LengthSpec, grade=grade, grading=False))
