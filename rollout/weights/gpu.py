"""The learner's end of the `ipc` and `nccl` transports: vLLM's own senders, driven through our engines.

vLLM's receivers neither hash nor report, so what is proven is the probe. `ipc` needs engine and learner on
one GPU in two processes (CUDA refuses to open a handle in the process that made it); `nccl` needs them on
different GPUs.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo
from vllm.distributed.weight_transfer.base import WeightSource as VllmWeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rollout.engine import Engine
from rollout.weights.config import Transport
from rollout.weights.delivery import Delivery, WeightSource, on_each
from rollout.weights.manifest import Manifest, lay_out


class GpuSender:
    """Sends weights from this GPU to engines on the same one (`ipc`) or on others (`nccl`)."""

    verifies = False

    def __init__(
        self,
        engines: Sequence[Engine],
        transport: Transport,
        *,
        tensor_parallel: int = 1,
        address: str = "127.0.0.1",
    ) -> None:
        """`address`: that of this machine at which the engines reach it."""
        self._address = address
        self._client = EngineClient(engines, tensor_parallel)
        self._source = StreamSource()
        self._transport = transport
        self._world = 1 + len(engines) * tensor_parallel
        self._trainer: Any = None

    def stage(self, source: WeightSource, version: int) -> Delivery:
        """Note what is to be sent."""
        self._source.stream = source if iter(source) is not source else list(source)
        tensors = ((meta.name, meta.shape, meta.dtype) for meta in self._source.metadata())
        entries = list(lay_out(tensors)[0].values())
        return Delivery(manifest=Manifest(version=version, seed=0, columns=-1, entries=entries))

    def install(self, delivery: Delivery) -> list[dict[str, Any]]:
        """Send and install; the first call opens the channel."""
        self._client.version = delivery.version
        if self._trainer is None:
            self._trainer = WeightTransferTrainerFactory.trainer_init(
                self._init_info(), client=self._client, source=self._source
            )
        self._trainer.send_weights()
        return self._client.reports

    def close(self) -> None:
        """Close the channel."""
        if self._trainer is not None:
            self._trainer.shutdown()
            self._trainer = None

    def _init_info(self) -> TrainerInitInfo:
        if self._transport is Transport.ipc:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=0)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(self._address, _free_port(self._address), self._world, rank=0)


class EngineClient:
    """vLLM's `VLLMWeightSyncClient` over our engines, whose `receive_weights` runs a whole update at once."""

    def __init__(self, engines: Sequence[Engine], tensor_parallel: int) -> None:
        self._engines = engines
        self._ranks = {id(engine): 1 + i * tensor_parallel for i, engine in enumerate(engines)}
        self.version = 0
        self.reports: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the channel in every engine; each gets ranks of its own in an NCCL group."""
        on_each(self._engines, lambda engine: engine.init_transfer(self._ranked(engine, init_info)))

    def start_weight_update(self) -> None:
        """Part of `update_weights`."""

    def update_weights(self, update_info: Any) -> None:
        """Receive and install in every engine."""
        self.reports = on_each(
            self._engines, lambda engine: engine.receive_weights(update_info, self.version)
        )

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Part of `update_weights`."""

    def _ranked(self, engine: Engine, init_info: dict[str, Any]) -> dict[str, Any]:
        return (
            init_info | {"rank_offset": self._ranks[id(engine)]} if "rank_offset" in init_info else init_info
        )


class StreamSource(VllmWeightSource):
    """vLLM's re-iterable source over the learner's stream, which changes with every publish."""

    def __init__(self) -> None:
        self.stream: WeightSource = ()

    def metadata(self) -> list[ParamMeta]:
        """Names, formats and shapes."""
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.stream]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.stream:
            yield name, tensor.detach().to(torch.accelerator.current_accelerator())


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
