"""How a learner is spread over ranks. Importable without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Degrees:
    """Ranks along each way of spreading a learner; their product is the number of ranks."""

    replicate: int
    shard: int
    tensor: int = 1


class Launcher(StrEnum):
    """Who starts the ranks of a learner."""

    torchrun = "torchrun"
    """torchrun: all of them. `rlhf` alone is one process."""
    ray = "ray"
    """`rlhf`, which is rank 0: the others as Ray actors, `replicate x shard x tensor` ranks together."""


class RayStrategy(StrEnum):
    """How Ray spreads engines and ranks over nodes."""

    PACK = "PACK"
    """On as few as there is room on."""
    SPREAD = "SPREAD"
    """On as many as there are."""
    STRICT_PACK = "STRICT_PACK"
    """All on one, or not at all."""
    STRICT_SPREAD = "STRICT_SPREAD"
    """Each on another, or not at all."""


@dataclass
class RayConfig:
    """Which Ray cluster, for engines (`rollout.pool=ray`) and ranks (`learner.parallel.launcher=ray`)."""

    address: str = ""
    """`host:port` of a cluster's head, or `auto` for the one that this machine belongs to. Empty: what the
    variable `RAY_ADDRESS` says, else a Ray that is started here and ends with the run."""
    strategy: RayStrategy = RayStrategy.PACK
    """`PACK` (as few nodes as there is room on), `SPREAD`, `STRICT_PACK` or `STRICT_SPREAD`."""
    places: list[str] = field(default_factory=list)
    """Custom Ray resources that say where engines go, dealt out in turn: engine 0 runs on a node that has the
    first. A node gets them at its start (`ray start --resources='{"switch-a": 1}'`); `node:ADDRESS` is a
    resource that every node has. Empty: anywhere."""
    wait_s: float = 60.0
    """Seconds to wait for the cluster to have room."""

    def check(self) -> list[str]:
        """Sentences about values that cannot work, empty when all can."""
        problems = []
        if not self.wait_s > 0:
            problems.append(f"rollout.ray.wait_s={self.wait_s:g} must be above 0: raise it.")
        if self.address.startswith("ray://"):
            problems.append(
                f"rollout.ray.address={self.address} is a Ray client's: run on a node of the cluster and "
                "give the head's host:port, or auto."
            )
        return problems

    @property
    def cluster(self) -> str:
        """Address of the cluster to join; empty for a Ray that is started here."""
        address = self.address or os.environ.get("RAY_ADDRESS", "")
        return "" if address == "local" else address


@dataclass
class ParallelConfig:
    """How the learner is spread over several processes, its ranks; one process needs none of it."""

    replicate: int = 1
    """Copies of the model, each spread over `shard` ranks. Above 1 costs memory and spares the slower network
    between machines: weights are gathered within a copy, gradients summed over copies once a step."""
    shard: int = 0
    """Ranks over which weights, gradients and optimizer state of one copy are spread (FSDP2); 0: all that
    `replicate` and `tensor` leave."""
    tensor: int = 1
    """Ranks that split the heads and hidden neurons of every layer, and the head's vocabulary, and learn from
    the same rows. For layers too large for one GPU. Must divide the heads."""
    launcher: Launcher = Launcher.torchrun
    """Who starts the ranks: `torchrun`, or `ray`: `rlhf` itself, those above 0 as Ray actors, as many as
    `replicate x shard x tensor`, with `learner.threads` CPUs each (0: one) and on GPUs one GPU each."""
    places: list[str] = field(default_factory=list)
    """With `launcher=ray`, custom Ray resources that say where ranks go, as `rollout.ray.places` does for
    engines: rank 1 runs on a node that has the first."""

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        found = []
        for name, value in (("replicate", self.replicate), ("tensor", self.tensor)):
            if value < 1:
                found.append(f"learner.parallel.{name}={value} must be at least 1: raise it.")
        if self.shard < 0:
            found.append(
                f"learner.parallel.shard={self.shard} is negative: set a number of ranks, or 0 for all."
            )
        if self.launcher is Launcher.ray and not found and self.product < 2:
            found.append(
                "learner.parallel.launcher=ray starts replicate x shard x tensor ranks, which are 1: set "
                "learner.parallel.shard to the number of ranks."
            )
        if self.places and self.launcher is not Launcher.ray:
            found.append(
                f"learner.parallel.places={self.places} is for Ray, and learner.parallel.launcher="
                f"{self.launcher}: set launcher=ray, or leave places empty."
            )
        return found

    @property
    def product(self) -> int:
        """Ranks that the degrees ask for, `shard=0` counted as 1."""
        return self.replicate * max(1, self.shard) * self.tensor

    def degrees(self, ranks: int) -> Degrees:
        """The degrees for so many ranks, 0 filled in. Raises ValueError when their product is another."""
        shard = self.shard or max(1, ranks // (self.replicate * self.tensor))
        product = self.replicate * shard * self.tensor
        if product == ranks:
            return Degrees(replicate=self.replicate, shard=shard, tensor=self.tensor)
        tensor = f" x learner.parallel.tensor={self.tensor}" if self.tensor > 1 else ""
        raise ValueError(
            f"learner.parallel.replicate={self.replicate} x learner.parallel.shard={shard}{tensor} = "
            f"{product} ranks, but there are {ranks}: start {product} (torchrun --nproc-per-node), or set "
            f"degrees whose product is {ranks}."
        )
