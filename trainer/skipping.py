"""`SkippedSteps`: optimizer steps that are not finite: dropped or not, how many, and when to give up."""

from __future__ import annotations

import logging

from trainer.config import OnNonfinite
from trainer.errors import NonFiniteError

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 10
"""A stray batch costs one step. Ten in a row mean that the weights themselves are lost, and waiting mends
nothing."""


class SkippedSteps:
    """The optimizer steps that a learner dropped."""

    def __init__(self, choice: OnNonfinite) -> None:
        self._skips = choice is OnNonfinite.skip
        self.total = 0
        """Since the start of the run."""
        self.in_a_row = 0
        """Since the last step that was taken."""

    def drop(self, error: NonFiniteError) -> None:
        """Count a dropped step; the first is said aloud.

        Raises NonFiniteError when steps are not to be dropped, or when `MOST_IN_A_ROW` were.
        """
        if not self._skips:
            raise NonFiniteError(f"{error}, or set learner.on_nonfinite=skip.") from error
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= MOST_IN_A_ROW:
            raise NonFiniteError(
                f"{error}, or go on from an earlier checkpoint: {self.in_a_row} optimizer steps in a row "
                "were dropped (learner.on_nonfinite=skip)."
            ) from error
        if self.total == 1:
            logger.warning("Skipped: %s. Further skips are counted in learner/skipped_steps.", error)

    def taken(self) -> None:
        """Note a step that was taken."""
        self.in_a_row = 0

    def metrics(self) -> dict[str, float]:
        """`learner/skipped_steps`, where steps may be dropped."""
        return {"learner/skipped_steps": float(self.total)} if self._skips else {}

    def state_dict(self) -> dict[str, int]:
        """Both counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict()`."""
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
