"""`Watchdog`: says which phase of a run has hung, and on which rank, and writes down where every thread is.

It stops nothing.
"""

from __future__ import annotations

import faulthandler
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from rlhf.background import Lookout
from rlhf.clock import Clock
from rlhf.rank_watch import Followers, Muster

logger = logging.getLogger(__name__)

STACKS = "stacks.txt"
"""File in the run's folder; each report is appended."""

LOOK_SECONDS = 30.0
"""Most seconds between two looks at the clock."""


def pause_seconds(minutes: float) -> float:
    """Seconds between two looks when a hang is one after so many minutes."""
    return min(60.0 * minutes / 4, LOOK_SECONDS)


STANDARD_ERROR = 2


class Watchdog(Lookout):
    """A sleeping thread that looks now and then whether a phase has begun or ended.

    When none has for `run.watchdog_minutes` it says so once, with the Python stacks of this process and of
    the engines and other ranks in the run's `stacks.txt`; the run goes on, and so does the watch. It says so
    too when another rank has been busy with one command, or silent, for so long. Code that lets no other
    Python thread run (a regular expression gone wild) stops the watch too: then the interpreter itself
    writes this process's stacks to standard error, a quarter later. Use as a context manager.
    """

    def __init__(
        self,
        minutes: float,
        clock: Clock,
        folder: Path,
        *,
        step: Callable[[], int],
        engine_stacks: Callable[[], dict[str, str]] = dict,
        followers: Followers | None = None,
    ) -> None:
        """`minutes`: 0 watches nothing, and starts no thread. `step`: the one in progress. `engine_stacks`:
        by engine, empty text from one that does not answer. `followers`: the other ranks, where there are."""
        super().__init__("watchdog", self._look, lambda: self._pause_seconds)
        self._limit = 60.0 * minutes
        self._pause_seconds = pause_seconds(minutes)
        self._clock = clock
        self._folder = folder
        self._step = step
        self._engine_stacks = engine_stacks
        self._followers = followers
        self._told = False

    def __enter__(self) -> Self:
        """Begin to watch."""
        if self._limit:
            self._set_alarm()
            super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no longer."""
        if self._limit:
            super().__exit__(kind, error, trace)
            faulthandler.cancel_dump_traceback_later()
            if self._followers:
                self._followers.leave()

    def _look(self) -> None:
        late = self._late()
        if not late:
            self._told = False
        elif not self._told:
            self._told = True
            self._report(late)
        self._set_alarm()

    def _late(self) -> str:
        """What has not ended for too long, as a clause; empty when nothing."""
        phase, step, still = self._clock.phase, self._step(), self._clock.still
        late = self._followers.look(phase, step, still, self._limit) if self._followers else ""
        if still >= self._limit:
            return f"the phase '{phase}' of step {step} has not ended for {still / 60:.3g} minutes"
        return late

    def _set_alarm(self) -> None:
        """Have the interpreter write the stacks, unless the next look comes in time to put it off."""
        seconds = 1.25 * self._limit + self._pause_seconds
        faulthandler.dump_traceback_later(seconds, file=STANDARD_ERROR)

    def _report(self, late: str) -> None:
        muster = self._followers.muster(self._pause_seconds) if self._followers else Muster()
        head = "; ".join([late, *muster.clauses])
        try:
            where = f"where every thread is stands in {self._write(head, muster)}"
        except OSError as error:
            where = f"where every thread is could not be written ({error.strerror})"
        logger.warning(
            "run.watchdog_minutes=%g: %s; %s. The run is not stopped: wait, or end it with Ctrl-C twice.",
            self._limit / 60,
            head,
            where,
        )

    def _write(self, head: str, muster: Muster) -> Path:
        path = self._folder / STACKS
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{head}\n\nmain process:\n")
            file.flush()
            faulthandler.dump_traceback(file)
            for process, stacks in (muster.stacks | self._engine_stacks()).items():
                file.write(f"\n{process}:\n{stacks or 'does not answer'}\n")
            file.write("\n")
        return path
