"""LoRA through PEFT: put adapters into a model, switch them off, merge them for publishing, save them.

PEFT is imported only when an adapter is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_BASE = ".base_layer."
"""What PEFT puts into the name of a wrapped layer's own weight."""
_ROOT = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""
_BEYOND_PLAIN = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Settings of PEFT's `LoraConfig` that make an adapter more than `scaling * B @ A` on linear layers."""


Whole = Callable[[Tensor], Tensor]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


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

    def save(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Write the adapter in PEFT's format, in the precision of `trained` (see `merged`).

        Raises:
            ValueError: `trained` lacks an adapter weight that is trained.
        """
        weights = {
            f"{_ROOT}{name}": _trained(name, parameter, trained)
            for name, parameter in self.model.named_parameters()
            if "lora_" in name
        }
        self._peft.save_pretrained(str(folder), state_dict=weights)

    def merged(
        self, dtype: torch.dtype, trained: Mapping[str, Tensor], whole: Whole = _as_it_is
    ) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, adapters added in, without touching the model.

        The sum is taken in float32 and rounded once to `dtype`. `trained` gives the trained adapter weights
        by parameter name: the optimizer's float32 masters, of which the module's own may be rounded copies.
        `whole` gives all of a parameter of which this process may hold a part.

        Raises:
            ValueError: `trained` lacks an adapter weight that is trained.
        """
        for name, weight, _ in self._merged(dtype, trained, whole):
            yield name, weight

    @torch.no_grad()
    def merge_gap(self, dtype: torch.dtype, trained: Mapping[str, Tensor], whole: Whole = _as_it_is) -> float:
        """How much of the adapter is lost when rounded into weights of `dtype`; see `merged` for the rest.

        `|round(W + BA) - (W + BA)| / |BA|`, Frobenius norms over all adapted layers together: 0 is exact, 1
        means that rounding is as large as the update. 0 while the adapter is still zero.
        """
        lost = update = 0.0
        for _, weight, exact in self._merged(dtype, trained, whole):
            if exact is not None:
                total, delta = exact
                lost += (weight.float() - total).square().sum().item()
                update += delta.square().sum().item()
        return (lost / update) ** 0.5 if update else 0.0

    @torch.no_grad()
    def _merged(
        self, dtype: torch.dtype, trained: Mapping[str, Tensor], whole: Whole = _as_it_is
    ) -> Iterator[tuple[str, Tensor, tuple[Tensor, Tensor] | None]]:
        """`(name, merged, (float32 sum, float32 update) or None)` for every weight of the base model.

        One update exists at a time: together they are as large as the model.
        """
        model = self.model
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                continue
            layer = name.split(_BASE)[0]
            if _BASE in name and name.endswith(".weight"):
                delta = _delta(layer, model.get_submodule(layer), trained)
                total = whole(parameter.detach()).float() + delta
                yield name.replace(_BASE, "."), total.to(dtype), (total, delta)
            else:
                yield name.replace(_BASE, "."), whole(parameter.detach().to(dtype)), None


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
        ValueError: the adapter is not plain LoRA (DoRA, trained biases, whole parameters or extra modules),
            so it would not merge into the same weights. The model is untouched then.
    """
    from peft import PeftConfig, PeftModel

    extra = _beyond_plain(PeftConfig.from_pretrained(str(folder)))
    if extra is not None:
        raise ValueError(
            f"The adapter in {folder} is not plain LoRA ({extra}): only plain LoRA adapters are continued."
        )
    peft_model = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)
    for module in peft_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _checked(peft_model)


def _beyond_plain(config: Any) -> str | None:
    """The setting of a PEFT config that plain LoRA does not have, as `name=value`; None when none is."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"peft_type={kind}"
    if config.bias != "none":
        return f"bias={config.bias}"
    return next((f"{key}={value}" for key in _BEYOND_PLAIN if (value := getattr(config, key, None))), None)


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


def _trained(name: str, own: nn.Parameter, trained: Mapping[str, Tensor]) -> Tensor:
    """The trained weight of adapter parameter `name`; the module's `own` where training leaves it alone."""
    if name in trained:
        return trained[name]
    if own.requires_grad:
        raise ValueError(f"The trained weights of the adapter lack {name}: give one for every parameter.")
    return own.detach()


def _delta(layer: str, module: Any, trained: Mapping[str, Tensor]) -> Tensor:
    """`[out, in]` float32 update `scaling * B @ A` of one adapted linear layer."""
    (adapter,) = module.active_adapters

    def weight(side: str) -> Tensor:
        own = getattr(module, side)[adapter].weight
        return _trained(f"{layer}.{side}.{adapter}.weight", own, trained).float()

    update = weight("lora_B") @ weight("lora_A") * module.scaling[adapter]
    return update.T if getattr(module, "fan_in_fan_out", False) else update
