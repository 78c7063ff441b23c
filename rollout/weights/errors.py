"""What publishing raises. Both cross process boundaries, so they take one sentence and nothing else."""

from __future__ import annotations

from collections.abc import Sequence


class WeightTransferError(RuntimeError):
    """A transfer was refused: nothing of it was installed and the old version stays in force.

    The text names the tensors.
    """


class ProbeError(RuntimeError):
    """An engine does not hold what the learner published: stop the run. The text says what is wrong where."""


def listed(items: Sequence[str], most: int = 6) -> str:
    """The first `most` items, and how many more there are."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")
