"""What is computed again, counted by operation; the gradients are in `tests/invariants/test_gradients.py`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.parallel.ranks import build, config
from tests.trainer.samples import random_rows
from trainer.config import Device, LearnerConfig
from trainer.memory.config import ActivationCheckpointing, MemoryConfig, OffloadState

LAYERS, LINEARS = 2, 7
"""Of the tiny model: decoder layers, and linear layers in each."""


class Counting(TorchDispatchMode):
    """Counts what really runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(kind: ActivationCheckpointing) -> Counter[str]:
    """Of one micro-batch, forward and backward."""
    learner = build(config(memory=MemoryConfig(kind)), None)
    with Counting() as counting:
        learner.update([random_rows(groups=1)])
    return counting.seen


def test_selective_runs_no_product_of_a_linear_layer_again() -> None:
    none, full, selective = (operations(kind) for kind in ActivationCheckpointing)
    product, scores, norm = "aten.mm.default", "aten.baddbmm.default", "aten.linalg_vector_norm.default"
    # The result of the last product of a layer is in no backward formula, so `full` stops before it.
    assert full[product] - none[product] == LAYERS * (LINEARS - 1)
    assert selective[product] == none[product]
    assert selective[scores] == full[scores] == 2 * none[scores]
    assert selective[norm] == full[norm] == none[norm] + LAYERS * 2


def test_layers_that_are_compiled_choose_by_themselves() -> None:
    for kind in (ActivationCheckpointing.none, ActivationCheckpointing.full):
        assert LearnerConfig(compile=True, memory=MemoryConfig(kind)).check() == []
    assert LearnerConfig(compile=True, memory=MemoryConfig(ActivationCheckpointing.selective)).check() == [
        "learner.memory.activation_checkpointing=selective picks single operations, and learner.compile=true "
        "fuses them and picks by itself what to compute again: set it to none or full."
    ]


def test_settings_that_do_not_go_together() -> None:
    assert MemoryConfig(offload_activations=True).check() == [
        "learner.memory.offload_activations=true moves the layer inputs that checkpointing keeps, and "
        "learner.memory.activation_checkpointing=none keeps everything: set it to full."
    ]
    assert MemoryConfig(offload_state=OffloadState.host, folder="/tmp").check() == [
        "learner.memory.folder=/tmp has no effect with learner.memory.offload_state=host: leave it empty, or "
        "set offload_state=disk."
    ]
    assert MemoryConfig(ActivationCheckpointing.full, True, OffloadState.disk, "/tmp").check() == []


def test_a_model_that_cannot_is_refused() -> None:
    model = build(config(), None).policy.model
    type(model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(ValueError, match="cannot recompute its layers: set learner"):
            build(config(memory=MemoryConfig(ActivationCheckpointing.full)), None)
    finally:
        type(model).supports_gradient_checkpointing = True


@pytest.mark.gpu
def test_offloaded_activations_give_the_same_gradients_from_less_memory() -> None:
    """Inputs of 2 layers x tokens x 48 numbers, and what is kept of the rest, lie on the host."""
    peaks, norms = [], []
    for offload in (False, True):
        memory = MemoryConfig(ActivationCheckpointing.full, offload_activations=offload)
        learner = build(LearnerConfig(device=Device.cuda, memory=memory), None)
        rows = random_rows(groups=64, samples=8)
        torch.cuda.reset_peak_memory_stats()
        norms.append(learner.update([rows])[0]["learner/grad_norm"])
        peaks.append(torch.cuda.max_memory_allocated())
    assert norms[0] == norms[1]
    assert peaks[1] < peaks[0]
