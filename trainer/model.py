"""Models as the learner needs them: loading, freezing, names and tensors for publishing and saving."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def load_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in a Hugging Face folder, float32, on CPU, in evaluation mode.

    float32 because these become the master weights; the learner casts its working copy itself.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    return model.eval()


def parameter_shapes(folder: Path, *, trust_remote_code: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that the model in a Hugging Face folder has, by name; no weights are read."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def freeze(module: nn.Module, patterns: Sequence[str]) -> int:
    """Stop training parameters whose name matches a pattern; returns how many were frozen.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    frozen = 0
    names = dict(module.named_parameters())
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ValueError(
                f"learner.freeze pattern {pattern} matches no parameter: names look like {next(iter(names))}."
            )
        for name in matches:
            frozen += int(names[name].requires_grad)
            names[name].requires_grad_(False)
    return frozen


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """One tensor of a `WeightStream`, without its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightStream:
    """The learner's weights under Hugging Face names, tied ones once; every iteration is a fresh pass.

    Has the shape of vLLM's `WeightSource`: iterate for `(name, tensor)`, `metadata()` for what will come.
    """

    def __init__(self, produce: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """`produce` starts a fresh pass over `(name, tensor)`."""
        self._produce = produce

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """One `(name, tensor)` after another, detached; valid until the learner's next update."""
        return iter(self._produce())

    def metadata(self) -> list[WeightInfo]:
        """Name, dtype and shape of every tensor, in the order of iteration."""
        return [WeightInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]


def hub_names(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """`weights` under the names and in the shapes of the checkpoint on disk.

    transformers 5 renames and fuses some weights while it loads (mixtures of experts above all); engines and
    files want the original ones. Models without such conversions pass straight through.
    """
    if not getattr(model, "_weight_conversions", None):
        return weights
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(weights)).items()


def save_model(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write a Hugging Face folder (without tokenizer) of `model`'s kind with `weights`, the weights first.

    The generation config is written as it came: transformers refuses to save some that it loads (a
    temperature beside `do_sample=false`), and training does not depend on it.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = next(iter(state.values())).dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.to_json_file(
            folder / "generation_config.json", keys_to_pop=["compile_config"]
        )
