"""Who is at the engines: `Turns`, one at a time, or `paused`, in the midst of a round."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Protocol, runtime_checkable

from rollout.engine import Engine
from rollout.errors import EngineError


@runtime_checkable
class Pausable(Protocol):
    """What an engine needs besides to take weights in the midst of a round."""

    def pause(self) -> None:
        """Set the round in progress, where there is one, aside until `resume`; its requests are kept.

        Meanwhile the engine scores and receives weights. Without a pause it is one call at a time.
        """
        ...

    def resume(self) -> None:
        """Go on with what `pause` has set aside."""
        ...


class Turns:
    """A fair lock between threads: one at a time, a round, a publish, an evaluation, in the order of asking.

    A lock of the standard library would let generation take the engines again at once, and again.
    ```
    with turns():
        ...  # nobody else is at the engines
    ```
    Not re-entrant. An exception while waiting (Ctrl-C) gives the place in the queue up.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def __call__(self, waiting: AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Wait, inside `waiting`, until all who asked earlier are done; the block is the caller's turn."""
        own = object()
        try:
            with waiting or nullcontext(), self._changed:
                self._queue.append(own)
                self._changed.wait_for(lambda: self._queue[0] is own)
            yield
        finally:
            with self._changed:
                if own in self._queue:  # not when an exception came before it was there
                    self._queue.remove(own)
                self._changed.notify_all()


@contextmanager
def paused(engines: Sequence[Engine]) -> Iterator[None]:
    """Rounds in progress stand still, their requests kept, while the block scores and sends weights.

    What the block raises goes before what a dead engine then says to `resume`. Raises ValueError when an
    engine is not `Pausable`.
    """
    pausable = [engine for engine in engines if isinstance(engine, Pausable)]
    if len(pausable) < len(engines):
        raise ValueError(
            "These engines take no weights in the midst of a round: set loop.inflight_updates=false."
        )
    _on_all([engine.pause for engine in pausable])
    try:
        yield
    except BaseException:
        with suppress(EngineError):
            _on_all([engine.resume for engine in pausable])
        raise
    _on_all([engine.resume for engine in pausable])


def _on_all(calls: Sequence[Callable[[], None]]) -> None:
    """All at once: each waits for its engine's step."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
    for future in futures:
        future.result()
