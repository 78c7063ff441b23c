"""The `tcp` transport: engines that cannot map the learner's memory read it over the network.

The learner writes a version into its segment, as for `shm`, and serves that memory on one address. Each
engine reads it once, straight into a buffer of its own, and from there on goes the way of `shm`: verify,
install, read back.

Before a byte of weights moves, either side proves to the other that it knows a random token, which reached
the engine with its call: a nonce from each, then a keyed hash of both from each. The connection is not
encrypted: use a network that you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rollout.weights.errors import WeightTransferError
from rollout.weights.manifest import Entry
from rollout.weights.segment import Memory, Segment
from rollout.weights.shm import SegmentSender

logger = logging.getLogger(__name__)

NONCE = 32
"""Bytes of a nonce, a token and a proof."""

CHUNK = 16 << 20
"""Bytes that are sent at once; each must go through within `STALL_SECONDS`."""

STALL_SECONDS = 60.0
"""How long a connection may stand still."""

_COUNT = struct.Struct("!Q")
_RANGE = struct.Struct("!QQ")

Ranges = Sequence[tuple[int, int]]
"""`(offset, bytes)` of each piece."""


class TcpSender(SegmentSender):
    """Writes weights into a segment of this process and serves it while engines install."""

    def __init__(self, *arguments: Any, address: str, **options: Any) -> None:
        """As `SegmentSender`. `address`: that of this machine at which the engines reach it."""
        super().__init__(*arguments, **options)
        self._address = address
        self._server: SegmentServer | None = None

    def _offer(self, segment: Segment) -> dict[str, Any]:
        self._withdraw()
        self._server = SegmentServer(segment, self._address)
        return self._server.info

    def _withdraw(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class SegmentServer:
    """Serves pieces of a segment, on one address, to whoever knows the token."""

    def __init__(self, segment: Memory, address: str) -> None:
        """Listen on a free port of `address`. Raises OSError where this machine has no such address."""
        self._bytes = segment.bytes.numpy().data
        self._token = secrets.token_bytes(NONCE)
        self._socket = socket.create_server((address, 0), family=_family(address))
        self.info = {
            "address": address,
            "port": self._socket.getsockname()[1],
            "token": self._token,
            "size": len(self._bytes),
        }
        """What an engine needs: `address`, `port`, `token`, `size`."""
        threading.Thread(target=self._accept, name="weights-server", daemon=True).start()

    def close(self) -> None:
        """Take no further connections; safe to call twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which closing alone does not
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection, peer), daemon=True).start()

    def _serve(self, connection: socket.socket, peer: Any) -> None:
        """One engine, one version."""
        with connection:
            connection.settimeout(STALL_SECONDS)
            try:
                self._greet(connection)
                for offset, size in self._asked(connection):
                    for start in range(offset, offset + size, CHUNK):
                        connection.sendall(self._bytes[start : min(start + CHUNK, offset + size)])
            except (OSError, PermissionError, ValueError) as error:
                logger.warning("Weights were not served to %s: %s", peer[0], error)

    def _greet(self, connection: socket.socket) -> None:
        """Prove the token and have it proven. Raises PermissionError."""
        theirs, ours = _read(connection, NONCE), secrets.token_bytes(NONCE)
        connection.sendall(ours + _proof(self._token, b"learner", theirs + ours))
        if not hmac.compare_digest(_read(connection, NONCE), _proof(self._token, b"engine", theirs + ours)):
            raise PermissionError("it does not know the token.")

    def _asked(self, connection: socket.socket) -> list[tuple[int, int]]:
        """The pieces asked for. Raises ValueError for one outside the segment."""
        (count,) = _COUNT.unpack(_read(connection, _COUNT.size))
        if count > len(self._bytes):
            raise ValueError(f"it asked for {count} pieces.")
        ranges = [_RANGE.unpack(_read(connection, _RANGE.size)) for _ in range(count)]
        for offset, size in ranges:
            if offset + size > len(self._bytes):
                raise ValueError(f"it asked for bytes {offset} to {offset + size} of {len(self._bytes)}.")
        return ranges


class RemoteSegment(Memory):
    """A learner's segment in another machine's memory, and the buffer that its bytes are read into."""

    def __init__(self, address: str, port: int, token: bytes, size: int) -> None:
        """What `SegmentServer.info` says. Nothing is read yet."""
        self._peer = (address, port)
        self._token = token
        self.bytes = torch.empty(size, dtype=torch.uint8)
        """`[size]` uint8."""

    def fetch(self, entries: Iterable[Entry]) -> None:
        """Read these tensors into their places. Raises WeightTransferError when they do not arrive."""
        ranges = joined((entry.offset, entry.size) for entry in entries)
        buffer = self.bytes.numpy().data
        try:
            with socket.create_connection(self._peer, timeout=STALL_SECONDS) as connection:
                self._greet(connection)
                connection.sendall(
                    _COUNT.pack(len(ranges)) + b"".join(_RANGE.pack(*piece) for piece in ranges)
                )
                for offset, size in ranges:
                    _read_into(connection, buffer[offset : offset + size])
        except OSError as error:
            raise WeightTransferError(
                f"The learner's weights did not arrive from {self._peer[0]}:{self._peer[1]} "
                f"({error or type(error).__name__}); the old weights stay."
            ) from error

    def _greet(self, connection: socket.socket) -> None:
        ours = secrets.token_bytes(NONCE)
        connection.sendall(ours)
        theirs, proof = _read(connection, NONCE), _read(connection, NONCE)
        if not hmac.compare_digest(proof, _proof(self._token, b"learner", ours + theirs)):
            raise ConnectionError("whoever answers there does not know the token")
        connection.sendall(_proof(self._token, b"engine", ours + theirs))


def joined(ranges: Iterable[tuple[int, int]], gap: int = 4096) -> list[tuple[int, int]]:
    """The same bytes in order, pieces that lie less than `gap` bytes apart as one."""
    pieces: list[tuple[int, int]] = []
    for offset, size in sorted(ranges):
        if pieces and offset - sum(pieces[-1]) < gap:
            start, length = pieces[-1]
            pieces[-1] = (start, max(length, offset + size - start))
        else:
            pieces.append((offset, size))
    return pieces


def _proof(token: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(token, role + nonces, hashlib.sha256)


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    _read_into(connection, memoryview(data))
    return bytes(data)


def _read_into(connection: socket.socket, buffer: memoryview) -> None:
    """Fill `buffer`. Raises ConnectionError when the connection ends before."""
    done = 0
    while done < len(buffer):
        count = connection.recv_into(buffer[done:])
        if count == 0:
            raise ConnectionError("the connection was closed")
        done += count


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
