"""Runs where `/dev/shm` is full: weights travel, engines start and graders work all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.tracking.jsonl import read
from tests.integration.test_resumed_runs import GRADED_APART

FULL = """
mount -t tmpfs -o size=64k tmpfs /dev/shm
head -c 65536 /dev/zero > /dev/shm/filler
! head -c 1 /dev/zero > /dev/shm/more 2> /dev/null || exit 3
exec "$@"
"""
"""A command in a mount namespace of its own, in which `/dev/shm` has not one free page."""

PRIVATE = [
    "unshare",
    "--mount",
    *(["--map-root-user"] if os.getuid() else []),
    "--",
    "bash",
    "-c",
    FULL,
    "full",
]


def in_full_shared_memory(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `command` where `/dev/shm` is full."""
    return subprocess.run(
        [*PRIVATE, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def may_mount(cwd: Path) -> bool:
    """Whether this process may mount in a namespace of its own."""
    try:
        return in_full_shared_memory("true", cwd=cwd).returncode == 0
    except FileNotFoundError:
        return False


def test_a_run_where_shared_memory_is_full(tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("mounting is not permitted")
    run = ["train", "dapo/tiny", "run.dir=run", "loop.steps=1", "evaluation.every=0", "rollout.process=child"]
    done = in_full_shared_memory(sys.executable, "-m", "rlhf.cli", *run, *GRADED_APART, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (row["step"], row["weights/version"]) == (1, 2)
    assert row["weights/read_back"] > 0
    warning = "/dev/shm is full: engines start without Intel's OpenMP, which is faster."
    has_openmp = (Path(sys.prefix) / "lib" / "libiomp5.so").exists()
    assert done.stderr.splitlines().count(warning) == int(has_openmp)
