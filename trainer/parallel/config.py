"""How a learner is spread over ranks. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Degrees:
    """Ranks along each way of spreading a learner; their product is the number of ranks."""

    replicate: int
    shard: int
    tensor: int = 1


@dataclass
class ParallelConfig:
    """How the learner is spread over the ranks that torchrun starts; one process needs none of it."""

    replicate: int = 1
    """Copies of the model, each spread over `shard` ranks. Above 1 costs memory and spares the slower network
    between machines: weights are gathered within a copy, gradients summed over copies."""
    shard: int = 0
    """Ranks over which weights, gradients and optimizer state of one copy are spread (FSDP2); 0: all that
    `replicate` and `tensor` leave."""
    tensor: int = 1
    """Ranks that split the heads and hidden neurons of every layer, and the head's vocabulary, and learn from
    the same rows. For layers too large for one GPU. Must divide the heads."""

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
        return found

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
