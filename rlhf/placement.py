"""Which GPUs the engines run on. The learner has GPU 0; an engine shares it or has GPUs of its own."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.errors import UserError


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
