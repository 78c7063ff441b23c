"""Optimizers by name, each over float32 parameters, behind one face."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config import NEEDS_BITSANDBYTES, OptimizerConfig, OptimizerName

NamedParameters = Sequence[tuple[str, nn.Parameter]]


class OptimizerSet:
    """One or more torch optimizers that step together."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        """Take optimizers whose parameters do not overlap."""
        self.optimizers = list(optimizers)
        for optimizer in self.optimizers:
            if hasattr(optimizer, "train"):  # Schedule-free: the weights where gradients are taken.
                optimizer.train()

    def set_lr(self, lr: float) -> None:
        """The rate of the next steps, for every parameter."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        """Move all parameters along their gradients."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Moments, counters and options of every optimizer."""
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self.optimizers)}

    def places(self) -> dict[tuple[str, str, int], nn.Parameter]:
        """Each parameter by where the states of its shape lie in `state_dict()`."""
        return {
            (str(index), "state", number): parameter
            for index, optimizer in enumerate(self.optimizers)
            for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
        }

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the states, small ones too."""
        for optimizer in self.optimizers:
            for entries in optimizer.state.values():
                yield from (value for value in entries.values() if isinstance(value, Tensor))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(index)])


def build_optimizer(config: OptimizerConfig, parameters: NamedParameters) -> OptimizerSet:
    """The optimizer that `config` names, over `parameters`.

    Weight decay applies to matrices only. Raises ValueError when there is nothing to train.
    """
    if not parameters:
        raise ValueError("Nothing is left to train: learner.freeze matches every parameter.")
    return OptimizerSet(_BUILDERS[config.name](config, parameters))


def _groups(config: OptimizerConfig, parameters: NamedParameters) -> list[dict[str, Any]]:
    """Matrices with decay, and the rest without; empty groups left out."""
    matrices = [p for _, p in parameters if p.ndim >= 2]
    vectors = [p for _, p in parameters if p.ndim < 2]
    groups = [(matrices, config.weight_decay), (vectors, 0.0)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def _adamw(config: OptimizerConfig, parameters: NamedParameters) -> list[Optimizer]:
    beta1, beta2 = config.betas
    groups = _groups(config, parameters)
    return [torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)]


def _adamw_8bit(config: OptimizerConfig, parameters: NamedParameters) -> list[Optimizer]:
    try:
        from trainer.memory.low_bit import AdamW8bit
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise ValueError(NEEDS_BITSANDBYTES) from None
    beta1, beta2 = config.betas
    groups = _groups(config, parameters)
    return [AdamW8bit(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps)]


class _DecoupledSgd(torch.optim.SGD):
    """SGD whose weights shrink by `lr * decay` before each step; torch's own decay goes into the momentum."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Shrink what has a gradient, then step."""
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["decay"] and moving:
                torch._foreach_mul_(moving, 1 - group["lr"] * group["decay"])
        return super().step(closure)


def _sgd(config: OptimizerConfig, parameters: NamedParameters) -> list[Optimizer]:
    groups = [
        {"params": group["params"], "decay": group["weight_decay"]} for group in _groups(config, parameters)
    ]
    return [_DecoupledSgd(groups, lr=config.lr, momentum=config.betas[0], fused=True)]


def _muon(config: OptimizerConfig, parameters: NamedParameters) -> list[Optimizer]:
    """Muon for the matrices inside layers; embeddings, head, norms and biases go to AdamW."""
    hidden = [(n, p) for n, p in parameters if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    inside = {name for name, _ in hidden}
    rest = [(name, parameter) for name, parameter in parameters if name not in inside]
    optimizers: list[Optimizer] = []
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                [parameter for _, parameter in hidden],
                lr=config.lr,
                weight_decay=config.weight_decay,
                momentum=config.betas[0],
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers + (_adamw(config, rest) if rest else [])


def _lion(config: OptimizerConfig, parameters: NamedParameters) -> list[Optimizer]:
    from pytorch_optimizer import Lion

    beta1, beta2 = config.betas
    return [Lion(_groups(config, parameters), lr=config.lr, betas=(beta1, beta2), foreach=False)]


def _adafactor(config: OptimizerConfig, parameters: NamedParameters) -> list[Optimizer]:
    return [torch.optim.Adafactor(_groups(config, parameters), lr=config.lr)]


def _schedulefree(config: OptimizerConfig, parameters: NamedParameters) -> list[Optimizer]:
    from schedulefree import AdamWScheduleFree

    beta1, beta2 = config.betas
    return [
        AdamWScheduleFree(_groups(config, parameters), lr=config.lr, betas=(beta1, beta2), eps=config.eps)
    ]


_BUILDERS: dict[OptimizerName, Callable[[OptimizerConfig, NamedParameters], list[Optimizer]]] = {
    OptimizerName.adamw: _adamw,
    OptimizerName.adamw_8bit: _adamw_8bit,
    OptimizerName.sgd: _sgd,
    OptimizerName.muon: _muon,
    OptimizerName.lion: _lion,
    OptimizerName.adafactor: _adafactor,
    OptimizerName.schedulefree: _schedulefree,
}
