"""Publishing across processes: to an engine in a child process, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rollout.child_engine import ChildEngine
from rollout.engine_spec import EngineSpec
from rollout.weights.config import Transport, WeightsConfig
from rollout.weights.errors import WeightTransferError
from rollout.weights.publisher import Publisher
from rollout.weights.shm import SegmentSender, ShmSender
from rollout.weights.tcp import TcpSender
from tests.rollout.weights.learners import PlainLearner, sequences

pytest.importorskip("vllm", reason="vLLM is not installed")

PROBE = sequences()


@pytest.fixture(scope="module")
def child(tiny_llama: Path) -> Iterator[ChildEngine]:
    """An engine that maps the learner's segment."""
    yield from started(tiny_llama, "shm")


@pytest.fixture(scope="module")
def remote(tiny_llama: Path) -> Iterator[ChildEngine]:
    """One that reads it over the network."""
    yield from started(tiny_llama, "tcp")


def started(tiny_llama: Path, transport: str) -> Iterator[ChildEngine]:
    spec = EngineSpec(
        model=str(tiny_llama),
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=16,
        kv_cache_bytes=32 << 20,
        threads=1,
        eager=True,
        transport=transport,
    )
    engine = ChildEngine(spec)
    yield engine
    engine.close()


@pytest.mark.parametrize("in_memory", [True, False])
def test_updates_arrive_and_damage_is_refused(
    child: ChildEngine, tiny_llama: Path, tmp_path: Path, in_memory: bool
) -> None:
    learner = PlainLearner(tiny_llama, torch.bfloat16)
    publisher = Publisher([child], WeightsConfig(), PROBE, frozen=(), folder=tmp_path)
    publisher._sender = sender = ShmSender([child], columns=32, folder=tmp_path, in_memory=in_memory)
    publisher.publish(learner.weights(), learner.score)
    assert sender.kind == ("memory" if in_memory else "file")
    publish_and_damage(publisher, sender, child, learner)
    assert list(tmp_path.iterdir()) == []


def test_the_same_over_the_network(remote: ChildEngine, tiny_llama: Path, tmp_path: Path) -> None:
    learner = PlainLearner(tiny_llama, torch.bfloat16)
    config = WeightsConfig(transport=Transport.tcp, skip_unchanged=True)
    publisher = Publisher([remote], config, PROBE, frozen=(), folder=tmp_path)
    sender = publisher._sender
    assert isinstance(sender, TcpSender)
    publish_and_damage(publisher, sender, remote, learner)
    publisher.publish(learner.weights(), learner.score)  # in a new segment, after one that was refused
    sender._withdraw()
    learner.update()
    version = remote.weight_version
    with pytest.raises(WeightTransferError, match=r"did not arrive from 127\.0\.0\.1:\d+ \(.*refused"):
        sender.install(sender.stage(learner.weights(), version + 1))
    assert remote.weight_version == version
    publisher.close()


def publish_and_damage(
    publisher: Publisher, sender: SegmentSender, child: ChildEngine, learner: PlainLearner
) -> None:
    """Three versions arrive, are read back and scored; a fourth is damaged and refused."""
    publisher.publish(learner.weights(), learner.score)
    tensors = len(learner.weights())
    for _ in range(2):
        before = child.score(PROBE)
        learner.update()
        report = publisher.publish(learner.weights(), learner.score)
        assert report.gap_mean < 1e-2
        assert report.read_back == tensors + 1  # the tied head too
        assert child.score(PROBE) != before
    before, version = child.score(PROBE), child.weight_version
    learner.update()  # what has not changed may not be sent at all
    delivery = sender.stage(learner.weights(), version + 1)
    name = "model.layers.0.mlp.down_proj.weight"
    delivery.sent[name].view(torch.uint8)[3, 3] ^= 128
    with pytest.raises(WeightTransferError, match=f"1 of {tensors} tensors is wrong: {name}"):
        sender.install(delivery)
    assert child.weight_version == version
    assert child.score(PROBE) == before
