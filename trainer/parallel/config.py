"""How a learner is spread over ranks. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Degrees:
    """Ranks along each way of spreading a learner; their product is the number of ranks."""

    replicate: int
    shard: int


@dataclass
class ParallelConfig:
    """How the learner is spread over the ranks that torchrun starts; one process needs none of it."""

    replicate: int = 1
    """Copies of the model, each spread over `shard` ranks. Above 1 costs memory and spares the slower network
    between machines: weights are gathered within a copy, gradients summed over copies."""
    shard: int = 0
    """Ranks over which weights, gradients and optimizer state of one copy are spread (FSDP2); 0: all that
    `replicate` leaves."""

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        found = []
        if self.replicate < 1:
            found.append(f"learner.parallel.replicate={self.replicate} must be at least 1: raise it.")
        if self.shard < 0:
            found.append(
                f"learner.parallel.shard={self.shard} is negative: set a number of ranks, or 0 for all."
            )
        return found

    def degrees(self, ranks: int) -> Degrees:
        """The degrees for so many ranks, 0 filled in. Raises ValueError when their product is another."""
        shard = self.shard or max(1, ranks // self.replicate)
        if self.replicate * shard == ranks:
            return Degrees(replicate=self.replicate, shard=shard)
        raise ValueError(
            f"learner.parallel.replicate={self.replicate} x learner.parallel.shard={shard} = "
            f"{self.replicate * shard} ranks, but there are {ranks}: start {self.replicate * shard} "
            f"(torchrun --nproc-per-node), or set degrees whose product is {ranks}."
        )
