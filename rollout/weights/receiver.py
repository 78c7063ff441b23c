"""The engine's end of `shm` and `tcp`: vLLM weight-transfer engines for CPUs, in vLLM's workers.

One update: every tensor in the segment is checked against the model and hashed *before* the first is
installed, so a bad transfer leaves the old version in force; then all are installed; then the live model is
read back. What was measured and proven is left in `last_report` for whoever drives the engine.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rollout.layercast import stored_dtype
from rollout.weights.errors import WeightTransferError, listed
from rollout.weights.installer import Installer
from rollout.weights.manifest import Entry, Manifest, content_digest
from rollout.weights.segment import Memory, Segment
from rollout.weights.tcp import RemoteSegment


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Where the segment is."""

    path: str
    size: int


@dataclass
class TcpInitInfo(WeightTransferInitInfo):
    """Where the segment is served, see `SegmentServer.info`."""

    address: str
    port: int
    token: bytes
    size: int


@dataclass
class SegmentUpdateInfo(WeightTransferUpdateInfo):
    """One version, waiting in the segment."""

    manifest: Manifest
    skip_unchanged: bool = False


class SegmentReceiver(WeightTransferEngine[Any, SegmentUpdateInfo]):
    """Verifies, installs and reads back what a `rollout.weights.shm.SegmentSender` wrote."""

    update_info_cls = SegmentUpdateInfo
    supports_draft_weight_update = False
    transport = ""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.last_report: dict[str, Any] = {}
        self._segment: Memory | None = None
        self._installer: Installer | None = None
        self._installed: dict[str, str] = {}

    def init_transfer_engine(self, init_info: Any) -> None:
        """Open the learner's segment. Raises ValueError for a model that cannot be published into."""
        if self.parallel_config.world_size > 1:
            raise ValueError(
                f"weights.transport={self.transport} serves engines of one process, this one has "
                f"{self.parallel_config.world_size}: set rollout.tensor_parallel=1."
            )
        if self._installer is None:
            self._installer = Installer(self.model, stored_dtype(self.model_config))
        self._segment = self._open(init_info)

    def start_weight_update(self) -> None:
        """Nothing is touched before `receive_weights` has verified everything."""
        self.last_report = {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Verify and install one version; see `receive_weights`."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SegmentUpdateInfo) -> None:
        """Verify, install, read back. Raises WeightTransferError, with names, before anything is touched."""
        if self._segment is None or self._installer is None:
            raise WeightTransferError("Weights arrived before init_transfer opened the channel.")
        manifest = update_info.manifest
        unchanged = self._unchanged(manifest) if update_info.skip_unchanged else frozenset()
        self._refuse_misfits(self._installer, manifest)
        begun = time.perf_counter()
        self._bring(self._segment, [entry for entry in manifest.entries if entry.name not in unchanged])
        started = time.perf_counter()
        tensors = self._verify(self._segment, manifest)
        verified = time.perf_counter()
        self._installed = {}
        self._installer.install(tensors, unchanged)
        self._installed = {entry.name: entry.digest for entry in manifest.entries}
        installed = time.perf_counter()
        proofs = self._installer.read_back(tensors, manifest) if manifest.columns >= 0 else []
        self.last_report = {
            "version": manifest.version,
            "proofs": [asdict(proof) for proof in proofs],
            "transfer_seconds": started - begun,
            "hash_seconds": verified - started,
            "install_seconds": installed - verified,
            "readback_seconds": time.perf_counter() - installed,
        }

    def finish_weight_update(self) -> None:
        """Nothing is left to do: `receive_weights` installed whole modules."""

    def shutdown(self) -> None:
        """Let go of the segment."""
        self._segment = None

    @abstractmethod
    def _open(self, init_info: Any) -> Memory:
        """The segment that `init_info` describes."""

    @abstractmethod
    def _bring(self, segment: Any, entries: list[Entry]) -> None:
        """Have these tensors in the segment's memory."""

    def _refuse_misfits(self, installer: Installer, manifest: Manifest) -> None:
        problems = installer.problems(manifest)
        if problems:
            raise WeightTransferError(
                f"Version {manifest.version} does not fit the engine's model and was refused: "
                f"{listed(problems)}."
            )

    def _verify(self, segment: Memory, manifest: Manifest) -> dict[str, Tensor]:
        """The transferred tensors by name, views of the segment, all of them as the learner hashed them."""
        tensors = {e.name: segment.view(e.offset, e.shape, e.torch_dtype) for e in manifest.entries}
        bad = [
            entry.name
            for entry in manifest.entries
            if content_digest(entry, tensors[entry.name]) != entry.digest
        ]
        if bad:
            raise WeightTransferError(
                f"Version {manifest.version} was damaged on its way and refused, the old weights stay: the "
                f"hash of {len(bad)} of {len(manifest.entries)} tensors is wrong: {listed(bad)}."
            )
        return tensors

    def _unchanged(self, manifest: Manifest) -> frozenset[str]:
        return frozenset(e.name for e in manifest.entries if self._installed.get(e.name) == e.digest)


class ShmReceiver(SegmentReceiver):
    """Maps the learner's segment: nothing is transferred."""

    init_info_cls = ShmInitInfo
    transport = "shm"

    def _open(self, init_info: ShmInitInfo) -> Memory:
        return Segment.open(init_info.path, init_info.size)

    def _bring(self, segment: Memory, entries: list[Entry]) -> None:
        """They are there: the learner wrote them."""


class TcpReceiver(SegmentReceiver):
    """Reads what changed into memory of its own, which stays for the next version."""

    init_info_cls = TcpInitInfo
    transport = "tcp"

    def _open(self, init_info: TcpInitInfo) -> Memory:
        return RemoteSegment(init_info.address, init_info.port, init_info.token, init_info.size)

    def _bring(self, segment: RemoteSegment, entries: list[Entry]) -> None:
        segment.fetch(entries)
