"""`WeightsConfig`: how new weights reach the engines and how that is proven. Needs neither torch nor vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.03}
"""Largest mean gap between learner's and engine's log-probs on the probe, in nats.

Measured with SmolLM2-135M on a CPU without AMX, learner Hugging Face, 1 000 probe tokens. float32: 1e-5 when
right; the smallest fault (one middle layer of 30 left out of one update at learning rate 1e-5) 5e-4.
bfloat16: 0.06 to 0.08 when right, before and after an update; most swaps of two layers' tensors 0.2 to 7, but
an update itself moves log-probs no more than rounding does, so faults of that size are proven by reading
back, not by the gap. float16 was not measured: its rounding is an eighth of bfloat16's.
"""


class Transport(StrEnum):
    """How weights travel from the learner to an engine."""

    auto = "auto"
    """To engines on CPUs `shm` where all are on the learner's machine, else `tcp`; to one on a GPU `ipc`
    where the learner shares it, else `nccl`."""
    shm = "shm"
    """Shared memory, verified and read back; engines on CPUs of the learner's machine."""
    tcp = "tcp"
    """Over the network, verified and read back; engines on CPUs anywhere."""
    ipc = "ipc"
    """CUDA IPC handles; the learner's GPU is the engine's, each in a process of its own."""
    nccl = "nccl"
    """NCCL broadcast; the learner's GPU is not the engine's."""


@dataclass
class WeightsConfig:
    """Publishing weights to the engines."""

    transport: Transport = Transport.auto
    """`auto`, `shm`, `tcp`, `ipc` or `nccl`."""
    skip_unchanged: bool = False
    """Install only what changed since the last publish (`shm`, `tcp`, which sends no more either); pays when
    much of the model is frozen."""
    readback_columns: int = 32
    """Columns of each matrix that are read back out of the live engine after a publish (`shm`, `tcp`): a
    band that moves on with every version. 0 reads all; -1 reads nothing, and in bfloat16 a layer left out may
    then go unseen."""
    tolerance: float = 0.0
    """Largest mean |learner - engine| log-prob on the probe, in nats; beyond it the run stops. 0 takes what
    the coarser of the learner's and the engine's number formats allows: 1e-4 in float32, 0.2 in bfloat16,
    0.03 in float16."""

    def check(self) -> list[str]:
        """Sentences about values that cannot work, empty when all can."""
        problems = []
        if self.readback_columns < -1:
            problems.append(
                f"weights.readback_columns={self.readback_columns} must be at least -1: use 0 to read "
                "everything back, -1 to read nothing."
            )
        if self.tolerance < 0:
            problems.append(
                f"weights.tolerance={self.tolerance} must be at least 0: use 0 for the format's own."
            )
        return problems

    def resolve(
        self, *, on_gpu: bool = False, shares_gpu: bool = False, one_machine: bool = True
    ) -> Transport:
        """The transport to use for engines on a GPU or not, which the learner shares or not.

        `one_machine`: whether all can open this process's memory. Raises ValueError when `transport` names
        one that cannot serve them.
        """
        if on_gpu:
            fitting = Transport.ipc if shares_gpu else Transport.nccl
            where = "a GPU that the learner shares" if shares_gpu else "a GPU of their own"
        else:
            fitting = Transport.shm if one_machine else Transport.tcp
            where = "a CPU" if one_machine else "a CPU of another machine"
        if self.transport is Transport.tcp and not on_gpu:
            return Transport.tcp
        if self.transport not in (Transport.auto, fitting):
            raise ValueError(
                f"weights.transport={self.transport} cannot serve engines on {where}: use {fitting} or auto."
            )
        return fitting

    def limit(self, *dtypes: str) -> float:
        """`tolerance`, or what the coarsest of the number formats allows that log-probs are computed in."""
        return self.tolerance or max(TOLERANCES[dtype] for dtype in dtypes)
