"""LoRA through PEFT: put adapters into a model, switch them off, merge them for publishing, save them.

PEFT is imported only when an adapter is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_BASE = ".base_layer."
"""What PEFT puts into the name of a wrapped layer's own weight."""


class UnsupportedAdapterError(ValueError):
    """An adapter that the learner cannot train or merge."""


class LoraModel:
    """A model with one LoRA adapter inside. The model's own parameters are frozen, the adapter's trained."""

    def __init__(self, peft_model: Any) -> None:
        """Use `wrap` or `load`."""
        self._peft = peft_model

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model; its linear layers are PEFT's, its names carry `base_layer` and `lora_`."""
        return self._peft.get_base_model()

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the model is the base, without its adapter."""
        return self._peft.disable_adapter()

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, float32 as trained in memory."""
        self._peft.save_pretrained(folder)

    def merged(
        self, dtype: torch.dtype, trained: dict[str, Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, adapters added in, without touching the model.

        The sum is taken in float32 and rounded once to `dtype`. `trained` gives adapter weights by parameter
        name that stand in for the module's own (float32 masters of bfloat16 ones).
        """
        for name, weight, _ in self._merged(dtype, trained or {}):
            yield name, weight

    @torch.no_grad()
    def merge_gap(self, dtype: torch.dtype, trained: dict[str, Tensor] | None = None) -> float:
        """How much of the adapter is lost when it is rounded into weights of `dtype`.

        `|round(W + BA) - (W + BA)| / |BA|`, Frobenius norms over all adapted layers together: 0 is exact, 1
        means that rounding is as large as the update. 0 while the adapter is still zero.
        """
        lost = update = 0.0
        for _, weight, exact in self._merged(dtype, trained or {}):
            if exact is not None:
                total, delta = exact
                lost += (weight.float() - total).square().sum().item()
                update += delta.square().sum().item()
        return (lost / update) ** 0.5 if update else 0.0

    @torch.no_grad()
    def _merged(
        self, dtype: torch.dtype, trained: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, tuple[Tensor, Tensor] | None]]:
        """`(name, merged, (float32 sum, float32 update) or None)` for every weight of the base model."""
        model = self.model
        deltas = {
            name: _delta(name, module, trained) for name, module in model.named_modules() if _adapted(module)
        }
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                continue
            layer = name.split(_BASE)[0]
            if _BASE in name and name.endswith(".weight"):
                delta = deltas[layer]
                total = parameter.float() + delta
                yield name.replace(_BASE, "."), total.to(dtype), (total, delta)
            else:
                yield name.replace(_BASE, "."), parameter.detach().to(dtype), None


def wrap(model: PreTrainedModel, rank: int, alpha: int, targets: Sequence[str]) -> LoraModel:
    """Put a fresh adapter into `model` (in place): `A` random from torch's generator, `B` zero.

    Raises:
        ValueError: no layer of the model has a name in `targets`, or one is the head or the embeddings.
    """
    from peft import LoraConfig, get_peft_model

    names: str | list[str] = "all-linear" if list(targets) == ["all-linear"] else list(targets)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    try:
        return _checked(get_peft_model(model, config, autocast_adapter_dtype=False))
    except UnsupportedAdapterError:
        raise
    except ValueError as error:
        linear = sorted(
            {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise ValueError(
            f"learner.lora.targets={list(targets)} names no layer of this model: "
            f"choose from {', '.join(linear)} or all-linear."
        ) from error


def load(model: PreTrainedModel, folder: Path) -> LoraModel:
    """Continue the adapter in PEFT folder `folder` on `model` (in place); its config sets rank and targets.

    Raises:
        ValueError: the adapter is not plain LoRA (DoRA, trained biases or extra modules), so it would not
            merge into the same weights.
    """
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)
    config: Any = peft_model.peft_config["default"]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    plain = kind == "LORA" and not config.use_dora and config.bias == "none" and not config.modules_to_save
    if not plain:
        raise ValueError(
            f"The adapter in {folder} is not plain LoRA ({kind}): only plain LoRA adapters are continued."
        )
    for module in peft_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _checked(peft_model)


def _checked(peft_model: Any) -> LoraModel:
    """Refuse adapters on head or embeddings: the learner runs the head in slices, and they may be tied."""
    model = peft_model.get_base_model()
    for layer in (model.get_output_embeddings(), model.get_input_embeddings()):
        if _adapted(layer):
            raise UnsupportedAdapterError(
                "Adapters on the head or the embeddings are not supported: "
                "leave them out of learner.lora.targets."
            )
    return LoraModel(peft_model)


def _adapted(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _delta(layer: str, module: Any, trained: dict[str, Tensor]) -> Tensor:
    """`[out, in]` float32 update `scaling * B @ A` of one adapted linear layer."""
    (adapter,) = module.active_adapters

    def weight(side: str) -> Tensor:
        own = getattr(module, side)[adapter].weight
        return trained.get(f"{layer}.{side}.{adapter}.weight", own).float()

    update = weight("lora_B") @ weight("lora_A") * module.scaling[adapter]
    return update.T if getattr(module, "fan_in_fan_out", False) else update
