"""What an engine's process does with `/dev/shm`: room for Intel's OpenMP, and nothing left in it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout import child_engine
from rollout.child_engine import _kill, _room_for_openmp
from rollout.engine_server import SHARED_MEMORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")


def refusing(number: int) -> object:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_folder_with_room_is_left_as_it_was(tmp_path: Path) -> None:
    assert _room_for_openmp(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_one_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child_engine.os, "posix_fallocate", refusing(errno.ENOSPC))
    assert not _room_for_openmp(tmp_path)
    assert caplog.messages == [f"{tmp_path} is full: engines start without Intel's OpenMP, which is faster."]
    monkeypatch.setattr(child_engine, "_room_for_openmp", lambda: False)
    assert not any("iomp" in library for library in child_engine.preload_libraries())


def test_where_nothing_may_be_written_openmp_registers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_engine.os, "posix_fallocate", refusing(errno.EACCES))
    assert _room_for_openmp(tmp_path)
    assert _room_for_openmp(tmp_path / "missing")


def test_a_child_that_is_killed_while_it_starts_leaves_no_openmp_file() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ours = SHARED_MEMORY / f"__KMP_REGISTERED_LIB_{process.pid}_0"
    other = SHARED_MEMORY / f"__KMP_REGISTERED_LIB_{process.pid}0_0"
    try:
        ours.touch()
        other.touch()
        _kill(process)
        assert (ours.exists(), other.exists()) == (False, True)
    finally:
        other.unlink()
    assert process.returncode == -9
