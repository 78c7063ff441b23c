"""What a learner gives up speed for, to take less memory. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ActivationCheckpointing(StrEnum):
    """What of a decoder layer is computed again for the backward pass."""

    none = "none"
    """Nothing: every layer keeps its activations."""
    full = "full"
    """All of it: only the layer's input is kept."""
    selective = "selective"
    """All but the matrix products of its linear layers and fused attention, whose results are kept."""


class OffloadState(StrEnum):
    """Where weights and optimizer states are while engines generate."""

    never = "never"
    """Where the learner computes."""
    host = "host"
    """In the host's memory, pinned; for a learner on a GPU."""
    disk = "disk"
    """In a file without a name, which a killed run cannot leave behind."""


@dataclass
class MemoryConfig:
    """Memory of the learner against its speed. None of it changes what is learned, but for rounding."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """`none`, or what layers compute again for the backward pass: `full` keeps only their inputs,
    `selective` also the results of matrix products."""
    offload_activations: bool = False
    """Hold the layer inputs that checkpointing keeps in pinned host memory; for a learner on a GPU."""
    offload_state: OffloadState = OffloadState.never
    """Where weights and optimizer states are while engines generate: on `host` (from a GPU), on `disk`, or
    where the learner computes (`never`)."""
    folder: str = ""
    """Where the file of `offload_state=disk` is made; empty takes the system's folder for temporary files,
    which must not be memory itself (tmpfs)."""

    def check(self) -> list[str]:
        """Sentences about values that do not go together."""
        found = []
        if self.offload_activations and self.activation_checkpointing is ActivationCheckpointing.none:
            found.append(
                "learner.memory.offload_activations=true moves the layer inputs that checkpointing keeps, "
                "and learner.memory.activation_checkpointing=none keeps everything: set it to full."
            )
        if self.folder and self.offload_state is not OffloadState.disk:
            found.append(
                f"learner.memory.folder={self.folder} has no effect with learner.memory.offload_state="
                f"{self.offload_state}: leave it empty, or set offload_state=disk."
            )
        return found
