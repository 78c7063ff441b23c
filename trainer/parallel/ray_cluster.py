"""`Places`: room on the nodes of a Ray cluster, or of a Ray that is started on this machine for a run."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.exceptions import ActorUnavailableError, NodeDiedError, ObjectLostError, RayActorError, RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import trainer
from trainer.errors import described
from trainer.parallel.config import RayConfig
from trainer.parallel.places import Place
from trainer.parallel.visible_gpus import visible

LOOPBACK = "127.0.0.1"

LOST = (RayActorError, NodeDiedError, ObjectLostError)
"""What Ray raises when an actor, its node, or an answer on it is gone."""

OBJECT_STORE_BYTES = 100 << 20
"""Ray's shared memory on each node that we start. Rounds pass through it; weights never do."""

LIKE_LOCAL = {"worker_niceness": 0, "memory_monitor_refresh_ms": 0}
"""A Ray of our own treats actors as processes of this one: Ray would run them at nice 15, where any neighbour
starves them, and kill them when memory runs low, which is left to the kernel."""


class Places:
    """Places for a run's actors, taken all at once in one placement group."""

    def __init__(self, config: RayConfig, places: Sequence[Place], own_gpus: Sequence[int] = ()) -> None:
        """Connect to Ray (or start it) and take `places`.

        `own_gpus`: those of this machine that a Ray started here may give away. Raises ValueError when no
        cluster answers or it has no room.
        """
        self._places = places
        self._closed = False
        self._group: Any = None
        self._connected = _connect(config, cpus=sum(place.cpus for place in places), gpus=own_gpus)
        try:
            self._group = self._reserve(config)
        except BaseException:
            self.close()
            raise

    def actor(self, index: int, kind: type, *, concurrent: int = 1, **variables: str) -> Any:
        """Handle of a new actor of class `kind` in place `index`, with `variables` in its environment."""
        root = str(Path(trainer.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        place = self._places[index]
        actor: Any = ray.remote(kind).options(
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            max_concurrency=concurrent,
            max_restarts=0,  # what it holds is lost with it: whoever can give it that again starts another
            runtime_env={"env_vars": {"PYTHONPATH": path, **variables}},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
        )
        return actor.remote()

    def node(self, index: int) -> str:
        """Address of the node of a place."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return addresses.get(self.node_id(index), "unknown")

    def node_id(self, index: int) -> str:
        """Ray's name for the node of a place."""
        return str(placement_group_table(self._group)["bundles_to_node_id"][index])

    def close(self) -> None:
        """Give the places back and leave the cluster, which ends if it was started here; safe to repeat."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RayError):
            if self._group is not None:
                remove_placement_group(self._group)
        if self._connected:
            ray.shutdown()

    def _reserve(self, config: RayConfig) -> Any:
        bundles = [place.bundle() for place in self._places]
        group = placement_group(bundles, strategy=config.strategy.value)
        if group.wait(config.wait_s):
            return group
        remove_placement_group(group)
        raise ValueError(
            f"the Ray cluster had no room for {_counted(self._places)} within rollout.ray.wait_s="
            f"{config.wait_s:g} ({_listed(ray.available_resources())} are free, strategy {config.strategy}): "
            "add nodes, or start fewer or smaller ones."
        )


def machine_identity() -> str:
    """Equal in two processes where one can open the other's memory: same boot, process numbers and user."""
    if platform.system() != "Linux":
        return platform.node()
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"


def reachable_address(machines: Sequence[str]) -> str:
    """The address at which actors on these machines (`machine_identity`) reach this process."""
    here = all(machine == machine_identity() for machine in machines)
    return LOOPBACK if here else str(ray.util.get_node_ip_address())


def why_lost(error: RayError) -> str:
    """Why an actor is gone, in a few of Ray's many words."""
    if isinstance(error, ActorUnavailableError):
        return "the connection to it broke"
    said = re.search(r"The actor is dead because (.+?)\.\s", f"{error} ")
    return said[1] if said else str(error).partition("\n")[0].rstrip(".")


def _connect(config: RayConfig, *, cpus: int, gpus: Sequence[int]) -> bool:
    """Join the cluster that `config` names or start one; False where this process is in one already."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _signals_kept():
        if config.cluster:
            _join(config.cluster, quiet)
        else:
            _start(cpus, gpus, quiet)
    return True


def _start(cpus: int, gpus: Sequence[int], quiet: dict[str, Any]) -> None:
    """A Ray of our own, which ends with this process, with just the CPUs that the places take."""
    before = _children()
    try:
        with visible(gpus):
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=len(gpus),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _system_config=LIKE_LOCAL,
                **quiet,
            )
    except Exception as error:  # Ray has no other type for it
        raise ValueError(
            f"no Ray could be started on this machine ({described(error)}): free some of its cores and "
            "memory, or name a cluster in rollout.ray.address."
        ) from error
    _give_all_cores(_children() - before)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _give_all_cores(processes: set[psutil.Process]) -> None:
    """Let processes, and what they start from now on, run on every core that this one may use.

    Intel's OpenMP, where a user has preloaded it, binds what its threads fork to the first core, and Ray
    hands that on: an engine of two threads took 1.7 times as long.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = os.sched_getaffinity(0)
    for process in processes:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores)


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


def _counted(places: Sequence[Place]) -> str:
    """`2 engines (each takes CPU 1) and 1 rank (each takes CPU 2)`."""
    kinds: dict[str, list[Place]] = {}
    for place in places:
        kinds.setdefault(place.what, []).append(place)
    return " and ".join(
        f"{len(found)} {what}{'s' * (len(found) > 1)} (each takes {_listed(found[0].bundle())})"
        for what, found in kinds.items()
    )


def _listed(resources: Mapping[str, float]) -> str:
    """`CPU 2, GPU 1`, without what Ray counts beside."""
    hidden = ("node:", "memory", "object_store_memory")
    shown = [f"{name} {amount:g}" for name, amount in resources.items() if not name.startswith(hidden)]
    return ", ".join(shown) or "none"
