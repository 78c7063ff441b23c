"""What benchmarks measure with: peaks of process trees and of this process, and powers fitted to curves."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf.background import Lookout
from rlhf.memory import pss, rss, tree

# ---------------------------------------------------------------- process trees


class PeakMemory(Lookout):
    """The highest summed PSS of a process and its descendants, looked at by a thread of this process.

    A look adds up RSS. PSS itself costs 10 ms a GiB, which at every look would take a core from what is
    measured, so it is read only when RSS, less what was counted twice in it at the last reading, is above the
    peak by `MARGIN`, and every `READING_SECONDS` for the case that less is shared. Use as a context manager.
    """

    MARGIN = 0.002
    READING_SECONDS = 5.0

    def __init__(self, process: int, rate: float = 20.0) -> None:
        """Prepare. `process`: id of the tree's root; `rate`: looks a second."""
        super().__init__("peak-memory", self._look, self._until_next)
        self.peak = 0
        """Bytes."""
        self.looks = 0
        self.longest_gap = 0.0
        """Seconds between the two looks that lay furthest apart."""
        self._root = psutil.Process(process)
        self._shared = 0
        self._read = -math.inf
        self._interval = 1 / rate
        self._last = time.perf_counter()

    def _until_next(self) -> float:
        """Seconds to the next look, less what the last one took."""
        return max(0.0, self._last + self._interval - time.perf_counter())

    def _look(self) -> None:
        now = time.perf_counter()
        self.longest_gap, self._last = max(self.longest_gap, now - self._last), now
        try:
            processes = tree(self._root)
        except psutil.NoSuchProcess:
            return
        self.looks += 1
        now, resident_bytes = time.perf_counter(), rss(processes)
        above = resident_bytes - self._shared > self.peak * (1 + self.MARGIN)
        if above or now - self._read > self.READING_SECONDS:
            proportional = pss(processes) or 0
            self.peak, self._read = max(self.peak, proportional), now
            self._shared = resident_bytes - proportional


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a program took, its start-up included."""

    seconds: float
    peak: int
    """Highest summed PSS of its process tree, bytes."""
    looks_per_second: float


def run_measured(command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> Usage:
    """Run a program to its end, its output into `log`, and watch its memory.

    `environment` comes on top of this process's. Raises RuntimeError with the end of the log when it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | dict(environment or {})
        )
        try:
            with PeakMemory(process.pid) as memory:
                status = process.wait()
        finally:
            process.kill()
    seconds = time.perf_counter() - started
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{_tail(log)}")
    return Usage(seconds=seconds, peak=memory.peak, looks_per_second=memory.looks / seconds)


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


# ---------------------------------------------------------------- this process


def resident() -> int:
    """Resident bytes of this process now (Linux)."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Most resident bytes of this process since its start or the last `reset_peak`, kept by the kernel."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let `peak_resident` begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status says nothing of {key}.")


# ---------------------------------------------------------------- powers


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """`y = factor * x ** exponent`, as well as it fits."""

    exponent: float
    factor: float
    residual: float
    """Root mean square of `ln(y / fit)`: 0.1 means that points lie about 10 % off the line."""


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares in logarithms. Raises ValueError for fewer than two different `x`, or values up to 0."""
    if len(set(x)) < 2 or len(x) != len(y) or min(*x, *y) <= 0:
        raise ValueError(f"No power can be fitted to x={list(x)}, y={list(y)}.")
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / sum((a - mean_u) ** 2 for a in u)
    start = mean_v - slope * mean_u
    errors = [b - start - slope * a for a, b in zip(u, v)]
    residual = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return PowerLaw(exponent=slope, factor=math.exp(start), residual=residual)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
