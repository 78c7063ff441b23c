"""What a user's mistake raises: one clear sentence, exit status 2. Lower layers' sentences become it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something that the user can mend; the text names the key, the value and the remedy."""


class RewardRaisedError(UserError):
    """A user's own reward function raised; `__cause__` is what it raised."""


class RunStoppedError(Exception):
    """A run that must not go on, see `rlhf.faults`: a dead engine, a full disk, a loss that is not finite."""


class InterruptedRunError(KeyboardInterrupt):
    """A run that a signal ended; the text says how to go on."""

    def __init__(self, sentence: str, status: int) -> None:
        """`status`: exit status of the command, 128 + the signal."""
        super().__init__(sentence)
        self.status = status


@contextmanager
def clear_sentences() -> Iterator[None]:
    """Lower layers say what the user can mend with `ValueError`; here it becomes a `UserError`.

    `WHETSTONE_TRACEBACK=1` lets the original through, for whoever suspects a mistake of ours.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("WHETSTONE_TRACEBACK"):
            raise
        raise UserError(str(error)) from error
