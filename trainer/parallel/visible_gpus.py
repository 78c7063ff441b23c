"""Which of this process's GPUs a process that it starts may see."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


def gpu_names(gpus: Sequence[int]) -> str:
    """These of the GPUs that this process sees, as `VISIBLE_GPUS` names them to a process of its own."""
    ours = [name for name in os.environ.get(VISIBLE_GPUS, "").split(",") if name]
    return ",".join(ours[gpu] if ours else str(gpu) for gpu in gpus)


@contextlib.contextmanager
def visible(gpus: Sequence[int]) -> Iterator[None]:
    """Show only these of this process's GPUs to processes that start meanwhile; none given: all."""
    before = os.environ.get(VISIBLE_GPUS)
    if gpus:
        os.environ[VISIBLE_GPUS] = gpu_names(gpus)
    try:
        yield
    finally:
        if before is not None:
            os.environ[VISIBLE_GPUS] = before
        else:
            os.environ.pop(VISIBLE_GPUS, None)
