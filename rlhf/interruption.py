"""`Interruption`: the first SIGINT or SIGTERM asks a run to end after its step, a second one ends it now."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rollout.parent import end_with_parent
from trainer.parallel.world import World

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_with_torchrun(world: World) -> None:
    """Get SIGTERM when the torchrun that started this process ends: rank 0 then finishes its step and saves.

    The others pass it over, and end when rank 0 does; before that has begun it ends any rank.
    """
    if world.launched:
        end_with_parent(os.getppid(), signal.SIGTERM)


class Interruption:
    """Listens while it is entered, in the main thread only; former handlers come back after it."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that came, whose step is to be the last."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Begin to listen; on another thread, where Python allows no handlers, do nothing.

        A signal that the process was told to ignore (`nohup`, `&`) stays ignored.
        """
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def status(self) -> int:
        """Exit status of a command that was interrupted: 128 + the signal, 130 for Ctrl-C."""
        return 128 + (self.received or signal.SIGINT)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        said = "%s: the step in progress is finished and saved; a second one stops at once."
        # On a thread of its own: this one may hold the lock of the very stream.
        threading.Thread(target=logger.warning, args=(said, self.received.name), daemon=True).start()
