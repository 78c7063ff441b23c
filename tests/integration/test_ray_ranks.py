"""`rlhf train` alone, its other rank in a real Ray: it learns what torchrun's do, and its loss is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.checkpoint import Checkpoints
from rlhf.tracking.jsonl import read
from tests.integration.commands import ALONE, finish, sentences, start, wait_for_rows
from tests.rollout.ray_nodes import Cluster

pytest.importorskip("ray")

TRAIN = ["train", "dapo/tiny", "run.dir=run", "rollout.process=child", "evaluation.every=0"]
ON_RAY = ["learner.parallel.launcher=ray", "learner.parallel.shard=2", "rollout.pool=ray"]
STEPS = 2


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that torchrun started, with a local engine."""
    folder = tmp_path_factory.mktemp("torchrun")
    finish(start(folder, *TRAIN, f"loop.steps={STEPS}"))
    return folder / "run"


def learned(run: Path) -> list[dict[str, Any]]:
    """What each of the first steps made of the learner."""
    rows = read(run / "metrics.jsonl")[: STEPS + 1]
    wanted = ("learner/", "train/", "reward/", "weights/probe_gap")
    found = [{key: row[key] for key in row if key.startswith(wanted)} for row in rows]
    assert len(found[STEPS]) > 20
    return found


def test_ranks_and_engine_on_ray_learn_what_torchrun_s_learn(by_torchrun: Path, tmp_path: Path) -> None:
    """Bit for bit: metrics and weights. Nothing of Ray is left."""
    finish(start(tmp_path, *TRAIN, *ON_RAY, f"loop.steps={STEPS}", launcher=ALONE))
    assert learned(tmp_path / "run") == learned(by_torchrun)
    weights = [
        (Checkpoints(run).path(STEPS) / "model.safetensors").read_bytes()
        for run in (tmp_path / "run", by_torchrun)
    ]
    assert weights[0] == weights[1]


def test_a_rank_lost_on_another_node_ends_the_run_in_one_sentence(by_torchrun: Path, tmp_path: Path) -> None:
    """Engine on the one node, rank 1 on the other, which learns as torchrun's until it is killed."""
    with Cluster(head_cpus=1, worker_cpus=1) as cluster:
        where = [
            f"rollout.ray.address={cluster.address}",
            "rollout.ray.places=[here]",
            "learner.parallel.places=[there]",
        ]
        process = start(tmp_path, *TRAIN, *ON_RAY, *where, "loop.steps=500", launcher=ALONE)
        wait_for_rows(process, tmp_path, STEPS + 1)
        engines = workers(cluster, "head", "EngineActor")
        (rank,) = workers(cluster, "worker", "RankActor")
        engines += engines[0].children()
        rank.kill()
        said = finish(process, succeeds=False)
        _, alive = psutil.wait_procs(engines, timeout=20)
    assert process.returncode == 1
    (sentence,) = sentences(said)
    assert sentence.startswith("rlhf: the run stopped in step "), said
    assert re.search(
        r": rank 1 of the learner, a Ray actor on node [\d.]+, was lost: its worker process", sentence
    )
    assert sentence.endswith("resume=auto goes on from the beginning, nothing is saved yet."), said
    assert (alive, len(engines)) == ([], 2)
    assert learned(tmp_path / "run") == learned(by_torchrun)


def workers(cluster: Cluster, node: str, actor: str) -> list[psutil.Process]:
    """The processes on a node that hold an actor of this class."""
    found = psutil.Process(cluster.pid(node)).children(recursive=True)
    return [process for process in found if "".join(process.cmdline()).startswith(f"ray::{actor}")]


MEETING = """
import os, sys, time
import torch
from trainer.parallel.config import ParallelConfig, RayConfig
from trainer.parallel.mesh import Team
from trainer.parallel.places import Place
from trainer.parallel.ray_cluster import Places
from trainer.parallel.ray_ranks import RayRanks
from trainer.parallel.world import World

def die():
    os._exit(1)

places = Places(RayConfig(), [Place(what="learner rank", cpus=1)])
ranks = RayRanks(places, [0], die, threads=1)
try:
    with ranks.as_rank_0(local_size=2):
        Team(World.from_environment(), ParallelConfig(), torch.device("cpu"), ranks.lost)
except RuntimeError as error:
    print(type(error).__name__, ranks.lost(), flush=True)
ranks.close()
assert "RANK" not in os.environ
RayRanks(places, [0], die, threads=1, noticed=False)
time.sleep(600)
"""


def test_a_rank_lost_before_all_have_met_and_one_that_nobody_would_notice() -> None:
    """The first ends rank 0's waiting for it; the second, as between GPUs, ends the process."""
    done = subprocess.run(
        [sys.executable, "-c", MEETING], capture_output=True, text=True, timeout=200, check=False
    )
    said = f"{done.stdout}\n{done.stderr}".splitlines()  # Ray speaks in between
    (first,) = (line for line in said if line.startswith("Dist"))
    (last,) = (line for line in said if line.startswith("rlhf: "))
    lost = r"rank 1 of the learner, a Ray actor on node [\d.]+, was lost: .+\."
    assert re.fullmatch(rf"Dist\w+Error {lost}", first), said
    assert re.fullmatch(rf"rlhf: the run stopped: {lost}", last), said
    assert done.returncode == 1


BOUND = """
import os
import ray, torch
from trainer.parallel.config import RayConfig
from trainer.parallel.places import Place
from trainer.parallel.ray_cluster import Places

class Actor:
    def cores(self):
        return os.sched_getaffinity(0)

torch.ones(500, 500) @ torch.ones(500, 500)  # OpenMP starts
places = Places(RayConfig(), [Place(what="engine", cpus=1)])
assert ray.get(places.actor(0, Actor).cores.remote()) == os.sched_getaffinity(0)
places.close()
"""


def test_actors_may_use_all_cores_where_openmp_of_intel_is_preloaded() -> None:
    """It would bind them to the first one."""
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not openmp.exists() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("no OpenMP of Intel, or one core")
    environment = {**os.environ, "LD_PRELOAD": str(openmp), "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", BOUND], env=environment, check=True, timeout=200)
