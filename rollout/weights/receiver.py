"""The engine's end of the `shm` transport: a vLLM weight-transfer engine for CPUs, in vLLM's workers.

One update: every tensor in the shared segment is checked against the model and hashed *before* the first is
installed, so a bad transfer leaves the old version in force; then all are installed; then the live model is
read back. What was measured and proven is left in `last_report` for whoever drives the engine.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rollout.weights.errors import WeightTransferError, listed
from rollout.weights.installer import Installer
from rollout.weights.manifest import Manifest, content_digest
from rollout.weights.segment import Segment


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Where the segment is."""

    path: str
    size: int


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One version, waiting in the segment."""

    manifest: Manifest
    skip_unchanged: bool = False


class ShmReceiver(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Verifies, installs and reads back what a `rollout.weights.shm.ShmSender` wrote."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.last_report: dict[str, Any] = {}
        self._segment: Segment | None = None
        self._installer: Installer | None = None
        self._installed: dict[str, str] = {}

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Map the learner's segment. Raises ValueError for a model that cannot be published into."""
        if self.parallel_config.world_size > 1:
            raise ValueError(
                f"weights.transport=shm serves engines of one process, this one has "
                f"{self.parallel_config.world_size}: set rollout.tensor_parallel=1."
            )
        if self._installer is None:
            self._installer = Installer(self.model, cast(torch.dtype, self.model_config.dtype))
        self._segment = Segment.open(init_info.path, init_info.size)

    def start_weight_update(self) -> None:
        """Nothing is touched before `receive_weights` has verified everything."""
        self.last_report = {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Verify and install one version; see `receive_weights`."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Verify, install, read back. Raises WeightTransferError, with names, before anything is touched."""
        if self._segment is None or self._installer is None:
            raise WeightTransferError("Weights arrived before init_transfer opened the channel.")
        manifest = update_info.manifest
        started = time.perf_counter()
        tensors = self._verify(self._segment, self._installer, manifest)
        verified = time.perf_counter()
        unchanged = self._unchanged(manifest) if update_info.skip_unchanged else frozenset()
        self._installed = {}
        self._installer.install(tensors, unchanged)
        self._installed = {entry.name: entry.digest for entry in manifest.entries}
        installed = time.perf_counter()
        proofs = self._installer.read_back(tensors, manifest) if manifest.columns >= 0 else []
        self.last_report = {
            "version": manifest.version,
            "proofs": [asdict(proof) for proof in proofs],
            "hash_seconds": verified - started,
            "install_seconds": installed - verified,
            "readback_seconds": time.perf_counter() - installed,
        }

    def finish_weight_update(self) -> None:
        """Nothing is left to do: `receive_weights` installed whole modules."""

    def shutdown(self) -> None:
        """Let go of the segment."""
        self._segment = None

    def _verify(self, segment: Segment, installer: Installer, manifest: Manifest) -> dict[str, Tensor]:
        """The transferred tensors by name, views of the segment, all of them as the learner hashed them."""
        problems = installer.problems(manifest)
        if problems:
            raise WeightTransferError(
                f"Version {manifest.version} does not fit the engine's model and was refused: "
                f"{listed(problems)}."
            )
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
