"""Engines on a real Ray: the tokens of local ones, one sentence for what is lost, nothing left behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollout.config import EngineDtype, PoolKind, RolloutConfig
from rollout.engine import Engine, OwnProcess, Request, Sampling
from rollout.errors import EngineDied, EngineError
from rollout.host import EngineHost
from rollout.pool import Draw, LocalPool, build_engines, open_host
from rollout.types import Group, Prompt
from trainer.parallel.config import RayConfig

ray = pytest.importorskip("ray")

SAMPLING = Sampling(max_tokens=12, temperature=1.5, top_p=0.99, stop_token_ids=(2,))


def config(pool: PoolKind, dtype: EngineDtype, **changes: Any) -> RolloutConfig:
    """Two engines of one thread."""
    return RolloutConfig(
        pool=pool,
        engines=2,
        dtype=dtype,
        eager=True,
        threads=1,
        max_num_seqs=8,
        kv_cache_gib=0.0625,
        **changes,
    )


@pytest.fixture(scope="module")
def host() -> Iterator[EngineHost]:
    """A Ray of our own with places for two engines."""
    opened = open_host(config(PoolKind.ray, EngineDtype.float32))
    yield opened
    opened.close()
    assert not ray.is_initialized()


def draws(count: int) -> list[Draw]:
    return [
        Draw(
            prompt=Prompt(id=f"sums:{i}", token_ids=[10 + i, 11], text=str(i), answer=None, source="sums"),
            group_id=f"0/{i}",
            samples=4,
        )
        for i in range(count)
    ]


def build(dtype: EngineDtype, model: Path, host: EngineHost | None, log_folder: Path) -> list[Engine]:
    """Two engines on `host`, or without one in children of this process."""
    settings = config(PoolKind.ray if host else PoolKind.local, dtype)
    return build_engines(settings, model=str(model), length=64, host=host, log_folder=log_folder)


@pytest.fixture(scope="module")
def engines(host: EngineHost, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two float32 engines on Ray; the last test kills them."""
    built = build(EngineDtype.float32, tiny_llama, host, tmp_path_factory.mktemp("logs"))
    yield built
    for engine in built:
        engine.close()


def groups(engines: list[Engine]) -> list[Group]:
    """What six prompts become, twice."""
    pool = LocalPool(engines, run_seed=3)
    return [group for born in range(2) for group in pool.generate(draws(6), SAMPLING, born, decode=str)]


def assert_same_as_local(engines: list[Engine], dtype: EngineDtype, model: Path, folder: Path) -> None:
    """Bit for bit: tokens, log-probs, versions, seeds, order."""
    local = build(dtype, model, None, folder)
    expected = groups(local)
    for engine in local:
        engine.close()
    assert groups(engines) == expected
    assert len({tuple(t.response_ids) for group in expected for t in group.trajectories}) > 15


def test_ray_and_local_give_the_same_groups(engines: list[Engine], tiny_llama: Path, tmp_path: Path) -> None:
    assert_same_as_local(engines, EngineDtype.float32, tiny_llama, tmp_path)


def test_errors_stacks_and_calls_cross(engines: list[Engine]) -> None:
    engine = engines[0]
    with pytest.raises(ValueError, match="does not fit max_model_len=64") as caught:
        engine.generate([Request(prompt_ids=[1, 70], seed=0)], Sampling(max_tokens=1000))
    assert any("On node" in note for note in caught.value.__notes__)
    assert len(engine.score([[1, 70, 80]])[0]) == 2
    assert engine.memory()["peak"] > 1 << 20
    assert isinstance(engine, OwnProcess)
    assert "in serve" in engine.stacks()
    assert engine.label.startswith("engine process ")


