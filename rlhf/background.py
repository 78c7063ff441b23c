"""`Lookout`: something looked at now and then by a thread of its own, as long as a `with` block lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Lookout:
    """Calls `look` after every pause, in a daemon thread. Use as a context manager.

    Exceptions of `look` end the thread alone; leaving the block waits for a look in progress.
    """

    def __init__(self, name: str, look: Callable[[], None], pause: Callable[[], float]) -> None:
        """Prepare. `name`: of the thread, for stack dumps. `pause`: seconds until the next look."""
        self._look = look
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop looking and wait for the thread."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Look no more after the look in progress."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._pause()):
            self._look()
