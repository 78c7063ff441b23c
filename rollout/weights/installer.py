"""Installs published tensors into a live vLLM model on a CPU, and reads them back out of it.

vLLM's own layer-wise reload is not used, for two reasons (vLLM 0.32, measured on 2026-11). It leaves a tied
head stale: the CPU back end multiplies by a repacked copy of the head's weight, and the reload repacks the
embedding, not the head that shares its parameter. And it copies every weight three times. Here the unit is a
vLLM module (q, k and v together; gate and up together): its weight is a view of the transferred memory, and
vLLM's own `process_weights_after_loading` repacks it from there.

Reading back asks the kernels that generate: a linear layer multiplies one-hot rows, which gives exactly the
columns of its repacked weight, whatever the packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rollout.layercast_layers import LayerCastEmbeddingMethod, LayerCastLinearMethod
from rollout.weights.manifest import Entry, Manifest, Proof, canonical, proof_digest

PLAIN = (
    UnquantizedLinearMethod,
    UnquantizedEmbeddingMethod,
    LayerCastLinearMethod,
    LayerCastEmbeddingMethod,
)
"""Methods whose weight is what was published, repacked or not."""


@dataclass(slots=True, kw_only=True)
class Unit:
    """One vLLM module that owns parameters: installed, skipped and read back as a whole."""

    path: str
    module: Any
    """The `nn.Module`; `Any`, for it is asked for what only vLLM's have."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Published names of each parameter, in the order in which the module stacks them."""
    tied_to: Unit | None = None
    """The unit whose weight this one shares; it owns none of its own."""

    @property
    def names(self) -> list[str]:
        """Every published tensor that it is made of."""
        own = [name for names in self.sources.values() for name in names]
        return own + (self.tied_to.names if self.tied_to else [])

    @property
    def packs(self) -> bool:
        """Whether vLLM multiplies by a repacked copy of its weight."""
        return getattr(self.module, "cpu_linear", nn.functional.linear) is not nn.functional.linear

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of a parameter as vLLM loads it, also when the live one was emptied by repacking."""
        live = self.module._parameters[parameter]
        assert live is not None
        return tuple(get_layerwise_info(self.module).restore_metadata[0].get(parameter, live).shape)


class Installer:
    """Knows how the tensors that a learner publishes make up one vLLM model."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Read the structure of `model`, published in `dtype`. Raises ValueError when it is not a dense
        unquantized one."""
        self._dtype = dtype
        self._mapper = getattr(model, "hf_to_vllm_mapper", None)
        fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
        self._fused = {whole: list(shards) for whole, shards in fused.items()}
        self._shards = {
            shard: (whole, i) for whole, shards in fused.items() for i, shard in enumerate(shards)
        }
        self._units = _units(model)
        self._parameters = {
            f"{unit.path}.{name}": (unit, name)
            for unit in self._units.values()
            if unit.tied_to is None
            for name, parameter in unit.module._parameters.items()
            if parameter is not None
        }
        _free_unused_packing(list(self._units.values()))

    def problems(self, manifest: Manifest) -> list[str]:
        """Why the tensors of `manifest` do not make up this model, if they do not. Touches nothing live."""
        self._assign(manifest)
        found = [f"{name} is unexpected" for name in self._unknown]
        entries = {entry.name: entry for entry in manifest.entries}
        for unit, parameter in self._parameters.values():
            placed = [entries[name] for name in unit.sources.get(parameter, ())]
            missing = list(self._missing(unit, parameter, placed))
            found += missing or self._mismatches(unit, parameter, placed)
        return found

    def install(self, tensors: Mapping[str, Tensor], unchanged: frozenset[str] = frozenset()) -> None:
        """Install every unit, save those made of `unchanged` tensors only.

        `problems` must have found none for these names.
        """
        with torch.no_grad():
            for unit in self._units.values():
                if not unchanged.issuperset(unit.names):
                    _install(unit, tensors)

    def read_back(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> list[Proof]:
        """Read a band of every published matrix (and all of every vector) out of the live model.

        `tensors` are the transferred ones; what differs from them is measured.
        """
        proofs: list[Proof] = []
        with torch.no_grad():
            for unit in self._units.values():
                sources = unit.sources or (unit.tied_to.sources if unit.tied_to else {})
                for parameter, names in sources.items():
                    values = _live_values(unit, parameter, manifest).to(self._dtype)
                    counts = [tensors[name].shape[0] for name in names]
                    parts = values[: sum(counts)].split(counts)
                    proofs += [
                        _proof(n, unit.path, part, tensors[n], manifest) for n, part in zip(names, parts)
                    ]
        return proofs

    def _assign(self, manifest: Manifest) -> None:
        """Find the module and the place in it of every published name."""
        self._unknown: list[str] = []
        placed: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for entry in manifest.entries:
            target, order = self._target(entry.name)
            if target in self._parameters:
                unit, parameter = self._parameters[target]
                placed.setdefault((unit.path, parameter), []).append((order, entry.name))
            else:
                self._unknown.append(entry.name)
        for unit in self._units.values():
            unit.sources = {
                parameter: [name for _, name in sorted(placed[unit.path, parameter])]
                for parameter in unit.module._parameters
                if (unit.path, parameter) in placed
            }

    def _target(self, name: str) -> tuple[str, int]:
        """vLLM's parameter that a published tensor belongs to, and its order among those stacked there."""
        mapped = self._mapper.map_name(name) if self._mapper is not None else name
        leaf = _module_leaf(name)
        whole, order = self._shards.get(leaf, (leaf, 0))
        if mapped is None or mapped in self._parameters:
            return mapped or name, order
        module, _, parameter = mapped.rpartition(".")
        return f"{module.rpartition('.')[0]}.{whole}.{parameter}", order

    def _missing(self, unit: Unit, parameter: str, placed: list[Entry]) -> Iterator[str]:
        parent, _, leaf = unit.path.rpartition(".")
        there = {_module_leaf(entry.name) for entry in placed}
        if len(placed) == 1 and leaf in there:  # published in one piece
            return
        for shard in self._fused.get(leaf, [leaf]):
            if shard not in there:
                yield f"{parent}.{shard}.{parameter} is missing".removeprefix(".")

    def _mismatches(self, unit: Unit, parameter: str, placed: list[Entry]) -> Iterator[str]:
        rows, *rest = unit.shape(parameter)
        if isinstance(unit.module, VocabParallelEmbedding):
            rows = unit.module.org_vocab_size  # padded beyond
        counts = unit.module.output_partition_sizes if len(placed) > 1 else [rows]
        for entry, count in zip(placed, counts):
            if entry.shape != (count, *rest):
                yield f"{entry.name} has shape {list(entry.shape)}, the engine's is {[count, *rest]}"
            if entry.torch_dtype != self._dtype:
                expected = str(self._dtype).removeprefix("torch.")
                yield f"{entry.name} is {entry.dtype}, the engine's is {expected}"


