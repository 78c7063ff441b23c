"""A run's state as two files: tensors in `tensors.safetensors`, the rest in `state.json`. Never pickle.

What is read equals what was written: types of keys and tuples too, and floats to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rollout import row_json

TENSORS = "tensors.safetensors"
PLAIN = "state.json"

_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"
"""Tags of what JSON does not have: a tensor (by name in the other file), a tuple, a dictionary with keys that
are not text or that look like a tag."""


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write dictionaries, lists, tuples, tensors and plain values into `folder`.

    Raises ValueError for a value of another kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain = _plain(dict(state), "", tensors)
    save_file(tensors, folder / TENSORS)
    (folder / PLAIN).write_text(row_json.encode({"state": plain}) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """What `write` was given; the tensors lie on the CPU, in memory of their own."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    plain = row_json.decode((folder / PLAIN).read_text(encoding="utf-8"))
    state: dict[str, Any] = _restored(plain["state"], tensors)
    return state


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON's types; tensors go to `tensors` under the path that leads to them."""
    if isinstance(value, Tensor):
        while name in tensors:  # keys may hold slashes
            name += "'"
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        inside = {key: _plain(item, f"{name}/{key}".lstrip("/"), tensors) for key, item in value.items()}
        odd = any(not isinstance(key, str) or key.startswith("__") for key in inside)
        return {_PAIRS: [[key, item] for key, item in inside.items()]} if odd else inside
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    return value


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_restored(item, tensors) for item in value[_TUPLE])
    if _PAIRS in value:
        return {key: _restored(item, tensors) for key, item in value[_PAIRS]}
    return {key: _restored(item, tensors) for key, item in value.items()}
