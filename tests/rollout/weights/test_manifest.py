"""Where tensors lie in the segment, and digests that bind bytes to name, format and shape."""

from __future__ import annotations

import math

import pytest
import torch
import xxhash

from rollout.weights.manifest import Entry, Manifest, canonical, content_digest, lay_out, proof_digest


def test_parameters_that_engines_fuse_are_neighbours() -> None:
    """Qwen2's order is q.weight, q.bias, k.weight, k.bias, ...: all weights come first, then all biases."""
    block = "model.layers.0.self_attn"
    names = [f"{block}.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    shapes = {"weight": (32, 64), "bias": (32,)}
    entries, size = lay_out((name, shapes[name.rpartition(".")[2]], torch.bfloat16) for name in names)
    offsets = [entries[f"{block}.{part}_proj.weight"].offset for part in "qkv"]
    assert offsets == [0, 4096, 8192]
    assert [entries[f"{block}.{part}_proj.bias"].offset for part in "qkv"] == [12288, 12352, 12416]
    assert size == 12480


def test_places_are_aligned_and_do_not_overlap() -> None:
    entries, size = lay_out([("a.weight", (3, 5), torch.float32), ("b.weight", (7,), torch.bfloat16)])
    assert [(e.offset, e.size) for e in entries.values()] == [(0, 60), (64, 14)]
    assert size == 128


def test_an_empty_source_still_has_a_segment() -> None:
    assert lay_out([]) == ({}, 64)


def test_content_digest_is_xxh3_of_header_and_bytes() -> None:
    data = torch.arange(6, dtype=torch.float32).view(2, 3)
    entry = Entry(name="w", dtype="float32", shape=(2, 3), offset=0)
    expected = xxhash.xxh3_128(b"w float32 [2, 3]" + data.numpy().tobytes()).hexdigest()
    assert content_digest(entry, data) == expected


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "bytes", "order"])
def test_content_digest_binds_everything(change: str) -> None:
    data = torch.arange(6, dtype=torch.float32).view(2, 3)
    entry = Entry(name="w", dtype="float32", shape=(2, 3), offset=0)
    first = content_digest(entry, data)
    other = data
    if change == "name":
        entry.name = "v"
    elif change == "dtype":
        entry.dtype = "int32"
    elif change == "shape":
        entry.shape = (3, 2)
    elif change == "bytes":
        other = data.clone()
        other.view(torch.uint8)[1, 3] ^= 1
    else:
        other = data.flip(0)  # a sum over elements would not see it
    assert content_digest(entry, other) != first


def test_proof_digest_depends_on_the_seed() -> None:
    values = torch.ones(4)
    assert proof_digest("w", values, 1) == proof_digest("w", values.clone(), 1)
    assert proof_digest("w", values, 1) != proof_digest("w", values, 2)


def test_canonical_values_are_those_that_a_product_can_give_back() -> None:
    values = torch.tensor([-0.0, 0.0, 1e-40, -1e-40, 1.5, -2.0, math.inf])
    assert canonical(values).tolist() == [0, 0, 0, 0, 1.5, -2, math.inf]
    assert math.copysign(1, canonical(values)[0].item()) == 1
    narrow = torch.tensor([-0.0, 1e-39, 3.0], dtype=torch.bfloat16)
    assert canonical(narrow).dtype is torch.bfloat16
    assert canonical(narrow).tolist() == [0, 0, 3]


def test_successive_versions_read_every_column_back() -> None:
    seen: list[int] = []
    for version in range(1, 6):
        start, end = Manifest(version=version, seed=0, columns=16).band(72)
        seen += range(start, end)
    assert seen == list(range(72))
    assert Manifest(version=6, seed=0, columns=16).band(72) == (0, 16)
    assert Manifest(version=3, seed=0, columns=0).band(72) == (0, 72)
    assert Manifest(version=3, seed=0, columns=100).band(72) == (0, 72)
