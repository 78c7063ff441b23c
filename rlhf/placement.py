"""Which GPUs the engines run on. The learner has GPU 0; an engine shares it or has GPUs of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.errors import UserError
from rollout.config import EngineProcess, Numerics, PoolKind, RolloutConfig


@dataclass(frozen=True, slots=True)
class Placement:
    """The GPUs of every engine, and whether GPU 0 serves an engine and the learner."""

    engines: tuple[tuple[int, ...], ...]
    """For each engine the numbers of its GPUs among those that this process sees; empty: a CPU."""
    shared: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether engines run on GPUs."""
        return bool(self.engines[0])


def place(
    gpus: int, *, engines: int, tensor_parallel: int, learner: bool = True, ranks: int = 1
) -> Placement:
    """Deal `gpus` GPUs out to `engines` engines of `tensor_parallel` each.

    Beside a learner, which takes a GPU for each of its `ranks`, engines get the GPUs after those, and a
    single small one shares GPU 0 with a learner of one rank where there is no other. A learner on the CPU
    counts too: its weights go to engines by way of GPU 0. Raises `UserError` when there are too few.
    """
    if not gpus:
        return Placement(engines=((),) * engines)
    first = ranks if learner else 0
    if first + engines * tensor_parallel <= gpus:
        starts = range(first, first + engines * tensor_parallel, tensor_parallel)
        return Placement(engines=tuple(tuple(range(start, start + tensor_parallel)) for start in starts))
    if engines == tensor_parallel == first == 1:
        return Placement(engines=((0,),), shared=True)
    raise UserError(
        f"rollout.engines={engines} of rollout.tensor_parallel={tensor_parallel} need "
        f"{engines * tensor_parallel} GPUs{' beside the learner' * learner}, of {gpus} that this process "
        f"sees: lower them, or show it more (CUDA_VISIBLE_DEVICES)."
    )


def placement_of(rollout: RolloutConfig, *, learner: bool = True, ranks: int = 1) -> Placement:
    """Where the engines run, beside a learner with `ranks` ranks on this machine.

    On nodes of a Ray cluster there are GPUs where this process sees some; which, Ray decides.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and learner and rollout.process is EngineProcess.inprocess:
        raise UserError(
            "rollout.process=inprocess has no way for weights on a GPU, which travel between processes: set "
            "rollout.process=child."
        )
    if rollout.pool is PoolKind.ray and rollout.ray.cluster:
        engines = tuple(range(rollout.tensor_parallel)) if gpus else ()
        placed = Placement(engines=(engines,) * rollout.engines)
    else:
        placed = place(
            gpus,
            engines=rollout.engines,
            tensor_parallel=rollout.tensor_parallel,
            learner=learner,
            ranks=ranks,
        )
    _check_sleep(rollout.sleep_level, placed, learner)
    if rollout.numerics is Numerics.batch_invariant and not placed.on_gpu:
        raise UserError(
            "rollout.numerics=batch_invariant switches vLLM's GPU kernels, and here engines run on CPUs: set "
            "rollout.numerics=layercast or standard."
        )
    return placed


def _check_sleep(level: int, placed: Placement, learner: bool) -> None:
    """Refuse a sleep that would free nothing that anybody wants."""
    if level and not placed.on_gpu:
        raise UserError(
            f"rollout.sleep_level={level} frees GPU memory, and here engines run on CPUs, where vLLM has no "
            "sleep mode: set rollout.sleep_level=0."
        )
    if level and learner and not placed.shared:
        raise UserError(
            f"rollout.sleep_level={level} frees memory of a GPU that engine and learner share, and here "
            "engines have GPUs of their own: set rollout.sleep_level=0."
        )
