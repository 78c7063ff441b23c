"""LayerCast (arXiv 2506.09501): weights are stored in bfloat16, everything is computed in float32.

The torch part that learner and engine share. A weight is upcast just before its product and the copy is freed
after it, so no float32 copy lives on that an update of the weight would leave stale. Upcasting bfloat16 is
exact: on one kernel LayerCast gives what a float32 run of the same bfloat16 weights gives, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STORED = torch.bfloat16
"""What the weights of linear layers and embeddings are stored in."""


def layercast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""`[..., out]` float32: :math:`y = x\,\mathrm{up}(W)^\top + \mathrm{up}(b)` (LayerCast, section 4).

    `x` is `[..., in]` float32, `weight` `[out, in]` and `bias` `[out]` of any format. Equals
    `F.linear(x, weight.float(), bias.float())` bit for bit. Backward upcasts the weight once more instead of
    keeping the copy; gradients are float32 products, rounded to the format of what they belong to.

    Raises RuntimeError (torch's) for `x` in another format: an activation that is not float32 is a mistake.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())


class _Linear(torch.autograd.Function):
    """`layercast_linear` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            grad @ weight.float() if wants_x else None,
            (rows.T @ x.flatten(0, -2)).to(weight.dtype) if wants_weight else None,
            rows.sum(0).to(ctx.bias_dtype) if wants_bias else None,
        )


# ---------------------------------------------------------------- models of Hugging Face


def _linear_forward(module: Any, x: Tensor) -> Tensor:
    return layercast_linear(x, module.weight, module.bias)


def _embedding_forward(module: Any, ids: Tensor) -> Tensor:
    """Only the rows that were looked up are upcast."""
    return nn.Embedding.forward(module, ids).float()


def _layer_norm_forward(module: Any, x: Tensor) -> Tensor:
    weight = None if module.weight is None else module.weight.float()
    bias = None if module.bias is None else module.bias.float()
    return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


_FORWARDS: dict[Any, Callable[[Any, Tensor], Tensor]] = {
    nn.Linear.forward: _linear_forward,
    nn.Embedding.forward: _embedding_forward,
    nn.LayerNorm.forward: _layer_norm_forward,
}
"""torch's forward of a kind of module, and ours. Modules with another (RMS norms) multiply float32 hidden
states by their weight, which torch upcasts by itself; `require_float32` finds those that do not."""

_STORED_KINDS = (nn.Linear.forward, nn.Embedding.forward)
"""Whose parameters are stored in `STORED`."""


def upcast_forwards(model: nn.Module) -> Callable[[], None]:
    """Have linear layers, embeddings and layer norms of `model` compute in float32; returns what undoes it.

    Parameters stay what and where they are: whoever casts or updates them sees no difference. Modules that do
    so already are left alone, also by the undoing.
    """
    changed: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        ours = _FORWARDS.get(type(module).forward)
        before = module.__dict__.get("forward")
        if ours is not None and getattr(before, "__func__", None) is not ours:
            module.forward = MethodType(ours, module)
            changed.append((module, before))

    def undo() -> None:
        for module, before in changed:
            if before is None:
                del module.forward
            else:
                module.forward = before

    return undo


@contextmanager
def layercast(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` into LayerCast, and back.

    Inside the block matrices and biases of linear layers and embeddings are bfloat16 (one tensor where head
    and embedding are tied), all other parameters and buffers float32, and all that is computed float32.
    Afterwards forwards and formats are those of before, exactly. A block inside a block changes nothing.

    Raises ValueError, before anything is changed, for a weight that is not a bfloat16 number: LayerCast
    would compute another model, so round it first (`model.to(torch.bfloat16)`).
    """
    formats = _formats(model)
    before = [(tensor, tensor.dtype) for tensor, _ in formats]
    for tensor, dtype in formats:
        tensor.data = tensor.data.to(dtype)
    undo = upcast_forwards(model)
    try:
        yield model
    finally:
        undo()
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)


def _formats(model: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Every parameter and buffer whose format LayerCast changes, once each, and the new one."""
    wanted: dict[int, tuple[str, Tensor, torch.dtype]] = {}
    for path, module in model.named_modules():
        stored = STORED if type(module).forward in _STORED_KINDS else torch.float32
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point():
                wanted.setdefault(id(tensor), (f"{path}.{name}", tensor, stored))
    for name, tensor, dtype in wanted.values():
        if not torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)):
            raise ValueError(
                f"{name} holds values that {str(dtype).removeprefix('torch.')} does not: round the model "
                "first."
            )
    return [(tensor, dtype) for _, tensor, dtype in wanted.values() if tensor.dtype != dtype]


@contextmanager
def require_float32(model: nn.Module) -> Iterator[None]:
    """While the block runs `model`, raise ValueError for a module that does not compute in float32, by name.

    Every floating tensor that a module returns must be float32: one bfloat16 residual would undo LayerCast.
    """
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ValueError(
                    f"{names[module]} ({type(module).__name__}) returns "
                    f"{str(tensor.dtype).removeprefix('torch.')} where LayerCast computes in float32: set "
                    "rollout.numerics=standard."
                )

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        yield
    except RuntimeError as error:  # torch refuses factors of two formats
        raise ValueError(
            f"{type(model).__name__} does not run in LayerCast ({error}): set rollout.numerics=standard."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- float32 that is float32

_INTEGERS = 8192
"""2049 is the first integer that TF32 does not hold, 257 the first that bfloat16 does not."""


def rounds_float32(device: torch.device | str = "cpu") -> bool:
    """Whether matrix products of float32 tensors on `device` round their factors first (TF32, bfloat16).

    Multiplies the integers 0 to 8191 by the identity, which float32 does exactly.
    """
    integers = torch.arange(_INTEGERS, dtype=torch.float32, device=device).view(-1, 128)
    return not torch.equal(F.linear(integers, torch.eye(128, device=device)), integers)


def require_exact_products(device: torch.device | str = "cpu") -> None:
    """Raise ValueError where float32 products on `device` are not float32 (see `rounds_float32`)."""
    if rounds_float32(device):
        raise ValueError(
            f"rollout.numerics=layercast computes in float32, but matrix products on {device} round their "
            "factors (TF32 or bfloat16): unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE and set "
            "torch.set_float32_matmul_precision('highest')."
        )
