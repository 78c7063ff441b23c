"""Tensor parallelism: heads and hidden neurons of every layer, and the head's vocabulary, split over ranks.

Layers go through torch's own `parallelize_module`. Embeddings and head stay as they are, whole and perhaps
tied, on every rank; each computes logits for its range of the vocabulary only, and the softmax is joined.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from trainer.policy import Policy

_SPLIT: dict[str, type[ColwiseParallel | RowwiseParallel]] = {
    "self_attn.q_proj": ColwiseParallel,
    "self_attn.k_proj": ColwiseParallel,
    "self_attn.v_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}
"""The linear layers of a Llama or Qwen block, and how each is split."""


def split_layers(policy: Policy, mesh: DeviceMesh) -> None:
    """Split the layers of a policy over a mesh of one dimension, in place, and the work of its head.

    Raises ValueError for a model whose heads or blocks do not let themselves be split.
    """
    layers = policy.model.get_decoder().layers
    _refuse(policy, layers, mesh.size())
    for layer in layers:
        plan: dict[str, ParallelStyle] = {name: style() for name, style in _SPLIT.items()}
        parallelize_module(layer, mesh, plan)
    policy.vocabulary_ranks = VocabularyGroup(mesh)


class VocabularyGroup:
    """A `trainer.logprobs.VocabularyRanks` over a mesh of one dimension: ranges of equal size, in order."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group = mesh.get_group()
        self._rank, self._size = mesh.get_local_rank(), mesh.size()

    def range(self, vocabulary: int) -> tuple[int, int]:
        """See `VocabularyRanks`."""
        width = -(-vocabulary // self._size)
        return min(self._rank * width, vocabulary), min((self._rank + 1) * width, vocabulary)

    def largest(self, values: Tensor) -> Tensor:
        """See `VocabularyRanks`."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """See `VocabularyRanks`."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        reduced = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, operation, group=self._group)
        return reduced


def _refuse(policy: Policy, layers: nn.ModuleList, ranks: int) -> None:
    config, name = policy.model.config, type(policy.model).__name__
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    if queries % ranks or keys % ranks:
        fitting = [n for n in range(1, keys + 1) if queries % n == keys % n == 0]
        raise ValueError(
            f"learner.parallel.tensor={ranks} does not divide the {queries} query heads and {keys} key-value "
            f"heads of {name}: set one of {', '.join(map(str, fitting))}."
        )
    if config.intermediate_size % ranks:
        raise ValueError(
            f"learner.parallel.tensor={ranks} does not divide the {config.intermediate_size} hidden neurons "
            f"of {name} (intermediate_size): set another."
        )
    plain = {n for n, module in layers[0].named_modules() if type(module) is nn.Linear}
    normed = hasattr(layers[0].self_attn, "q_norm")
    if plain != set(_SPLIT) or normed or not policy.packs:
        raise ValueError(
            f"learner.parallel.tensor={ranks} splits plain Llama and Qwen2 blocks, which those of {name} are "
            f"not{' under an adapter' * (plain != set(_SPLIT))}: set learner.parallel.tensor=1."
        )
