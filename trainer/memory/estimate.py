"""Memory of learner and engine before anything is loaded: arithmetic over a model's dimensions.

The structural terms (weights, gradients, moments, cache) are exact counts. Four constants cannot be
counted: that of the learner's process is measured, the others were fitted on the demo
(`tests/benchmarks/memory_estimate.py` reports the error elsewhere).
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.memory.config import ActivationCheckpointing

PROCESS_BYTES = 0.45e9
"""Resident memory of a learner's process without a model: torch, transformers and what a run imports."""
ENGINE_PROCESS_BYTES = 1.15e9
"""Resident memory of an engine process beside weights and cache: interpreter, vLLM, work space."""
ACTIVATION_FACTOR = 1.15
"""Measured over counted activation bytes: allocator slack and what autograd keeps besides."""
KEPT_BYTES = 0.45e9
"""Memory of learner and engine each beyond what is counted: above all, we take it, freed tensors that malloc
keeps. It grows with the steps; this lies between the demo's after 40 of them and after 110."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions that memory depends on."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @classmethod
    def read(cls, folder: Path) -> ModelShape:
        """Read a Hugging Face `config.json`. Raises `KeyError` when a dimension is missing."""
        raw = json.loads((folder / "config.json").read_text())
        heads = raw["num_attention_heads"]
        return cls(
            hidden=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            intermediate=raw["intermediate_size"],
            vocabulary=raw["vocab_size"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            tied=bool(raw.get("tie_word_embeddings", False)),
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: attention, gated MLP, two norms."""
        return sum(self._layer_sizes().values())

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden

    def trained_share(self, frozen: Sequence[str]) -> float:
        """Share of the parameters that no pattern of `frozen` matches, under Llama's and Qwen's names."""
        sizes = {"model.embed_tokens.weight": self.vocabulary * self.hidden, "model.norm.weight": self.hidden}
        if not self.tied:
            sizes["lm_head.weight"] = self.vocabulary * self.hidden
        for layer in range(self.layers):
            sizes |= {f"model.layers.{layer}.{name}": size for name, size in self._layer_sizes().items()}
        matched = {name for pattern in frozen for name in fnmatch.filter(sizes, pattern)}
        return 1 - sum(sizes[name] for name in matched) / self.parameters

    def _layer_sizes(self) -> dict[str, int]:
        """Parameters of one decoder layer by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": self.hidden * queries,
            "self_attn.k_proj.weight": self.hidden * keys,
            "self_attn.v_proj.weight": self.hidden * keys,
            "self_attn.o_proj.weight": queries * self.hidden,
            "mlp.gate_proj.weight": self.hidden * self.intermediate,
            "mlp.up_proj.weight": self.hidden * self.intermediate,
            "mlp.down_proj.weight": self.intermediate * self.hidden,
            "input_layernorm.weight": self.hidden,
            "post_attention_layernorm.weight": self.hidden,
        }

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Cache that one token takes in the engine."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


_STATE = frozenset(
    {
        "weights",
        "master weights (fp32)",
        "optimizer states",
        "slices of weights (fp32)",
        "slices of optimizer states",
    }
)
"""Parts that stay between two steps."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by name, in the order in which they are printed."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of the parts, bytes."""
        return sum(self.parts.values())

    @property
    def state(self) -> float:
        """Bytes of weights and optimizer states: what `learner.memory.offload_state` moves."""
        return sum(size for name, size in self.parts.items() if name in _STATE)


def learner_memory(
    shape: ModelShape,
    *,
    tokens: int,
    compute_bytes: int = 2,
    activation_bytes: int = 0,
    master: bool = True,
    state_bytes: float = 8.0,
    trained_share: float = 1.0,
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    reference: bool = False,
) -> Estimate:
    """Peak of the learner: weights, fp32 masters, gradients, moments, activations, what malloc keeps.

    `tokens`: packed tokens of the largest micro-batch. `trained_share`: share of parameters that train.
    `state_bytes`: optimizer state of a parameter. `activation_bytes`: of one value, 0 for those of a weight.
    """
    trained = shape.parameters * trained_share
    width = activation_bytes or compute_bytes
    parts = {
        "process": PROCESS_BYTES,
        "weights": shape.parameters * compute_bytes * (2.0 if reference else 1.0),
        "master weights (fp32)": trained * 4.0 if master else 0.0,
        "gradients": trained * 4.0,
        "optimizer states": trained * state_bytes,
        "activations": tokens * _activation_bytes(shape, width, checkpointing) * ACTIVATION_FACTOR,
        "kept by malloc": KEPT_BYTES,
    }
    return Estimate({name: size for name, size in parts.items() if size})


def rank_memory(
    shape: ModelShape,
    *,
    tokens: int,
    shards: int,
    split: int = 1,
    compute_bytes: int = 2,
    activation_bytes: int = 0,
    state_bytes: float = 8.0,
    trained_share: float = 1.0,
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    reference: bool = False,
) -> Estimate:
    """Peak of one rank of a learner of which `shards` x `split` ranks hold a copy.

    Layers are split among `split` of them (`trainer.parallel.tensor`); other arguments as `learner_memory`.

    Slices are float32 (`trainer.parallel.sharding`). Gathered at once are what lies outside the layers and
    two layers, in compute precision, and their gradients on the way to the ranks, in float32 too.
    """
    outside = shape.parameters - shape.layers * shape.layer_parameters
    layer = shape.layer_parameters / split
    held = outside + shape.layers * layer
    trained = held * trained_share
    gathered = (outside + 2 * layer) * compute_bytes
    leaving = (outside + layer) * trained_share * (compute_bytes + 4.0)
    width = activation_bytes or compute_bytes
    parts = {
        "process": PROCESS_BYTES,
        "slices of weights (fp32)": held * 4.0 / shards * (2.0 if reference else 1.0),
        "gathered weights": gathered * (2.0 if reference else 1.0),
        "slices of gradients (fp32)": trained * 4.0 / shards,
        "gradients on their way": leaving,
        "slices of optimizer states": trained * state_bytes / shards,
        "activations": tokens * _activation_bytes(shape, width, checkpointing) * ACTIVATION_FACTOR,
        "kept by malloc": KEPT_BYTES,
    }
    return Estimate({name: size for name, size in parts.items() if size})


def checkpoint_memory(
    shape: ModelShape, *, trained_share: float = 1.0, state_bytes: float = 8.0, compute_bytes: int = 2
) -> float:
    """Bytes on the host that rank 0 of several takes besides, while it writes or reads a checkpoint.

    First the model in compute precision, then float32 weights and optimizer states, each whole. One process
    writes what it holds, without a copy.
    """
    training = shape.parameters * trained_share * (4.0 + state_bytes)
    return max(training, float(shape.parameters * compute_bytes))


def engine_memory(
    shape: ModelShape, *, kv_cache_bytes: float, weight_bytes: int = 2, repacked: bool = True
) -> Estimate:
    """Peak of one engine: weights, their copy in transit while they are installed, cache, process, malloc."""
    weights = float(shape.parameters * weight_bytes)
    parts = {
        "process": ENGINE_PROCESS_BYTES,
        "weights": weights,
        "weights in transit": weights if repacked else 0.0,
        "kv cache": kv_cache_bytes,
        "kept by malloc": KEPT_BYTES,
    }
    return Estimate({name: size for name, size in parts.items() if size})


def _activation_bytes(shape: ModelShape, width: int, checkpointing: ActivationCheckpointing) -> float:
    """Bytes that one token keeps for the backward pass.

    A layer keeps its two normalised inputs and residuals, q, k, v, the attention output and three MLP
    intermediates; with checkpointing its input, and if `selective` the results of its seven products, plus
    one layer in full.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = width * (6 * shape.hidden + 2 * (queries + keys) + 4 * shape.intermediate)
    if checkpointing is ActivationCheckpointing.none:
        return float(shape.layers * layer)
    kept = width * shape.hidden
    if checkpointing is ActivationCheckpointing.selective:
        kept += width * (queries + 2 * keys + 2 * shape.hidden + 2 * shape.intermediate)
    return shape.layers * kept + layer
