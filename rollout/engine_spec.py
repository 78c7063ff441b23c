"""`EngineSpec`: all that builds one engine, and what follows for cores and memory. Needs no vLLM."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTO_KV_LIMIT = 4 << 30
"""Most bytes that a KV cache of automatic size takes on a CPU."""

CPU_BLOCK = 32

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(slots=True, kw_only=True, frozen=True)
class EngineSpec:
    """All that builds one engine: plain values, so that it crosses into a child process."""

    model: str
    """Folder of the model in Hugging Face format."""
    tokenizer: str = ""
    """Folder of the tokenizer, read for stop strings only; empty means `model`."""
    dtype: str = "bfloat16"
    """`bfloat16`, `float16`, `float32`: weights, activations and KV cache."""
    numerics: str = "standard"
    """As `rollout.config.Numerics`. With `layercast` `dtype` is bfloat16 and that of the weights only."""
    max_model_len: int
    """Most tokens of a prompt and its response together."""
    max_num_seqs: int = 256
    """Most responses that decode at once."""
    kv_cache_bytes: int = 0
    """Size of the KV cache. 0 on a CPU: room for `max_num_seqs` full sequences, at most 4 GiB; 0 on a GPU:
    what `gpu_memory` leaves."""
    block_size: int = 0
    """Tokens a KV block; 0: 32 on a CPU, vLLM's choice on a GPU. Prefixes are shared in whole blocks, and
    on a CPU the time of attention grows with whole blocks (32 halves it against vLLM's 128)."""
    prefix_caching: bool = True
    threads: int = 0
    """Threads that compute; 0 means `OMP_NUM_THREADS`, or every core that this process may use."""
    eager: bool = False
    """Skip compilation."""
    seed: int = 0
    """Seed of the engine itself; every request carries its own."""
    transport: str = ""
    """Backend of vLLM's weight transfer (`shm`, `ipc`, `nccl`); empty: this engine takes no new weights."""
    tensor_parallel: int = 1
    gpu_memory: float = 0.45
    """Share of a GPU's memory that the engine may take."""
    sleep_mode: bool = False
    """Whether the engine can `sleep`: vLLM takes GPU memory otherwise then. Not on a CPU."""
    trust_remote_code: bool = False
    preload: bool = True
    """Child process only: preload tcmalloc and Intel's OpenMP where they are found."""
    log_path: str = ""
    """Child process only: the file that takes its output; empty means a temporary one."""

    @property
    def compute_dtype(self) -> str:
        """The number format of activations and KV cache."""
        return "float32" if self.numerics == "layercast" else self.dtype


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(threads: int) -> int:
    """`threads`, or for 0 `OMP_NUM_THREADS`, or every usable core."""
    return threads or int(os.environ.get("OMP_NUM_THREADS") or usable_cores())


def kv_cache_bytes(spec: EngineSpec) -> int:
    """Bytes of KV cache for `max_num_seqs` full sequences of `spec`'s model, at most `AUTO_KV_LIMIT`.

    Raises ValueError when the model's `config.json` does not name its sizes.
    """
    config = text_config(spec.model)
    try:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        layers = config["num_hidden_layers"]
    except KeyError as error:
        raise ValueError(
            f"The size of the KV cache of {spec.model} cannot be told: its config.json has no {error}. "
            "Set rollout.kv_cache_gib."
        ) from None
    token = 2 * layers * heads * head_dim * DTYPE_BYTES[spec.compute_dtype]
    return automatic_cache_bytes(token, spec.max_num_seqs, spec.max_model_len, spec.block_size)


def automatic_cache_bytes(token_bytes: int, sequences: int, length: int, block_size: int = 0) -> int:
    """Bytes that hold `sequences` of `length` tokens and one more each in whole blocks (0: `CPU_BLOCK`).

    `token_bytes` is what one token takes in all layers. At most `AUTO_KV_LIMIT`.
    """
    block = block_size or CPU_BLOCK
    blocks = sequences * -(-(length + 1) // block) + 1
    return min(blocks * block * token_bytes, AUTO_KV_LIMIT)


def max_positions(folder: str) -> int | None:
    """Most tokens of a sequence that the model in `folder` was made for; None when it does not say.

    As vLLM counts: linear and dynamic rope scaling stretch `max_position_embeddings`, others are in it.
    """
    config = text_config(folder)
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int):
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stretched = rope.get("rope_type", rope.get("type")) in {"linear", "dynamic"}
    return int(limit * rope.get("factor", 1.0)) if stretched else limit


def text_config(folder: str) -> dict[str, Any]:
    """`config.json` of the model in `folder`, of its text part where it has several.

    Raises ValueError without such a file.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(
            f"The engine's model {folder} has no config.json: give a folder in Hugging Face format."
        )
    config = json.loads(path.read_text())
    return config.get("text_config", config)
