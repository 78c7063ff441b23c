"""The real command as a user starts it, in a session of its own, and what is left of it at its end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALONE = [sys.executable]
RLHF = ["-m", "rlhf.cli"]


def start(
    cwd: Path, *arguments: str, launcher: list[str] = TORCHRUN, program: list[str] = RLHF
) -> subprocess.Popen[str]:
    """A command in a session of its own."""
    return subprocess.Popen(
        [*launcher, *program, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, succeeds: bool = True) -> str:
    """Wait for the end; returns what was said. No process of it is left."""
    family = descendants(process.pid)
    said = process.communicate(timeout=400)[0]
    assert (process.returncode == 0) is succeeds, said
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == [], said
    return said


def descendants(pid: int) -> list[psutil.Process]:
    """All descendants; none of a process that has ended already."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def sentences(said: str) -> list[str]:
    """The lines in which `rlhf` says why it ended."""
    return [line for line in said.splitlines() if line.startswith("rlhf: ")]


def wait_until(process: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    """Until a condition holds, or the run has ended."""
    limit = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < limit and not holds():
        time.sleep(0.05)


def wait_for_rows(process: subprocess.Popen[str], folder: Path, rows: int) -> None:
    """Until so many rows are logged in `folder/run`, or the run has ended."""
    path = folder / "run" / "metrics.jsonl"
    wait_until(process, lambda: path.exists() and path.read_text().count("\n") >= rows)
