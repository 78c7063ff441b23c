"""Two real Ray nodes: engines placed on both, weights over the network, a node lost and made good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.cli import main
from rlhf.tracking.jsonl import read
from rollout.config import EngineDtype, PoolKind, RolloutConfig
from rollout.engine import Engine, Sampling
from rollout.host import EngineHost
from rollout.pool import Draw, LocalPool, build_engines, open_host
from rollout.restarts import RestartingEngine
from rollout.types import Group, Prompt
from rollout.weights.config import Transport, WeightsConfig
from rollout.weights.publisher import Publisher
from rollout.weights.tcp import TcpSender
from tests.benchmarks import accounts
from tests.rollout.ray_nodes import Cluster
from tests.rollout.weights.learners import PlainLearner, sequences
from trainer.parallel.config import RayConfig, RayStrategy

ray = pytest.importorskip("ray")
RayEngine = pytest.importorskip("rollout.ray_engine").RayEngine

SAMPLING = Sampling(max_tokens=12, temperature=1.5, stop_token_ids=(2,))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The head has room for one engine more than it gets at first."""
    with Cluster(head_cpus=2, worker_cpus=1) as started:
        yield started


def config(**changes: Any) -> RolloutConfig:
    return RolloutConfig(
        engines=2,
        dtype=EngineDtype.float32,
        eager=True,
        threads=1,
        max_num_seqs=8,
        kv_cache_gib=0.0625,
        **changes,
    )


def draws() -> list[Draw]:
    return [
        Draw(
            prompt=Prompt(id=f"sums:{i}", token_ids=[10 + i, 11], text=str(i), answer=None, source="sums"),
            group_id=f"0/{i}",
            samples=4,
        )
        for i in range(6)
    ]


class Trained:
    """Engines that have been given three versions, and their pool."""

    def __init__(
        self, settings: RolloutConfig, transport: Transport, model: Path, host: EngineHost | None
    ) -> None:
        self.engines: list[Engine] = build_engines(
            settings, model=str(model), length=64, host=host, transport=transport.value
        )
        learner = PlainLearner(model, torch.float32)
        options: dict[str, Any] = {"address": host.address} if host else {}
        self.publisher = Publisher(
            self.engines, WeightsConfig(transport=transport), sequences(length=40), frozen=(), **options
        )
        for _ in range(3):
            self.report = self.publisher.publish(learner.weights(), learner.score)
            learner.update(rate=1e-3)

    def groups(self) -> list[Group]:
        """What six prompts become under version 3."""
        return LocalPool(self.engines, run_seed=3).generate(draws(), SAMPLING, born=3, decode=str)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self.publisher.close()


def test_a_run_goes_on_when_a_worker_node_dies(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second step's generation. The ledger knows what was generated again, and nothing is missing."""
    result = RayEngine._result

    def killing_result(engine: Any, answer: Any, doing: str) -> Any:
        if (doing, engine.weight_version) == ("generating", 2):
            cluster.kill("worker")
        return result(engine, answer, doing)

    monkeypatch.setattr(RayEngine, "_result", killing_result)
    folder = tmp_path / "run"
    ray_pool = ["rollout.pool=ray", f"rollout.ray.address={cluster.address}", "rollout.ray.strategy=SPREAD"]
    engines = ["rollout.process=child", "rollout.engines=2", "rollout.threads=1", "rollout.restarts=1"]
    unevaluated = ["evaluation.every=0", "evaluation.at_start=false", "evaluation.at_end=false"]
    settings = [*ray_pool, *engines, *unevaluated, "loop.steps=3", f"run.dir={folder}"]
    assert main(["train", "dapo/tiny", *settings]) == 0
    assert [row["rollout/engine_restarts"] for row in read(folder / "metrics.jsonl")] == [0, 0, 1, 1]
    found = accounts.read(folder)
    assert (found.problems, found.steps, found.begins) == ([], 3, 1)
    assert 0 < found.samples["again"] < found.samples["drawn"]
    cluster.start_worker()


def test_engines_on_two_nodes_then_on_one(cluster: Cluster, tiny_llama: Path) -> None:
    """Tokens, log-probs and versions are those of local engines, also after a node was killed."""
    local = Trained(config(), Transport.shm, tiny_llama, None)
    expected = local.groups()
    local.close()
    where = RayConfig(address=cluster.address, strategy=RayStrategy.SPREAD, wait_s=120)
    host = open_host(config(pool=PoolKind.ray, ray=where))
    try:
        assert host.one_machine, "two nodes, but one machine: shared memory would do"
        assert len(set(nodes(host))) == 2
        settings = config(pool=PoolKind.ray, ray=where, restarts=2)
        trained = Trained(settings, Transport.tcp, tiny_llama, host)
        assert isinstance(trained.publisher._sender, TcpSender)
        assert trained.report.read_back > 20
        assert trained.report.gap_mean < 1e-4
        assert trained.groups() == expected
        cluster.kill("worker")
        assert trained.groups() == expected
        first = trained.engines[0]
        assert isinstance(first, RestartingEngine)
        assert first.restarts.count == 1
        assert [engine.weight_version for engine in trained.engines] == [3, 3]
        trained.close()
    finally:
        host.close()


def nodes(host: Any) -> list[str]:
    """The id of the node of each engine."""
    return [host.node_id(index) for index in range(2)]


def test_places_say_where_engines_go(cluster: Cluster) -> None:
    """Both where `here` is; `there` was killed by the test before."""
    here = RayConfig(address=cluster.address, places=["here"], wait_s=30)
    host = open_host(config(pool=PoolKind.ray, ray=here))
    assert len(set(nodes(host))) == 1
    host.close()
    there = RayConfig(address=cluster.address, places=["there"], wait_s=1)
    with pytest.raises(
        ValueError,
        match=r"no room for 2 engines \(each takes CPU 1, there 0\.001\) within rollout\.ray\.wait_s=1 ",
    ):
        open_host(config(pool=PoolKind.ray, ray=there))
    assert not ray.is_initialized()
