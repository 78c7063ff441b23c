"""Hangs of other ranks: `Followers` is how rank 0's watchdog sees them, `Presence` what they do for it.

Each rank leaves a word now and then, in a store that no collective needs: what it is doing and since when. A
rank that works too long, or leaves no more words, is named. Which rank the others wait for is told by asking
all of them where they are: it does not answer, or is not in a collective while they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from rlhf.background import Lookout
from trainer.parallel.roll_call import Activity, RollCall

logger = logging.getLogger(__name__)

LEADER = 0

ANSWER_SECONDS = 3.0
"""How long a rank may take to say where it is, beside the pause between two of its looks."""

SLACK_SECONDS = 15.0
"""How much longer than the limit rank 0 may be silent: its watchdog may be writing down where all are."""


@dataclass(frozen=True, slots=True)
class Muster:
    """Where the other ranks were when they were asked."""

    clauses: Sequence[str] = ()
    """For whom the others wait, as far as that shows."""
    stacks: dict[str, str] = field(default_factory=dict)
    """Of each rank; empty text from one that did not answer."""


class Followers:
    """The other ranks, seen from rank 0. One thread uses it.

    When the store is gone, with torchrun, nothing is known of them any more.
    """

    def __init__(self, roll_call: RollCall) -> None:
        self._roll_call = roll_call
        self._others = range(LEADER + 1, roll_call.size)

    def look(self, phase: str, step: int, still: float, limit: float) -> str:
        """Say where rank 0 is. Returns which rank is busy with one command or silent for `limit` seconds, as
        a clause; empty when none is."""
        with suppress(RuntimeError):
            self._roll_call.tell(f"the phase '{phase}' of step {step}", still)
            return next(filter(None, (self._late(rank, limit) for rank in self._others)), "")
        return ""

    def leave(self) -> None:
        """Rank 0 says no more."""
        with suppress(RuntimeError):
            self._roll_call.leave()

    def muster(self, pause: float) -> Muster:
        """Ask all of them. `pause`: seconds between two looks of theirs."""
        with suppress(RuntimeError):
            stacks = self._roll_call.stacks(pause + ANSWER_SECONDS)
            clauses = (self._absent(rank, rank in stacks) for rank in self._others)
            return Muster(
                [clause for clause in clauses if clause],
                {f"rank {rank}": stacks.get(rank, "") for rank in self._others},
            )
        return Muster()

    def _late(self, rank: int, limit: float) -> str:
        word = self._roll_call.word(rank)
        if word is None:
            return ""
        silent = self._roll_call.silent(rank)
        lasts = silent + word.still if word.busy else silent
        what = f"'{word.phase}' on rank {rank} has not ended" if word.busy else f"rank {rank} has not spoken"
        return f"{what} for {lasts / 60:.3g} minutes" if lasts >= limit else ""

    def _absent(self, rank: int, answered: bool) -> str:
        """Whether the others wait for this one, and where it is."""
        word = self._roll_call.word(rank)
        if not answered:
            last = f", its last word was '{word.phase}'" if word else ""
            return f"rank {rank} has not arrived: it does not answer{last}"
        if word and word.busy and not word.waits:
            return f"rank {rank} has not arrived: at '{word.phase}' it is in {word.place}"
        return ""


class Presence(Lookout):
    """A follower's thread: says what it is doing; that of rank 1 also sees whether rank 0 is alive.

    Use as a context manager.
    """

    def __init__(self, minutes: float, roll_call: RollCall, activity: Activity, pause: float) -> None:
        """`minutes`: 0 says nothing, and starts no thread. `pause`: seconds between two words."""
        super().__init__("presence", self._look, lambda: pause)
        self._limit = 60.0 * minutes
        self._roll_call = roll_call
        self._activity = activity
        self._told = False

    def __enter__(self) -> Presence:
        """Begin to speak."""
        if self._limit:
            super().__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        """Say no more."""
        if self._limit:
            super().__exit__(None, None, None)

    def _look(self) -> None:
        try:
            self._roll_call.tell(self._activity.phase, self._activity.still)
            if self._roll_call.rank == LEADER + 1:
                self._watch_leader()
        except RuntimeError:  # the store has gone with torchrun: nobody can hear
            self.stop()

    def _watch_leader(self) -> None:
        word = self._roll_call.word(LEADER)
        silent = self._roll_call.silent(LEADER) if word else 0.0
        if silent < self._limit + SLACK_SECONDS:
            self._told = False
        elif word and not self._told:
            self._told = True
            logger.error(
                "run.watchdog_minutes=%g: rank 0 has given no sign for %.3g minutes, the last was of %s, in "
                "%s. The run is not stopped: wait, or end it with Ctrl-C twice.",
                self._limit / 60,
                silent / 60,
                word.phase,
                word.place,
            )
