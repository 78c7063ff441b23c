"""`RayHost`: engines on the nodes of a Ray cluster, or of a Ray that is started on this machine for a run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from rollout.engine_spec import EngineSpec
from rollout.errors import EngineDied, EngineError
from rollout.ray_engine import CONCURRENT, EngineActor, RayEngine
from rollout.weights.config import Transport
from trainer.parallel.ray_cluster import LOST, Places, machine_identity, reachable_address


class RayHost:
    """The first places in a Ray cluster, one an engine, and an actor in each that waits for its model."""

    def __init__(self, places: Places, *, engines: int, threads: int, wait_s: float, owned: bool) -> None:
        """Start the actors of `engines` engines in as many first places of `places`.

        Args:
            threads: of each engine.
            wait_s: how long a lost engine may wait for room to start again.
            owned: whether `places` are closed with this host.
        """
        self._places = places
        self._threads = threads
        self._wait_s = wait_s
        self._owned = owned
        try:
            self._actors = {index: self._actor(index) for index in range(engines)}
            machines = ray.get([actor.machine.remote() for actor in self._actors.values()])
        except BaseException:
            self.close()
            raise
        self.one_machine = all(machine == machine_identity() for machine in machines)
        """Whether every engine can open this process's memory."""
        self.address = reachable_address(machines)
        """The address at which engines reach this process."""

    def start(self, index: int, spec: EngineSpec) -> RayEngine:
        """Have the actor of engine `index` load its model, a new actor when that one is gone."""
        actor = self._actors.pop(index, None) or self._successor(index, spec)
        return RayEngine(actor, self._anywhere(spec), index=index, node=self._places.node(index))

    def node_id(self, index: int) -> str:
        """Ray's name for the node of an engine."""
        return self._places.node_id(index)

    def close(self) -> None:
        """Give the places back where they are this host's; safe to call twice."""
        if self._owned:
            self._places.close()

    def _actor(self, index: int) -> Any:
        return self._places.actor(index, EngineActor, concurrent=CONCURRENT)

    def _anywhere(self, spec: EngineSpec) -> EngineSpec:
        """`spec` without what depends on the process that reads it: working folder, usable cores."""
        return replace(
            spec,
            threads=self._threads,
            model=_absolute(spec.model),
            tokenizer=_absolute(spec.tokenizer),
            log_path=_absolute(spec.log_path),
        )

    def _successor(self, index: int, spec: EngineSpec) -> Any:
        """A new actor in the same place, which Ray may move to another node.

        Until Ray has noticed that a node is gone, it gives the place on that node again: hence the loop.
        """
        limit = time.monotonic() + self._wait_s
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
            f"rollout.ray.wait_s={self._wait_s:g}: add a node."
        )

    def _refuse_stranger(self, index: int, spec: EngineSpec, machine: str) -> None:
        """Raise EngineError for an engine that came back where its transport does not reach."""
        if spec.transport == Transport.shm and machine != machine_identity():
            raise EngineError(
                f"engine {index} came back on a node that cannot open the learner's memory: set "
                "weights.transport=tcp."
            )


def _absolute(path: str) -> str:
    """The path from the root; empty stays empty."""
    return str(Path(path).absolute()) if path else ""
