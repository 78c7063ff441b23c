"""bitsandbytes' 8-bit AdamW, with a state that files can hold. Imported only where it is asked for."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch

_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""Entries of every quantized state that are the same two tables of 256 values, and their names there."""


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """Moments in 8 bits, each block of 256 with a scale of its own; those of under 4096 values in float32.

    The library nests its quantized tensors and repeats its tables for each parameter. Here `state_dict()` is
    flat and without tables: plain tensors, none of which shares memory with another.
    """

    def state_dict(self) -> dict[str, Any]:
        """Options, counters, 8-bit moments and their scales."""
        state = torch.optim.Optimizer.state_dict(self)
        own = {
            number: {name: value for name, value in entries.items() if name not in _TABLES}
            for number, entries in state["state"].items()
        }
        return {**state, "state": own}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Go on from `state_dict()`."""
        tables = {name: self.name2qmap[table] for name, table in _TABLES.items()}
        whole = {
            number: {**entries, **tables} if "absmax1" in entries else entries
            for number, entries in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": whole}, move_to_device)
