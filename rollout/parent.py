"""What a process does when the one that started it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel for a signal when process `parent`, which started this one, ends, however it ends.

    Ends this process at once when it has ended already. Linux only: elsewhere the end of a pipe must do.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request was made
        os._exit(1)
