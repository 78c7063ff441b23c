"""`ipc` and `nccl`: vLLM's own senders driven through our engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.child_engine import ChildEngine
from rollout.engine_spec import EngineSpec
from rollout.weights.config import WeightsConfig
from rollout.weights.publisher import Publisher
from tests.rollout.weights.learners import PlainLearner, sequences

gpu = pytest.importorskip("rollout.weights.gpu", reason="vLLM is not installed")


class Recorder:
    """Notes what an engine is asked; no engine is needed to see who gets which rank."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init_transfer(self, info: dict[str, Any]) -> None:
        self.calls.append(("init", info))

    def receive_weights(self, info: dict[str, Any], version: int) -> dict[str, Any]:
        self.calls.append((f"receive {version}", info))
        return {}


def test_each_engine_gets_ranks_of_its_own() -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    engines = [Recorder(), Recorder()]
    client = gpu.EngineClient(engines, tensor_parallel=2)
    assert isinstance(gpu.EngineClient([], 1), VLLMWeightSyncClient)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 5})
    client.version = 7
    client.update_weights({"names": []})
    assert [engine.calls[0][1]["rank_offset"] for engine in engines] == [1, 3]
    assert [engine.calls[1][0] for engine in engines] == ["receive 7"] * 2


def test_metadata_and_stream_agree() -> None:
    source = gpu.StreamSource()
    source.stream = [("a", torch.ones(2, 3)), ("b", torch.ones(4, dtype=torch.bfloat16))]
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
        ("a", torch.float32, (2, 3)),
        ("b", torch.bfloat16, (4,)),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_an_update_arrives(tiny_llama: Path, transport: str) -> None:
    """`ipc` on one GPU; `nccl` needs a second one for the engine."""
    if transport == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    device = "cuda:1" if transport == "nccl" else "cuda:0"
    torch.cuda.set_device(device)
    spec = EngineSpec(
        model=str(tiny_llama),
        max_model_len=128,
        max_num_seqs=16,
        gpu_memory=0.2,
        eager=True,
        transport=transport,
    )
    engine = ChildEngine(spec)
    learner = PlainLearner(tiny_llama, torch.bfloat16, device)
    publisher = Publisher([engine], WeightsConfig(), sequences(), on_gpu=True, shares_gpu=transport == "ipc")
    try:
        publisher.publish(learner.weights(), learner.score)
        learner.update()
        assert publisher.publish(learner.weights(), learner.score).gap_mean < 0.05
    finally:
        publisher.close()
        engine.close()
