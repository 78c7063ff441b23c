"""`Channel`: how messages travel between rank 0 and the ranks that follow it, whatever they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

LEADER = 0


class Channel(Protocol):
    """Carries bytes from rank 0 to each follower and back."""

    def send(self, messages: Sequence[bytes]) -> None:
        """One message to each follower, in the order of ranks. Rank 0 only."""
        ...

    def tell_all(self, message: bytes) -> None:
        """The same message to every follower. Rank 0 only."""
        ...

    def answers(self) -> list[bytes]:
        """One message of each follower, in the order of ranks. Rank 0 only."""
        ...

    def receive(self) -> bytes:
        """Wait for rank 0, for as long as it takes. Raises RuntimeError when it is gone."""
        ...

    def answer(self, message: bytes) -> None:
        """One message to rank 0."""
        ...


class GroupChannel:
    """Messages through a gloo process group, point to point."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group` must not have a short time limit: followers wait on it while rank 0 generates."""
        self._group = group
        self._followers = range(LEADER + 1, dist.get_world_size(group))

    def send(self, messages: Sequence[bytes]) -> None:
        """See `Channel`."""
        for rank, message in zip(self._followers, messages, strict=True):
            self._send(message, rank)

    def tell_all(self, message: bytes) -> None:
        """See `Channel`."""
        self.send([message] * len(self._followers))

    def answers(self) -> list[bytes]:
        """See `Channel`."""
        return [self._receive(rank) for rank in self._followers]

    def receive(self) -> bytes:
        """See `Channel`."""
        return self._receive(LEADER)

    def answer(self, message: bytes) -> None:
        """See `Channel`."""
        self._send(message, LEADER)

    def _send(self, message: bytes, rank: int) -> None:
        content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        dist.send(torch.tensor([len(content)]), group=self._group, group_dst=rank)
        dist.send(content, group=self._group, group_dst=rank)

    def _receive(self, rank: int) -> bytes:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, group=self._group, group_src=rank)
        content: Tensor = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(content, group=self._group, group_src=rank)
        return content.numpy().tobytes()
