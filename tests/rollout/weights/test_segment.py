"""Shared memory between processes that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rollout.weights.segment import Segment

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")

SIZE = 1 << 20


def shared_files() -> set[str]:
    """Names in `/dev/shm`, but what other tests' engines register their OpenMP under."""
    names = {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()
    return {name for name in names if not name.startswith("__KMP_REGISTERED_LIB_")}


@linux
def test_memory_is_seen_by_an_opener_and_has_no_name() -> None:
    before = shared_files()
    segment = Segment.create(SIZE)
    assert segment.kind == "memory"
    opened = Segment.open(segment.path, SIZE)
    segment.seal()
    assert shared_files() == before
    with pytest.raises(OSError, match="No such file"):
        Segment.open(segment.path, SIZE)
    segment.bytes.copy_(torch.arange(SIZE) % 251)
    assert torch.equal(opened.bytes, (torch.arange(SIZE) % 251).to(torch.uint8))


def test_a_file_takes_the_place_of_memory_and_is_unlinked(tmp_path: Path) -> None:
    segment = Segment.create(SIZE, tmp_path, in_memory=False)
    assert segment.kind == "file"
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [SIZE]
    opened = Segment.open(segment.path, SIZE)
    segment.seal()
    assert list(tmp_path.iterdir()) == []
    segment.bytes[7] = 9
    assert opened.bytes[7] == 9


def test_an_unsealed_file_goes_with_its_segment(tmp_path: Path) -> None:
    segment = Segment.create(SIZE, tmp_path, in_memory=False)
    del segment
    assert list(tmp_path.iterdir()) == []


@linux
def test_memory_that_is_not_there_falls_back_to_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = os.posix_fallocate

    def refuse(descriptor: int, offset: int, size: int) -> None:
        if "memfd" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    opened = len(os.listdir("/proc/self/fd"))
    segment = Segment.create(SIZE, tmp_path)
    assert segment.kind == "file"
    segment.seal()
    del segment
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_disk_without_room_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rollout.weights.segment._reserve", refuse)
    with pytest.raises(OSError, match="No space left"):
        Segment.create(SIZE, tmp_path, in_memory=False)
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_killed_learner_leaves_nothing_and_its_engines_keep_reading() -> None:
    before = shared_files()
    program = (
        "import time\n"
        "from rollout.weights.segment import Segment\n"
        f"segment = Segment.create({SIZE})\n"
        "segment.bytes.fill_(5)\n"
        "print(segment.path, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as learner:
        assert learner.stdout is not None
        path = learner.stdout.readline().strip()
        opened = Segment.open(path, SIZE)
        os.kill(learner.pid, signal.SIGKILL)
        learner.wait()
    assert opened.bytes.float().mean() == 5
    assert shared_files() == before
    assert not Path(path).exists()


def test_a_view_is_typed_and_shaped() -> None:
    segment = Segment.create(4096)
    segment.view(64, (2, 3), torch.bfloat16).copy_(torch.arange(6).view(2, 3))
    assert segment.bytes[64 : 64 + 12].view(torch.bfloat16).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux opens memory through another process")
@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unlinked_segment_can_be_opened_until_it_is_sealed(tmp_path: Path, in_memory: bool) -> None:
    segment = Segment.create(SIZE, tmp_path, in_memory=in_memory)
    segment.bytes.fill_(7)
    segment.unlink()
    assert list(tmp_path.iterdir()) == []
    assert int(Segment.open(segment.path, SIZE).bytes.sum()) == 7 * SIZE
    segment.seal()
    with pytest.raises(OSError, match="No such file"):
        Segment.open(segment.path, SIZE)
