"""`Ahead`: the asynchronous source. A thread generates for later steps while the loop learns from earlier.

The bound is one of slots: `lead` + 1 steps may be on their way. A step takes a slot before its first prompt
is drawn and frees it when it is trained: when the loop, having published the update, asks for the next step.
So step t is drawn when t - `lead` updates or more are published, and nothing is born too old to be trained.
Steps come out in order, each as `Generation.harvest` gives it to a synchronous run.

The thread mostly waits: engines and graders are processes of their own.
"""

from __future__ import annotations

import threading
from collections import deque

from rlhf.clock import Clock
from rlhf.generation import Generation, Harvest

CLOSE_SECONDS = 10.0
"""How long the thread may take to end after the engines are closed."""


class Ahead:
    """Implements `rlhf.generation.Source`. `next` is called by one thread, with ascending steps."""

    def __init__(self, generation: Generation, clock: Clock, *, lead: int, last: int) -> None:
        """Generate up to `lead` steps ahead, never for step `last` or later.

        `clock` is the loop's, charged with its waiting. Nothing starts before the first `next`.
        """
        self._generation = generation
        self._clock = clock
        self._lead = lead
        self._last = last
        self._changed = threading.Condition()
        self._ready: deque[Harvest] = deque()
        self._failure: BaseException | None = None
        self._allowed = -1
        """The last step that has a slot."""
        self._stopped = False
        self._thread: threading.Thread | None = None

    def next(self, step: int) -> Harvest:
        """What `step` learns from, as soon as it is complete; steps up to `step + lead` may begin now.

        Raises what generation raised, once every step that was complete before is taken.
        """
        with self._clock("wait"), self._changed:
            self._allowed = step + self._lead
            self._changed.notify_all()
            self._start(step)
            self._changed.wait_for(lambda: self._ready or self._failure)
            if self._failure and not self._ready:
                raise self._failure
            harvest = self._ready.popleft()
            harvest.metrics["ahead/ready"] = float(len(self._ready))
            return harvest

    def stop(self) -> None:
        """Begin no further step; the round in progress goes on until it ends or its engines are closed."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and wait for the thread, which closed engines end."""
        self.stop()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _start(self, step: int) -> None:
        if self._thread is None:
            # A daemon: a reward function that hangs must not keep the process from ending.
            self._thread = threading.Thread(
                target=self._run, args=(step,), name="generation-ahead", daemon=True
            )
            self._thread.start()

    def _run(self, first: int) -> None:
        clock = Clock()
        try:
            for step in range(first, self._last):
                if not self._slot(step, clock):
                    return
                harvest = self._generation.harvest(step, clock)
                harvest.metrics |= _named(clock.metrics())
                with self._changed:
                    self._ready.append(harvest)
                    self._changed.notify_all()
                if harvest.selection.stop:  # the run ends with this step
                    return
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _slot(self, step: int, clock: Clock) -> bool:
        """Wait until `step` has a slot; False when none will come."""
        with clock("bound"), self._changed:
            self._changed.wait_for(lambda: self._stopped or step <= self._allowed)
            return not self._stopped


def _named(times: dict[str, float]) -> dict[str, float]:
    """The thread's own phases as metrics; they run beside the loop's."""
    phases = {name.removeprefix("time/"): seconds for name, seconds in times.items()}
    return {
        f"ahead/{phase}_seconds": value for phase, value in phases.items() if phase not in ("step", "elapsed")
    }
