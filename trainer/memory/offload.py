"""Weights and optimizer states put elsewhere between a learner's calls, and brought back for the next.

What is counted and moved are storages, not tensors: views, tied weights and slices of a sharded weight are
other faces of one storage. Only its memory goes, so every tensor stays the object that it was, whoever holds
it (autograd, FSDP2, an optimizer), and finds its bytes again afterwards. On a GPU the storage is resized to
nothing. On a CPU that is not possible for a storage that numpy has seen, as all have that were once written
to a file; there the kernel is told to drop its pages, which read as zeros until the bytes are back.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, UntypedStorage

from trainer.errors import OffloadError
from trainer.memory.config import MemoryConfig, OffloadState

SMALL = 1 << 12
"""Bytes below which a storage stays where it is: counters, norms of tiny models, tables of quantizers."""


class Store(Protocol):
    """Where bytes are kept meanwhile. Keys count from 0 in every round, always of the same sizes or more."""

    def write(self, key: int, content: Tensor) -> None:
        """Keep a copy of `content`, uint8 of one dimension, on the device of the learner."""
        ...

    def read(self, key: int, into: Tensor) -> None:
        """Fill `into` with what was kept."""
        ...

    def settle(self) -> None:
        """Wait until all that was written or read is there."""
        ...

    def close(self) -> None:
        """Forget everything."""
        ...


class HostStore:
    """Pinned memory of the host. It is kept between rounds: pinning costs more than the copy."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def write(self, key: int, content: Tensor) -> None:
        """See `Store`."""
        kept = self._kept.get(key)
        if kept is None or len(kept) != len(content):
            kept = torch.empty(len(content), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._kept[key] = kept
        kept.copy_(content, non_blocking=True)

    def read(self, key: int, into: Tensor) -> None:
        """See `Store`."""
        into.copy_(self._kept[key], non_blocking=True)

    def settle(self) -> None:
        """See `Store`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def close(self) -> None:
        """See `Store`."""
        self._kept.clear()


class FileStore:
    """A file that has no name. It is written and read, not mapped: mapped pages count as the process's."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: on the disk to use; None takes the system's folder for temporary files.

        Raises ValueError when there is no such folder.
        """
        try:
            # Without a buffer, which would try again on closing to write what a full disk refused.
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            raise ValueError(
                f"learner.memory.folder={folder} does not exist: make it, or name another."
            ) from None
        self._places: dict[int, int] = {}

    def write(self, key: int, content: Tensor) -> None:
        """See `Store`. Raises OffloadError when the disk does not take it."""
        if key == 0:
            self._file.seek(0)
        self._places[key] = self._file.tell()
        rest = content.cpu().numpy().data
        with _told():
            while rest:
                rest = rest[self._file.write(rest) :]

    def read(self, key: int, into: Tensor) -> None:
        """See `Store`. Raises OffloadError when the disk does not give it."""
        on_host = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        rest = on_host.numpy().data
        self._file.seek(self._places[key])
        with _told():
            while rest:
                count = self._file.readinto(rest)
                if not count:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                rest = rest[count:]
        if on_host is not into:
            into.copy_(on_host)

    def settle(self) -> None:
        """See `Store`; the kernel has it all."""

    def close(self) -> None:
        """See `Store`."""
        self._file.close()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OffloadError(
            f"the file of learner.memory.offload_state=disk failed ({error.strerror}): name a "
            "learner.memory.folder with more room, or set learner.memory.offload_state=never."
        ) from error


class StateOffload:
    """Moves the storages behind tensors to a store and back."""

    def __init__(self, store: Store | None) -> None:
        """Without a store, nothing ever moves."""
        self._store = store
        self._away: list[tuple[UntypedStorage, int]] = []

    @classmethod
    def of(cls, config: MemoryConfig, device: torch.device) -> StateOffload:
        """As configured. Raises ValueError for `host` on a CPU, or a folder that is not there."""
        if config.offload_state is OffloadState.never:
            return cls(None)
        if config.offload_state is OffloadState.disk:
            return cls(FileStore(Path(config.folder) if config.folder else None))
        if device.type == "cpu":
            raise ValueError(
                "learner.memory.offload_state=host moves weights from a GPU to the host's memory, where "
                "those of a learner on a CPU are already: set disk, or never."
            )
        return cls(HostStore())

    @property
    def on(self) -> bool:
        """Whether anything ever moves."""
        return self._store is not None

    @property
    def bytes_away(self) -> int:
        """Bytes that are in the store now."""
        return sum(size for _, size in self._away)

    @torch.no_grad()
    def offload(self, tensors: Iterable[Tensor]) -> None:
        """Move what `tensors` are made of to the store, but for small storages; what is there stays there."""
        if self._store is None or self._away:
            return
        storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        moving = [storage for storage in storages.values() if storage.nbytes() >= SMALL]
        for key, storage in enumerate(moving):
            self._store.write(key, _bytes(storage))
        self._store.settle()
        self._away = [(storage, storage.nbytes()) for storage in moving]
        for storage in moving:
            _empty(storage)
        if any(storage.device.type == "cuda" for storage in moving):
            torch.cuda.empty_cache()  # else torch would keep it for itself

    @torch.no_grad()
    def reload(self) -> None:
        """Bring everything back, bit for bit."""
        if self._store is None or not self._away:
            return
        for key, (storage, size) in enumerate(self._away):
            if storage.nbytes() != size:
                storage.resize_(size)
            self._store.read(key, _bytes(storage))
        self._store.settle()
        self._away.clear()

    def close(self) -> None:
        """Forget what is away: for the end of a learner."""
        if self._store is not None:
            self._store.close()


def _bytes(storage: UntypedStorage) -> Tensor:
    """All of a storage as uint8, sharing it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _empty(storage: UntypedStorage) -> None:
    """Let go of a storage's memory, but not of the storage."""
    if storage.device.type != "cpu":
        storage.resize_(0)
        return
    page, start = mmap.PAGESIZE, storage.data_ptr()
    first, last = -(-start // page) * page, (start + storage.nbytes()) // page * page
    whole_pages = max(0, last - first)
    if _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole_pages), mmap.MADV_DONTNEED):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


_LIBC = ctypes.CDLL(None, use_errno=True)
