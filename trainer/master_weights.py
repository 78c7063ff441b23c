"""float32 master weights and gradient sums beside a module that computes in bfloat16.

The module holds bfloat16 parameters, so every matrix product runs in bfloat16 without casts. The optimizer
sees float32 copies. Each backward pass hands its bfloat16 gradients over as they become ready: they are added
up in float32, so the sum over micro-batches loses nothing, and freed at once. In float32 the master weights
*are* the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MasterWeights:
    """What the optimizer steps on, for the trainable parameters of a module."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Cast `module` to `dtype` in place (buffers stay) and keep float32 copies of what is trained."""
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in trained]
        self.working = [parameter for _, parameter in trained]
        """The module's own parameters that are trained, in the order of `names`."""
        self._narrow = dtype != torch.float32
        if self._narrow:
            self.parameters = [nn.Parameter(p.detach().float()) for p in self.working]
        else:
            self.parameters = self.working
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        if self._narrow:
            for working, master in zip(self.working, self.parameters):
                _sum_in_float32(working, master)

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """Float32 parameters by the module's names."""
        return list(zip(self.names, self.parameters))

    @property
    def gradients(self) -> list[Tensor]:
        """The float32 gradients there are."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def norm(self) -> Tensor:
        """The 2-norm of all gradients together, a scalar."""
        return global_norm(self.gradients)

    def odd(self) -> list[str]:
        """Names of gradients that are not finite."""
        return [n for n, p in self.named if p.grad is not None and not torch.isfinite(p.grad).all()]

    def zero_grad(self) -> None:
        """Forget the gradients; their memory goes back."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def install(self) -> None:
        """Round the stepped weights into the module."""
        if self._narrow:
            torch._foreach_copy_(list[Tensor](self.working), list[Tensor](self.parameters))

    def state_dict(self) -> dict[str, Tensor]:
        """Float32 weights by name."""
        return {name: parameter.detach() for name, parameter in self.named}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights from `state_dict()` and install them.

        Raises:
            ValueError: the names are not those of the trained parameters.
        """
        if set(state) != set(self.names):
            odd = sorted(set(state) ^ set(self.names))
            raise ValueError(
                f"The state's trained parameters are not this learner's: {odd[0]} is on one side only."
            )
        for name, parameter in self.named:
            parameter.copy_(state[name])
        self.install()


def _sum_in_float32(working: nn.Parameter, master: nn.Parameter) -> None:
    """Move each ready gradient of `working` into `master.grad`."""

    def hook(parameter: Any) -> None:
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    working.register_post_accumulate_grad_hook(hook)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar."""
    return torch.nn.utils.get_total_norm(gradients)
