"""FSDP2 over a policy: every rank holds a slice of each weight, gathered while its layer computes.

The slices are float32 and *are* the master weights: FSDP2 rounds them to the compute precision while it
gathers, and sums gradients in float32, over micro-batches and over ranks. The master copies of
`trainer.master_weights` would need the rounded weights as well, half as many bytes again, to compute the
same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from trainer.master_weights import MasterWeights, global_norm
from trainer.parallel.tensor import split_layers
from trainer.policy import Policy

TENSOR = "tensor"
"""Name of the mesh's dimension along which layers are split."""


def shard(policy: Policy, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread a float32 policy over `mesh` in place: each decoder layer by itself, then all that remains.

    `mesh`: `shard`, perhaps after `replicate` (copies), perhaps before `tensor` (`trainer.parallel.tensor`).
    Raises ValueError for a model that keeps its layers elsewhere than transformers' decoders do, or whose
    layers cannot be split.
    """
    layers = getattr(policy.model.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(
            f"{type(policy.model).__name__} has no list of decoder layers and cannot be spread over ranks: "
            "train it with one process."
        )
    # Inputs are in the right precision already; casting would copy the attention layout in every layer.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    names = mesh.mesh_dim_names or ()
    if TENSOR in names:
        split_layers(policy, mesh[TENSOR])
        mesh = mesh[tuple(name for name in names if name != TENSOR)]
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)


def gathered_no_more(policy: Policy) -> None:
    """Free what a pass without a backward left gathered, which would be stale once weights change."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def summed_over_copies(policy: Policy, now: bool) -> None:
    """Whether the next backward pass sums gradients over copies of the model (`replicate`), and with them
    those of earlier passes that did not; within a copy they are summed by each."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(now, recurse=False)


class ShardedWeights(MasterWeights):
    """The slices of a sharded policy, on which the optimizer steps as on any tensors.

    That is right for optimizers that treat every element by itself; `rlhf.preflight` refuses the others.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the trained parameters of `module`, sharded in float32."""
        super().__init__(module, torch.float32)
        self.parameters = [nn.Parameter(local(parameter.detach())) for parameter in self.working]

    def norm(self) -> Tensor:
        """The 2-norm of the whole model's gradients, the same on every rank; the slices get theirs."""
        for part, parameter in zip(self.parameters, self.working):
            part.grad = None if parameter.grad is None else local(parameter.grad)
        by_mesh: dict[DeviceMesh, list[Tensor]] = {}
        for parameter in self.working:
            if isinstance(parameter.grad, DTensor):
                by_mesh.setdefault(parameter.grad.device_mesh, []).append(parameter.grad)
        return global_norm([whole(global_norm(gradients)) for gradients in by_mesh.values()])

    def zero_grad(self) -> None:
        """Forget the gradients; their memory goes back."""
        super().zero_grad()
        for parameter in self.working:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Float32 weights by name, in slices that know their whole."""
        return {name: parameter.detach() for name, parameter in zip(self.names, self.working)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights, whole ones or this rank's slices."""
        like = dict(zip(self.names, self.working))
        cut = {name: slice_of(value, like[name]) if name in like else value for name, value in state.items()}
        super().load_state_dict(cut)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from the ranks that hold its slices."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    # Slices of unequal size are gathered with padding, of which files must not hold the rest.
    return full if full.untyped_storage().nbytes() == full.nbytes else full.clone()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def slice_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of a whole tensor, cut as `like` is; no communication. A slice stays what it is."""
    if not isinstance(like, DTensor) or tensor.shape == like.to_local().shape:
        return tensor
    mesh, part = like.device_mesh, tensor
    # Tensor parallelism cuts first, though its dimension of the mesh is the last; FSDP2 cuts what it left.
    for dimension, placement in reversed(list(enumerate(like.placements))):
        if isinstance(placement, Shard | _StridedShard):
            parts = part.chunk(mesh.size(dimension), placement.dim)
            place = mesh.get_local_rank(dimension)
            part = parts[place] if place < len(parts) else part.narrow(placement.dim, 0, 0)
    return part.contiguous()


def known(tensor: Tensor, like: Tensor) -> Tensor:
    """A plain slice as one that knows its whole: the counterpart of `local`. Other shapes stay plain."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    if tensor.shape != like.to_local().shape:
        return tensor
    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
