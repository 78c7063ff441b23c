"""`MemoryMonitor`: what this process and its children hold, now and at each step's peak (`memory/*`)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import psutil

from rlhf.background import Lookout

_GROWTH = 1.01
"""A new peak is measured as PSS once the cheap RSS sum has grown by this factor."""


def tree(process: psutil.Process | None = None) -> list[psutil.Process]:
    """The process (this one by default) and all its living descendants."""
    root = process or psutil.Process()
    return [root, *root.children(recursive=True)]


def rss(processes: list[psutil.Process]) -> int:
    """Resident bytes of the processes added up; a page shared by two counts twice. About 20 µs a process."""
    return sum(_read(p, lambda q: q.memory_info().rss) or 0 for p in processes)


def pss(processes: list[psutil.Process]) -> int | None:
    """Resident bytes with shared pages divided among their users: what the processes really take.

    None where the kernel does not tell (not Linux, or a process of another user). Costs 10 ms a GiB.
    """
    shares = [_read(p, lambda q: q.memory_full_info().pss) for p in processes]
    known = [share for share in shares if share is not None]
    return sum(known) if len(known) == len(shares) else None


def _read(process: psutil.Process, value: Callable[[psutil.Process], int]) -> int | None:
    """`value` of a process: 0 when it has ended meanwhile, None when it may not be read."""
    try:
        return value(process)
    except psutil.NoSuchProcess:
        return 0
    except (psutil.AccessDenied, AttributeError):
        return None


class MemoryMonitor(Lookout):
    """Samples the process tree in the background, so that a peak inside a step is seen.

    A sample adds up RSS (cheap); when that beats the step's highest by 1 %, PSS is read. With `phase` (a
    clock's `phase`), each phase that was sampled gets a peak of its own. Use as a context manager.
    """

    def __init__(self, interval: float = 1.0, phase: Callable[[], str] | None = None) -> None:
        """Prepare; sampling starts on entry. `interval`: seconds between samples."""
        super().__init__("memory-monitor", self._sample, lambda: interval)
        self._phase = phase
        self._lock = threading.Lock()
        self._peak_rss = 0
        self._peak_pss = 0
        self._peaks: dict[str, int] = {}

    def metrics(self) -> dict[str, float]:
        """Close the step: memory now, and the peaks since the last call.

        Bytes: `memory/rss`, `memory/rss_driver`; `memory/pss` and `memory/peak_pss` where the kernel tells;
        `memory/peak_<phase>` for each sampled phase (RSS); `memory/device_*` on a CUDA device. And
        `memory/processes`, how many there are.
        """
        processes = tree()
        now, share = rss(processes), pss(processes)
        with self._lock:
            if share is not None:
                self._peak_pss = max(self._peak_pss, share)
            peaks, peak_pss = self._peaks, self._peak_pss
            self._reset()
        found: dict[str, float] = {
            "memory/rss": now,
            "memory/rss_driver": rss(processes[:1]),
            "memory/processes": len(processes),
        }
        if share is not None:
            found |= {"memory/pss": share, "memory/peak_pss": peak_pss}
        found |= {f"memory/peak_{phase}": peak for phase, peak in peaks.items()}
        return found | device_metrics()

    def _sample(self) -> None:
        """One look at the tree; PSS only when RSS says that it is worth its milliseconds."""
        processes = tree()
        now = rss(processes)
        grown = now > self._peak_rss * _GROWTH
        share = pss(processes) if grown else None
        with self._lock:
            if grown:
                self._peak_rss = now
                self._peak_pss = max(self._peak_pss, share or 0)
            if self._phase is not None:
                phase = self._phase()
                self._peaks[phase] = max(self._peaks.get(phase, 0), now)

    def _reset(self) -> None:
        self._peak_rss = 0
        self._peak_pss = 0
        self._peaks = {}


def device_metrics() -> dict[str, float]:
    """`memory/device_allocated` and `memory/device_peak` (since the last call); empty without CUDA.

    Looks at torch only when the run has loaded it and used the device.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    found = {
        "memory/device_allocated": float(torch.cuda.memory_allocated()),
        "memory/device_peak": float(torch.cuda.max_memory_allocated()),
    }
    torch.cuda.reset_peak_memory_stats()
    return found
