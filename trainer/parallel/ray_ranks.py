"""Ranks of a learner as Ray actors: what torchrun does for processes of its own, done for those of a cluster.

The process that starts them is rank 0. It keeps the store at which all ranks meet, as torchrun's agent does,
and every rank finds torchrun's variables in its environment: from there on nothing differs.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayError

from trainer.errors import described
from trainer.parallel.ray_cluster import LOST, Places, machine_identity, reachable_address, why_lost

END_SECONDS = 10.0
"""How long ranks may take to end by themselves, once rank 0 has told them or left, before they are killed."""

LOOK_SECONDS = 0.5
"""How often is looked whether the run has ended, while no rank does."""

Work = Callable[[], str]
"""All that a rank above 0 does, under torchrun's variables; returns what it failed of, where rank 0 does not
know it yet."""


class RankActor:
    """What runs in Ray's worker process: a rank, in that process."""

    def machine(self) -> str:
        """See `machine_identity`."""
        return machine_identity()

    def follow(self, work: Work, variables: dict[str, str], folder: str) -> tuple[str, str]:
        """Be a rank, in rank 0's working folder.

        Returns what it failed of, empty when rank 0 knows that or nothing failed, and what it wrote to
        standard error.
        """
        os.environ.update(variables)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                os.chdir(folder)
                failure = work()
            except Exception as error:
                traceback.print_exc()
                failure = f"rank {variables['RANK']} of the learner failed: {described(error)}."
        return failure, said.getvalue()


class RayRanks:
    """Ranks 1 to N - 1, each in a place of its own."""

    def __init__(
        self, places: Places, indices: Sequence[int], work: Work, *, threads: int, noticed: bool = True
    ) -> None:
        """Start a rank in each of these of the `places`; they are not closed with it.

        `noticed`: whether rank 0's calls fail when another rank is gone; otherwise this process is ended.
        Raises ValueError when an actor does not start.
        """
        self.places = places
        self._indices = indices
        self._noticed = noticed
        self._ended = threading.Event()
        self._failure = ""
        self._actors = [places.actor(index, RankActor, OMP_NUM_THREADS=str(threads)) for index in indices]
        try:
            machines = ray.get([actor.machine.remote() for actor in self._actors])
        except RayError as error:
            self._kill()
            raise ValueError(f"a rank of the learner could not start on Ray: {why_lost(error)}.") from error
        address = reachable_address(machines)
        self._store: dist.TCPStore | None = dist.TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self._common = {
            "WORLD_SIZE": str(len(indices) + 1),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": str(True),
        }
        self._work = [
            actor.follow.remote(work, self._variables(rank, 1), os.getcwd())
            for rank, actor in enumerate(self._actors, start=1)
        ]
        self._left = list(self._work)
        self._watcher = threading.Thread(target=self._watch, name="rank-watcher", daemon=True)
        self._watcher.start()

    @contextmanager
    def as_rank_0(self, local_size: int) -> Iterator[None]:
        """Torchrun's variables for this process; `local_size`: ranks that share this machine's GPUs."""
        variables = self._variables(0, local_size)
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def lost(self) -> str:
        """What became of a rank that is gone, as a sentence; empty while Ray knows of none."""
        return self._failure

    def close(self) -> None:
        """Wait for the ranks, which end when rank 0 has told them or left; kill those that do not."""
        self._ended.set()
        self._watcher.join()
        with contextlib.suppress(RayError):
            done, _ = ray.wait(self._left, num_returns=len(self._left), timeout=END_SECONDS)
            for work in done:
                self._note(work)
        self._kill()
        self._store = None

    def _variables(self, rank: int, local_size: int) -> dict[str, str]:
        """An actor sees no GPU but its own: its local rank is 0."""
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local_size)}
        return self._common | own

    def _watch(self) -> None:
        """Wait for the ends of ranks; the first that was none of rank 0's doing is kept."""
        with contextlib.suppress(RayError):  # the whole of Ray is gone
            while self._left and not self._ended.is_set():
                done, self._left = ray.wait(self._left, timeout=LOOK_SECONDS)
                for work in done:
                    self._note(work)
                if self._failure:
                    # Rank 0 may be waiting for this one at the store, for as long as there is a store.
                    self._store = None
                    if not self._noticed:
                        self._end_run()

    def _note(self, work: Any) -> None:
        rank = self._work.index(work) + 1
        try:
            failure, said = ray.get(work)
            sys.stderr.write(said)
        except LOST as error:
            node = self.places.node(self._indices[rank - 1])
            failure = f"rank {rank} of the learner, a Ray actor on node {node}, was lost: {why_lost(error)}."
        self._failure = self._failure or failure

    def _end_run(self) -> None:
        """End this process unless it ends by itself: between GPUs it may wait for a lost rank forever."""
        if not self._ended.wait(END_SECONDS):
            print(f"rlhf: the run stopped: {self._failure}", file=sys.stderr, flush=True)
            os._exit(1)

    def _kill(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)
