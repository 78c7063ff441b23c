"""What travels with the weights: where each tensor lies, and digests that bind bytes to name and shape.

Two digests prove two things. `content_digest` is taken of all bytes at the source and again by the receiver
before it installs anything. `proof_digest` is taken of a band of columns, by the learner of what it sent and
by the engine of what it read back *out of the live model* after installing; its seed is drawn anew for every
publish, so no answer of an earlier one can pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import xxhash

ALIGNMENT = 64
"""Bytes; a cache line."""


@dataclass(slots=True, kw_only=True)
class Entry:
    """One tensor in the segment."""

    name: str
    """Its Hugging Face name."""
    dtype: str
    """As in `torch.<dtype>`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the segment."""
    digest: str = ""
    """`content_digest` of the bytes as the learner held them."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as torch's object."""
        return getattr(torch, self.dtype)

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize


@dataclass(slots=True, kw_only=True)
class Manifest:
    """Everything an engine needs to verify and install one version. Crosses processes, plain values only."""

    version: int
    seed: int
    """Seeds the proof digests; new for every publish."""
    columns: int
    """Columns of each matrix that are read back, 0 for all; below 0 nothing is read back."""
    entries: list[Entry] = field(default_factory=list)

    def band(self, width: int) -> tuple[int, int]:
        """Columns `[start, end)` of a matrix `width` wide to read back; versions walk across it."""
        if self.columns <= 0 or self.columns >= width:
            return 0, width
        bands = -(-width // self.columns)
        start = (self.version - 1) % bands * self.columns
        return start, min(start + self.columns, width)


@dataclass(slots=True, kw_only=True)
class Proof:
    """What one module of the live model gave back for one published tensor."""

    name: str
    """The published tensor's Hugging Face name."""
    module: str
    """The engine's module, e.g. `model.layers.0.self_attn.qkv_proj`."""
    digest: str
    differing: float = 0.0
    """Share of the values read back that differ from the transferred ones."""
    distance: float = 0.0
    """Largest such difference."""


def lay_out(tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[dict[str, Entry], int]:
    """Give each `(name, shape, dtype)` its place; returns the entries by name and the segment's bytes.

    Same-named parameters of sibling modules are neighbours (all weights of an attention block, then all its
    biases), so that tensors which an engine fuses (q, k, v; gate, up) can be installed from one view, not
    copied together first.
    """
    siblings: dict[tuple[str, str], list[tuple[str, tuple[int, ...], torch.dtype]]] = {}
    for name, shape, dtype in tensors:
        module, _, parameter = name.rpartition(".")
        siblings.setdefault((module.rpartition(".")[0], parameter), []).append((name, shape, dtype))
    entries: dict[str, Entry] = {}
    offset = 0
    for group in siblings.values():
        for name, shape, dtype in group:
            entries[name] = Entry(
                name=name, dtype=str(dtype).removeprefix("torch."), shape=shape, offset=offset
            )
            offset += -(-entries[name].size // ALIGNMENT) * ALIGNMENT
    return entries, max(offset, ALIGNMENT)


def content_digest(entry: Entry, data: torch.Tensor) -> str:
    """Hash of all bytes of `data` (contiguous, on the CPU) with the entry's name, shape and dtype."""
    return _digest(entry.name, entry.dtype, entry.shape, data, seed=0)


def proof_digest(name: str, values: torch.Tensor, seed: int) -> str:
    """Hash of a band of `canonical` values."""
    dtype = str(values.dtype).removeprefix("torch.")
    return _digest(name, dtype, tuple(values.shape), values.contiguous(), seed)


def canonical(values: torch.Tensor) -> torch.Tensor:
    """`values` with -0 and subnormals as +0: a matrix product with a one-hot vector gives back no others."""
    return torch.nn.functional.hardshrink(values, torch.finfo(values.dtype).tiny)


def _digest(name: str, dtype: str, shape: Sequence[int], data: torch.Tensor, seed: int) -> str:
    state = xxhash.xxh3_128(f"{name} {dtype} {list(shape)}".encode(), seed=seed)
    state.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
