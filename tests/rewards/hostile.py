"""Job factories for `sandbox.py` that misbehave in every way that a grader can."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def echo() -> Callable[[Any], Any]:
    """Gives back what it is given, twice."""
    return lambda payload: [payload, payload]


def obey() -> Callable[[str], Any]:
    """Does what the payload says."""
    return lambda order: ORDERS[order]()


def broken() -> Callable[[Any], Any]:
    """Cannot be started."""
    raise ValueError("no such model")


def dead() -> Callable[[Any], Any]:
    """Takes its process down while it starts."""
    os._exit(9)


def _sleep_deaf() -> None:
    """Sleeps with the alarm blocked, as a loop in C would."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(600)


def _swallow() -> None:
    """Ignores the alarm's exception."""
    while True:
        try:
            time.sleep(600)
        except BaseException:
            continue


def _hog() -> int:
    """Asks for 8 GiB."""
    return len(bytearray(8 << 30))


def _kill_once() -> str:
    """Is killed at the first attempt of its parent's."""
    marker = Path(tempfile.gettempdir(), f"whetstone-killed-{os.getppid()}")
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    marker.unlink()
    return "lives"


def _noise() -> str:
    """Prints, reads standard input and changes nothing else."""
    print("a grader that talks")
    return sys.stdin.read()


REPLIES = 4
"""The worker's pipe to its parent (0 and 1 are moved to 3 and 4)."""

ORDERS: dict[str, Callable[[], Any]] = {
    "pid": os.getpid,
    "session": lambda: os.getsid(0),
    "sleep": lambda: time.sleep(600),
    "sleep deaf": _sleep_deaf,
    "swallow": _swallow,
    "exit": lambda: os._exit(3),
    "quit": lambda: sys.exit(4),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill once": _kill_once,
    "raise": lambda: 1 // 0,
    "hog": _hog,
    "unreadable": lambda: object(),
    "garbage": lambda: os.write(REPLIES, b"nonsense\n"),
    "noise": _noise,
    "fork": lambda: os.system("sleep 600 &"),
}
