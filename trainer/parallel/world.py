"""`World`: which of how many processes this one is, as torchrun says. Importable without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    """The processes that were started together to hold one learner."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes of this machine: which of its GPUs a rank takes."""
    local_size: int = 1
    """Processes on this machine."""
    launched: bool = False
    """Whether torchrun started this process."""
    restart: int = 0
    """How often torchrun has started it again."""
    restarts: int = 0
    """How often it will (`--max-restarts`)."""

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> World:
        """What `RANK`, `WORLD_SIZE` and torchrun's other variables say; a world of one without them."""
        size = int(variables.get("WORLD_SIZE", 1))
        return cls(
            rank=int(variables.get("RANK", 0)),
            size=size,
            local_rank=int(variables.get("LOCAL_RANK", 0)),
            local_size=int(variables.get("LOCAL_WORLD_SIZE", size)),
            launched="TORCHELASTIC_RUN_ID" in variables,
            restart=int(variables.get("TORCHELASTIC_RESTART_COUNT", 0)),
            restarts=int(variables.get("TORCHELASTIC_MAX_RESTARTS", 0)),
        )

    @property
    def follows(self) -> bool:
        """Whether another process leads: this one holds its part of the learner and nothing else."""
        return self.rank > 0
