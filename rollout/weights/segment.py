"""One piece of memory that learner and engines map: written by the learner, read-only to engines.

It has no name in any folder, so nothing is left behind however a process ends: an anonymous memory file
(`memfd_create`) that engines open through the creator's `/proc` entry until `seal`. Unlike a file in
`/dev/shm` it is not bound by that mount's size (64 MiB in a default Docker container). Where the system has
no such memory, or refuses that much of it, a file in the run's folder takes its place; `seal` unlinks it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch


class Memory:
    """Bytes that hold tensors at offsets."""

    bytes: torch.Tensor
    """`[size]` uint8."""

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor that lies at `offset`: `shape` of `dtype`, no copy."""
        length = dtype.itemsize
        for size in shape:
            length *= size
        return self.bytes[offset : offset + length].view(dtype).view(shape)


class Segment(Memory):
    """`size` bytes shared between processes. Use `create` in the learner and `open` in an engine."""

    def __init__(self, mapping: mmap.mmap, path: str, kind: str, descriptor: int = -1) -> None:
        self._mapping = mapping
        self._descriptor = descriptor
        self._creator = os.getpid()
        self._file = path if kind == "file" else ""
        self.path = path
        self.kind = kind
        """`memory`, or `file` where memory could not be had."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        """`[size]` uint8; writing to an opened (read-only) segment crashes the process."""

    @classmethod
    def create(cls, size: int, folder: Path | None = None, *, in_memory: bool = True) -> Segment:
        """A segment of `size` bytes, all of them reserved. `folder` takes the file where memory is refused.

        Raises OSError when neither memory nor the folder's disk has that much room.
        """
        if in_memory and sys.platform == "linux":
            descriptor = os.memfd_create("whetstone-weights", os.MFD_CLOEXEC)
            with contextlib.suppress(OSError):
                os.posix_fallocate(descriptor, 0, size)
                return cls._mapped(descriptor, size, f"/proc/{os.getpid()}/fd/{descriptor}", "memory")
            os.close(descriptor)
        descriptor, path = tempfile.mkstemp(prefix=".weights-", dir=folder)
        try:
            _reserve(descriptor, size)
            return cls._mapped(descriptor, size, path, "file")
        except OSError:
            os.close(descriptor)
            Path(path).unlink()
            raise

    @classmethod
    def _mapped(cls, descriptor: int, size: int, path: str, kind: str) -> Segment:
        mapping = mmap.mmap(descriptor, size)
        return cls(mapping, path, kind, descriptor)

    @classmethod
    def open(cls, path: str, size: int) -> Segment:
        """Map a segment of another process (or of this one) for reading.

        Raises OSError when `path` is gone.
        """
        with open(path, "rb") as file:
            return cls(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), path, "opened")

    def unlink(self) -> None:
        """Leave no name in any folder: from now on processes open it through this one, until `seal`.

        Linux only; elsewhere a file keeps its name until `seal`.
        """
        if self.kind == "file" and sys.platform == "linux":
            self._remove_file()
            self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def seal(self) -> None:
        """Let no further process open it; those that did keep it."""
        if self._descriptor < 0 or self._creator != os.getpid():
            return
        os.close(self._descriptor)
        self._descriptor = -1
        self._remove_file()

    def _remove_file(self) -> None:
        if self._file:
            Path(self._file).unlink(missing_ok=True)
        self._file = ""

    def __del__(self) -> None:
        self.seal()


def _reserve(descriptor: int, size: int) -> None:
    """Take the disk's blocks now: a full disk must be an error here, not a SIGBUS while writing."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
