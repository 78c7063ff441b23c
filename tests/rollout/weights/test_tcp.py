"""The network transport without an engine: what arrives, what is refused."""

from __future__ import annotations

import socket
import time

import pytest
import torch

from rollout.weights.errors import WeightTransferError
from rollout.weights.manifest import Entry
from rollout.weights.segment import Segment
from rollout.weights.tcp import RemoteSegment, SegmentServer, joined

LOOPBACK = "127.0.0.1"
SIZE = 1 << 20


@pytest.fixture
def segment() -> Segment:
    made = Segment.create(SIZE)
    made.bytes.copy_(torch.randint(0, 256, (SIZE,), dtype=torch.uint8))
    return made


def entry(name: str, offset: int, size: int) -> Entry:
    return Entry(name=name, dtype="uint8", shape=(size,), offset=offset)


def test_exactly_what_is_asked_for_arrives(segment: Segment) -> None:
    server = SegmentServer(segment, LOOPBACK)
    remote = RemoteSegment(**server.info)
    remote.bytes.zero_()
    remote.fetch([entry("a", 64, 100), entry("b", 500_000, 4)])
    assert torch.equal(remote.view(64, (100,), torch.uint8), segment.bytes[64:164])
    assert torch.equal(remote.view(500_000, (1,), torch.float32), segment.view(500_000, (1,), torch.float32))
    assert int(remote.bytes[164:500_000].sum()) == 0
    remote.fetch([entry("all", 0, SIZE)])
    assert torch.equal(remote.bytes, segment.bytes)
    server.close()


def test_it_listens_on_its_address_only(segment: Segment) -> None:
    server = SegmentServer(segment, LOOPBACK)
    assert server._socket.getsockname()[0] == LOOPBACK
    server.close()
    with pytest.raises(OSError, match="assign"):
        SegmentServer(segment, "203.0.113.1")


def test_who_does_not_know_the_token_gets_nothing(segment: Segment, caplog: pytest.LogCaptureFixture) -> None:
    server = SegmentServer(segment, LOOPBACK)
    stranger = RemoteSegment(**server.info | {"token": b"x" * 32})
    with pytest.raises(WeightTransferError, match="whoever answers there does not know the token"):
        stranger.fetch([entry("all", 0, SIZE)])
    with socket.create_connection((LOOPBACK, server.info["port"])) as liar:
        liar.sendall(b"n" * 32)
        liar.recv(64)
        liar.sendall(b"p" * 32)
        assert liar.recv(1) == b""
    until(lambda: "Weights were not served to 127.0.0.1: it does not know the token." in caplog.messages)
    server.close()


def test_a_silent_caller_keeps_nobody_waiting(segment: Segment) -> None:
    server = SegmentServer(segment, LOOPBACK)
    with socket.create_connection((LOOPBACK, server.info["port"])):
        remote = RemoteSegment(**server.info)
        remote.fetch([entry("all", 0, SIZE)])
        assert torch.equal(remote.bytes, segment.bytes)
    server.close()


def test_what_lies_outside_and_what_is_gone_is_refused(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    server = SegmentServer(segment, LOOPBACK)
    remote = RemoteSegment(**server.info | {"size": SIZE + 8})
    with pytest.raises(WeightTransferError, match=r"did not arrive from 127\.0\.0\.1:\d+ \(.+\); the old"):
        remote.fetch([entry("beyond", 0, SIZE + 8)])
    until(lambda: any(f"it asked for bytes 0 to {SIZE + 8} of {SIZE}" in line for line in caplog.messages))
    server.close()
    server.close()
    with pytest.raises(WeightTransferError, match="refused"):
        RemoteSegment(**server.info).fetch([entry("all", 0, SIZE)])


def until(holds: object) -> None:
    """Wait for what another thread does."""
    assert callable(holds)
    limit = time.monotonic() + 5
    while not holds() and time.monotonic() < limit:
        time.sleep(0.01)
    assert holds()


def test_neighbours_become_one_piece() -> None:
    assert joined([(64, 10), (0, 60)]) == [(0, 74)]
    assert joined([(0, 60), (10_000, 5)]) == [(0, 60), (10_000, 5)]
    assert joined([(0, 100), (10, 5)]) == [(0, 100)]
    assert joined([]) == []