def test_what_is_killed_is_one_sentence(engines: list[Any]) -> None:
    """First the engine's process, then Ray's worker that holds one."""
    first, second = engines
    child, orphan = process(first), process(second)
    worker = orphan.parent()
    assert worker is not None
    child.kill()
    with pytest.raises(EngineDied) as caught:
        first.generate([Request(prompt_ids=[1, 70], seed=0)], SAMPLING)
    assert re.fullmatch(
        rf"the engine's process {child.pid} ended by SIGKILL (while|before) generating, which .* "
        r"\(its log is /.*/engine-0\.log\) on node [\d.]+\.",
        str(caught.value),
    )
    worker.kill()
    with pytest.raises(EngineDied) as caught:
        second.generate([Request(prompt_ids=[1, 70], seed=0)], SAMPLING)
    assert re.fullmatch(
        r"engine 1, a Ray actor on node [\d.]+, was lost while generating: its worker process has died\.",
        str(caught.value),
    )
    assert gone(orphan), "the kernel kills the engine with its actor"
    for engine in engines:
        engine.close()
        engine.close()
    with pytest.raises(EngineError, match="closed"):
        first.memory()


def test_bfloat16_too_in_new_actors(host: EngineHost, tiny_llama: Path, tmp_path: Path) -> None:
    on_ray = build(EngineDtype.bfloat16, tiny_llama, host, tmp_path / "ray")
    assert_same_as_local(on_ray, EngineDtype.bfloat16, tiny_llama, tmp_path / "local")
    assert len(list((tmp_path / "ray").iterdir())) == 2
    for engine in on_ray:
        engine.close()


def process(engine: Any) -> psutil.Process:
    """The engine's own process."""
    return psutil.Process(int(engine.label.split()[2]))


def gone(process: psutil.Process) -> bool:
    """Whether it ends within ten seconds; a zombie has."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_an_engine_that_cannot_load_says_why(host: EngineHost, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        build_engines(config(PoolKind.ray, EngineDtype.float32), model=str(tmp_path), length=64, host=host)


def test_a_cluster_without_room_says_what_is_asked_and_what_is_free(host: EngineHost) -> None:
    crowded = config(PoolKind.ray, EngineDtype.float32, ray=RayConfig(wait_s=0.5))
    said = r"no room for 2 engines \(each takes CPU 1\) within rollout\.ray\.wait_s=0\.5 \(.* are free, "
    with pytest.raises(ValueError, match=said):
        open_host(crowded)
    placed = config(PoolKind.ray, EngineDtype.float32, ray=RayConfig(wait_s=0.5, places=["switch-a"]))
    with pytest.raises(ValueError, match=r"each takes CPU 1, switch-a 0\.001\)"):
        open_host(placed)


DRIVER = """
import sys, time
from rollout.config import PoolKind, RolloutConfig
from rollout.pool import build_engines
settings = RolloutConfig(pool=PoolKind.ray, eager=True, threads=1, max_num_seqs=8)
engines = build_engines(settings, model=sys.argv[1], length=64)
print(engines[0].label.split()[2], flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_engines_and_ray_die_with_a_killed_driver(tiny_llama: Path) -> None:
    """At once, but for two agents of Ray's, which try to reach its dead head for a minute."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tiny_llama)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    engine = psutil.Process(int(driver.stdout.readline()))
    family = psutil.Process(driver.pid).children(recursive=True)
    assert engine in family
    ours = [member for member in family if not member.name().startswith(("ray::Dashboard", "ray::Runtime"))]
    assert len(family) - 2 == len(ours) > 4
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    assert all(gone(member) for member in ours)


UNANSWERED = """
import os, signal
from rollout.config import PoolKind, RolloutConfig
from rollout.pool import open_host
from trainer.parallel.config import RayConfig
try:
    open_host(RolloutConfig(pool=PoolKind.ray, threads=1, ray=RayConfig(address="127.0.0.1:1")))
except ValueError as error:
    print(error)
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "CUDA_VISIBLE_DEVICES" in os.environ)
"""


def test_a_cluster_that_does_not_answer_is_named() -> None:
    """In a process of its own: this one may be in a cluster already."""
    command = [sys.executable, "-c", UNANSWERED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    said, after = done.stdout.splitlines()[-2:]
    assert said.startswith("rollout.ray.address=127.0.0.1:1: no Ray cluster answers"), done.stderr
    assert after == "True False"
