"""The process-wide random generators, saved and put back.

None of our own code draws from them: the order of prompts, the seed of every sampled response and a fresh
adapter are functions of `run.seed`. Reward functions and models that bring code may.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def state_dict() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's (CPU and CUDA) global generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_state_dict(state: dict[str, Any]) -> None:
    """Go on from `state_dict()`; CUDA's generators only where their number is the same."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
