"""`RayHost`: engines on the nodes of a Ray cluster, or of a Ray that is started on this machine for a run."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import rollout
from rollout.child_engine import VISIBLE_GPUS, gpu_names
from rollout.config import RayConfig
from rollout.engine_spec import EngineSpec
from rollout.errors import EngineDied, EngineError
from rollout.host import LOOPBACK
from rollout.ray_engine import CONCURRENT, LOST, EngineActor, RayEngine, machine_identity
from rollout.weights.config import Transport

OBJECT_STORE_BYTES = 100 << 20
"""Ray's shared memory on each node that we start. Rounds pass through it; weights never do."""

LIKE_LOCAL = {"worker_niceness": 0, "memory_monitor_refresh_ms": 0}
"""A Ray of our own treats engines as a local pool does: Ray would run them at nice 15, where any neighbour
starves them, and kill them when memory runs low, which is left to the kernel."""

TOUCH = 0.001
"""How much an engine takes of a custom resource that only says where to go."""


class RayHost:
    """One reserved place an engine, and an actor in each that waits for its model."""

    def __init__(
        self, config: RayConfig, *, engines: int, threads: int, gpus: int = 0, own_gpus: Sequence[int] = ()
    ) -> None:
        """Connect to Ray (or start it) and take the places.

        Args:
            config: which cluster, and where in it.
            engines: how many; each takes `threads` CPUs and `gpus` GPUs of its node.
            own_gpus: those of this machine that a Ray started here may give to engines.

        Raises ValueError when no cluster answers or it has no room.
        """
        self._config = config
        self._threads = threads
        self._gpus = gpus
        self._closed = False
        self._group: Any = None
        self._connected = _connect(config, cpus=engines * threads, gpus=own_gpus)
        try:
            self._group = self._reserve(engines)
            self._actors = {index: self._actor(index) for index in range(engines)}
            machines = ray.get([actor.machine.remote() for actor in self._actors.values()])
        except BaseException:
            self.close()
            raise
        self.one_machine = all(machine == machine_identity() for machine in machines)
        """Whether every engine can open this process's memory."""
        self.address = LOOPBACK if self.one_machine else ray.util.get_node_ip_address()
        """The address at which engines reach this process."""

    def start(self, index: int, spec: EngineSpec) -> RayEngine:
        """Have the actor of engine `index` load its model, a new actor when that one is gone."""
        actor = self._actors.pop(index, None) or self._successor(index, spec)
        node = self._nodes()[index]
        return RayEngine(actor, self._anywhere(spec), index=index, node=node)

    def close(self) -> None:
        """Give the places back and leave the cluster, which ends if it was started here."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RayError):
            if self._group is not None:
                remove_placement_group(self._group)
        if self._connected:
            ray.shutdown()

    def _anywhere(self, spec: EngineSpec) -> EngineSpec:
        """`spec` without what depends on the process that reads it: working folder, usable cores."""
        return replace(
            spec,
            threads=self._threads,
            model=_absolute(spec.model),
            tokenizer=_absolute(spec.tokenizer),
            log_path=_absolute(spec.log_path),
        )

    def _reserve(self, engines: int) -> Any:
        bundles = [self._bundle(index) for index in range(engines)]
        group = placement_group(bundles, strategy=self._config.strategy.value)
        if not group.wait(self._config.wait_s):
            remove_placement_group(group)
            raise ValueError(
                f"rollout.pool=ray: the cluster had no room for {engines} engines within "
                f"rollout.ray.wait_s={self._config.wait_s:g} (each takes {_listed(bundles[0])}; "
                f"{_listed(ray.available_resources())} are free, strategy {self._config.strategy}): add "
                "nodes, or lower rollout.engines or rollout.threads."
            )
        return group

    def _bundle(self, index: int) -> dict[str, float]:
        """What the place of one engine takes of its node."""
        bundle = {"CPU": float(self._threads)}
        if self._gpus:
            bundle["GPU"] = float(self._gpus)
        if self._config.places:
            bundle[self._config.places[index % len(self._config.places)]] = TOUCH
        return bundle

    def _actor(self, index: int) -> Any:
        root = str(Path(rollout.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        actor: Any = ray.remote(EngineActor).options(
            num_cpus=self._threads,
            num_gpus=self._gpus,
            max_concurrency=CONCURRENT,
            max_restarts=0,  # a new engine needs the weights of now: whoever holds them starts it
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
        )
        return actor.remote()

    def _successor(self, index: int, spec: EngineSpec) -> Any:
        """A new actor in the same place, which Ray may move to another node.

        Until Ray has noticed that a node is gone, it gives the place on that node again: hence the loop.
        """
        limit = time.monotonic() + self._config.wait_s
        while (left := limit - time.monotonic()) > 0:
            actor = self._actor(index)
            try:
                machine = ray.get(actor.machine.remote(), timeout=left)
            except GetTimeoutError:
                ray.kill(actor)
            except LOST:
                continue
            else:
                self._refuse_stranger(index, spec, machine)
                return actor
        raise EngineDied(
            f"no node of the Ray cluster had room for engine {index} again within "
            f"rollout.ray.wait_s={self._config.wait_s:g}: add a node."
        )

    def _refuse_stranger(self, index: int, spec: EngineSpec, machine: str) -> None:
        """Raise EngineError for an engine that came back where its transport does not reach."""
        if spec.transport == Transport.shm and machine != machine_identity():
            raise EngineError(
                f"engine {index} came back on a node that cannot open the learner's memory: set "
                "weights.transport=tcp."
            )

    def _nodes(self) -> list[str]:
        """Address of the node of each place."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        places: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return [addresses.get(places[index], "unknown") for index in sorted(places)]