def _units(model: nn.Module) -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    owner: dict[int, Unit] = {}
    # Heads last: one that shares an embedding's weight is repacked after that has been replaced.
    for path, module in sorted(model.named_modules(), key=lambda item: isinstance(item[1], ParallelLMHead)):
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        if not parameters:
            continue
        _refuse_special(path, module, parameters)
        unit = units[path] = Unit(path=path, module=module)
        weight = parameters.get("weight")
        if weight is not None:
            first = owner.setdefault(id(weight), unit)
            unit.tied_to = first if first is not unit else None
    return units


def _refuse_special(path: str, module: nn.Module, parameters: Mapping[str, Any]) -> None:
    method = getattr(module, "quant_method", None)
    if method is not None and not isinstance(method, PLAIN):
        raise ValueError(
            f"Weights cannot be published into {path} ({type(method).__name__}): on a CPU, engines take "
            "dense unquantized models only."
        )
    for name, parameter in parameters.items():
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        if method is None and loader is not default_weight_loader:
            raise ValueError(
                f"Weights cannot be published into {path}.{name}: vLLM transforms it while loading, which is "
                "not known here."
            )


def _free_unused_packing(units: list[Unit]) -> None:
    """An embedding beside a head of its own never multiplies; its repacked copy would only go stale."""
    if not any(isinstance(unit.module, ParallelLMHead) for unit in units):
        return
    for unit in units:
        module = unit.module
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            unit.module.cpu_linear = nn.functional.linear


def _module_leaf(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _install(unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    module = unit.module
    loans: dict[str, nn.Parameter] = {}
    for parameter, names in unit.sources.items():
        value = _stacked([tensors[name] for name in names])
        live = module._parameters[parameter]
        assert live is not None
        if live.numel():
            live.data[: value.shape[0]].copy_(value)
        else:  # repacking emptied it, and will again
            loans[parameter] = nn.Parameter(value, requires_grad=False)
            module.register_parameter(parameter, loans[parameter])
    if unit.packs:
        module.quant_method.process_weights_after_loading(module)
    for parameter, loan in loans.items():
        if module._parameters[parameter] is loan:
            # vLLM could not repack it and goes on without: it must not live in the transferred memory.
            loan.data = loan.data.clone()


def _stacked(tensors: list[Tensor]) -> Tensor:
    """All tensors along the first dimension: a view where they are neighbours in memory, else a copy."""
    first = tensors[0]
    end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return torch.cat(tensors)
        end += tensor.nbytes
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _live_values(unit: Unit, parameter: str, manifest: Manifest) -> Tensor:
    """`[rows, band]` of a live matrix, or all of a live vector."""
    live = unit.module._parameters[parameter]
    assert live is not None
    if live.dim() == 1 and live.numel():
        return live
    width = unit.shape(parameter)[-1] if unit.tied_to is None else live.shape[-1]
    start, end = manifest.band(width)
    if parameter != "weight" or not unit.packs:
        return live[:, start:end]
    one_hot = torch.zeros(end - start, width, dtype=live.dtype)
    one_hot[torch.arange(end - start), torch.arange(start, end)] = 1
    return unit.module.cpu_linear(one_hot, live, None).t()


def _proof(name: str, path: str, values: Tensor, sent: Tensor, manifest: Manifest) -> Proof:
    values = canonical(values)
    proof = Proof(name=name, module=path, digest=proof_digest(name, values, manifest.seed))
    start, end = manifest.band(sent.shape[-1]) if sent.dim() > 1 else (0, 0)
    expected = canonical(sent[:, start:end] if sent.dim() > 1 else sent)
    if not torch.equal(values, expected):
        proof.differing = (values != expected).float().mean().item()
        proof.distance = (values.float() - expected.float()).abs().max().item()
    return proof
