"""`Clock`: where a step's seconds go. Phases and the rest always add up to the step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OTHER = "other"
_RESERVED = frozenset({OTHER, "step", "elapsed"})


class Clock:
    """Times the phases of one thread's steps.

    ```
    clock = Clock()
    with clock("rollout"):
        ...
        with clock("reward"):  # nested: these seconds are the reward's, not the rollout's
            ...
    clock.metrics()  # {"time/rollout": ..., "time/reward": ..., "time/other": ..., "time/step": ..., ...}
    ```
    Every instant is charged to exactly one phase, the innermost open one (`other` when none is), so
    `time/step` is the sum of all phases by construction, also after an exception and inside an open phase.
    Phases that run beside each other need a clock each: a clock refuses other threads.
    """

    def __init__(self, elapsed: float = 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        """Start the first step. `elapsed`: seconds of the run that a resumed clock goes on from."""
        self._now = now
        self._mark = now()
        self.elapsed = elapsed
        """Seconds of the run up to the end of the last closed step."""
        self.failed = ""
        """The innermost phase that an exception left, the first one; empty when none did."""
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._thread = threading.get_ident()

    @property
    def phase(self) -> str:
        """The innermost open phase, or `other`; any thread may ask."""
        open_phases = self._open[-1:]
        return open_phases[0] if open_phases else OTHER

    @property
    def still(self) -> float:
        """Seconds since a phase last began or ended; any thread may ask."""
        return self._now() - self._mark

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge the block to `phase`. Raises `ValueError` for a reserved name."""
        if phase in _RESERVED:
            raise ValueError(f"'{phase}' cannot name a phase: time/{phase} is computed by the clock.")
        if threading.get_ident() != self._thread:
            raise RuntimeError(f"phase '{phase}' began on another thread: give each thread its own Clock.")
        self._charge()
        self._open.append(phase)
        try:
            yield
        except BaseException:
            self.failed = self.failed or phase
            raise
        finally:
            self._charge()
            self._open.pop()

    def metrics(self) -> dict[str, float]:
        """Close the step and begin the next: `time/<phase>`, `time/other`, `time/step`, `time/elapsed`.

        Seconds. `time/elapsed` counts from the clock's construction (plus what it was given).
        """
        self._charge()
        self._seconds.setdefault(OTHER, 0.0)
        step = sum(self._seconds.values())
        self.elapsed += step
        found = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return {**found, "time/step": step, "time/elapsed": self.elapsed}

    def _charge(self) -> None:
        """Give the time since the last mark to the phase that was open."""
        now = self._now()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._mark
        self._mark = now
