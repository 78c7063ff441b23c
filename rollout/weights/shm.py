"""The learner's end of the `shm` transport: one segment of memory, written once a publish, that engines map.

Its counterpart in the engine is `rollout.weights.receiver`. This module needs no vLLM.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rollout.engine import Engine
from rollout.weights.delivery import Delivery, WeightSource, on_each
from rollout.weights.errors import WeightTransferError
from rollout.weights.manifest import Entry, Manifest, content_digest, lay_out
from rollout.weights.segment import Segment


class SegmentSender(ABC):
    """Writes weights into a segment that all engines can read, then lets every engine install them.

    The segment is made at the first publish and used for all later ones: its pages stay warm, and it has no
    name that could outlive the run. How engines come to read it is the transport's: `ShmSender`, or
    `rollout.weights.tcp.TcpSender`."""

    verifies = True

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        columns: int,
        skip_unchanged: bool = False,
        folder: Path | None = None,
        in_memory: bool = True,
        renews: bool = False,
    ) -> None:
        """`columns`: see `Manifest.columns`. `folder` and `in_memory`: see `Segment.create`.

        `renews`: whether engines may be started again and then need the channel anew (see `renew`).
        """
        self._engines = engines
        self._columns = columns
        self._skip_unchanged = skip_unchanged
        self._folder = folder
        self._in_memory = in_memory
        self._renews = renews
        self._channel: dict[str, Any] = {}
        self._segment: Segment | None = None
        self._places: dict[str, Entry] = {}

    @property
    def kind(self) -> str:
        """Where the weights travel: `memory`, or `file` where memory was refused; empty before the first
        publish."""
        return self._segment.kind if self._segment else ""

    def stage(self, source: WeightSource, version: int) -> Delivery:
        """Copy and hash every tensor of one version into the segment."""
        started = time.perf_counter()
        if self._segment is None:
            source = list(source) if iter(source) is source else source
            self._open(source)
        manifest = Manifest(version=version, seed=secrets.randbits(63), columns=self._columns)
        delivery = Delivery(manifest=manifest, seconds={"transfer": 0.0, "hash": 0.0})
        for name, tensor in source:
            self._write(name, tensor.detach(), delivery)
        passed = time.perf_counter() - started
        delivery.seconds["gather"] = passed - delivery.seconds["transfer"] - delivery.seconds["hash"]
        return delivery

    def install(self, delivery: Delivery) -> list[dict[str, Any]]:
        """Every engine verifies, installs and reads back. Raises WeightTransferError when one refuses."""
        info = self._update(delivery)
        try:
            return on_each(self._engines, lambda engine: engine.receive_weights(info, delivery.version))
        except WeightTransferError:
            self._segment = None  # its places may be those of a wrong source: the next one lays it out anew
            raise

    def renew(self, engine: Engine, delivery: Delivery) -> dict[str, Any]:
        """Open the channel to an engine that was started again and install the version staged last."""
        engine.init_transfer(self._channel)
        return engine.receive_weights(self._update(delivery), delivery.version)

    def close(self) -> None:
        """Let go of the segment; it is freed when the engines have too."""
        self._withdraw()
        self._segment = None

    @abstractmethod
    def _offer(self, segment: Segment) -> dict[str, Any]:
        """Let engines read the segment; what they need to know for it."""

    @abstractmethod
    def _withdraw(self) -> None:
        """Let no further engine read it."""

    def _update(self, delivery: Delivery) -> dict[str, Any]:
        return {"manifest": delivery.manifest, "skip_unchanged": self._skip_unchanged}

    def _open(self, source: WeightSource) -> None:
        """Make a segment that fits the source and open the channel to every engine."""
        self._places, size = lay_out((name, tuple(tensor.shape), tensor.dtype) for name, tensor in source)
        segment = Segment.create(size, self._folder, in_memory=self._in_memory)
        self._channel = self._offer(segment)
        on_each(self._engines, lambda engine: engine.init_transfer(self._channel))
        if not self._renews:
            segment.seal()
        self._segment = segment

    def _write(self, name: str, tensor: Tensor, delivery: Delivery) -> None:
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        place = self._places.get(name)
        if self._segment is None or place is None or (place.shape, place.dtype) != (shape, dtype):
            # It has no place here; the engine, which knows what its model needs, will refuse it by name.
            delivery.manifest.entries.append(Entry(name=name, dtype=dtype, shape=shape, offset=0))
            return
        view = self._segment.view(place.offset, shape, tensor.dtype)
        started = time.perf_counter()
        view.copy_(tensor)
        copied = time.perf_counter()
        # The source itself is hashed where that is possible, so that a copy gone wrong is seen too.
        at_hand = tensor.device.type == "cpu" and tensor.is_contiguous()
        digest = content_digest(place, tensor if at_hand else view)
        delivery.manifest.entries.append(replace(place, digest=digest))
        delivery.sent[name] = view
        delivery.seconds["transfer"] += copied - started
        delivery.seconds["hash"] += time.perf_counter() - copied


class ShmSender(SegmentSender):
    """Engines on this machine map the segment itself."""

    def _offer(self, segment: Segment) -> dict[str, Any]:
        if self._renews:
            segment.unlink()
        return {"path": segment.path, "size": len(segment.bytes)}

    def _withdraw(self) -> None:
        """The segment is sealed when it is let go of."""
