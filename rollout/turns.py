"""`Turns`: one at a time is at the engines (a round, a publish, an evaluation), in the order of asking.

A lock of the standard library would let generation take them again at once, and again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Turns:
    """A fair lock between threads.

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