def _connect(config: RayConfig, *, cpus: int, gpus: Sequence[int]) -> bool:
    """Join the cluster that `config` names or start one; False where this process is in one already."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    with _signals_kept():
        if address in ("", "local"):
            _start(cpus, gpus, quiet)
        else:
            _join(address, quiet)
    return True


def _start(cpus: int, gpus: Sequence[int], quiet: dict[str, Any]) -> None:
    """A Ray of our own, which ends with this process, with just the CPUs that the engines take."""
    with _visible(gpus):
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=len(gpus),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _system_config=LIKE_LOCAL,
            **quiet,
        )


def _join(address: str, quiet: dict[str, Any]) -> None:
    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdigit():  # Ray itself would try for half a minute
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        # `ray start --head` does the same: a cluster asks for a token where its head has one.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError) as error:  # Ray's ConnectionError is an OSError
        raise ValueError(
            f"rollout.ray.address={address}: no Ray cluster answers there ({str(error).partition('.')[0]}): "
            "start one ('ray start --head') and have its token here (~/.ray/auth_token), or leave "
            "rollout.ray.address empty for one on this machine."
        ) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the handler of SIGTERM, which Ray replaces by one of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _visible(gpus: Sequence[int]) -> Iterator[None]:
    """Show only these of this process's GPUs to processes that start meanwhile."""
    before = os.environ.get(VISIBLE_GPUS)
    if gpus:
        os.environ[VISIBLE_GPUS] = gpu_names(gpus)
    try:
        yield
    finally:
        if before is not None:
            os.environ[VISIBLE_GPUS] = before
        else:
            os.environ.pop(VISIBLE_GPUS, None)


def _absolute(path: str) -> str:
    """The path from the root; empty stays empty."""
    return str(Path(path).absolute()) if path else ""


def _listed(resources: dict[str, float]) -> str:
    """`CPU 2, GPU 1`, without what Ray counts beside."""
    hidden = ("node:", "memory", "object_store_memory")
    shown = [f"{name} {amount:g}" for name, amount in resources.items() if not name.startswith(hidden)]
    return ", ".join(shown) or "none"
