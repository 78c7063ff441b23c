"""What rank 0 and the others tell each other: a command, plain arguments and arrays, as bytes. No pickle.

How the bytes travel is `trainer.parallel.channel`'s matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from trainer.batch import Row

_HEAD = 8
"""Bytes before the JSON that say how long it is."""
_COLUMNS = ("advantages", "token_weights", "rollout_logprobs")
_OPTIONAL = ("old_logprobs", "reference_logprobs")


@dataclass(slots=True)
class Message:
    """One command, or the answer to one."""

    command: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """What JSON can hold."""
    arrays: dict[str, Tensor] = field(default_factory=dict)

    def encode(self) -> bytes:
        """As bytes."""
        plain = json.dumps([self.command, self.arguments]).encode()
        return len(plain).to_bytes(_HEAD, "little") + plain + save(self.arrays)

    @classmethod
    def decode(cls, content: bytes) -> Message:
        """What `encode` was called on; the arrays lie on the CPU."""
        start = _HEAD + int.from_bytes(content[:_HEAD], "little")
        command, arguments = json.loads(content[_HEAD:start])
        return cls(command, arguments, load(content[start:]))


def rows_to_arrays(batches: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
    """Lists of rows as a handful of arrays, each prompt once. Numbers per token become float32."""
    rows = [row for batch in batches for row in batch]
    prompts = {tuple(row.prompt_ids): None for row in rows}
    places = {prompt: place for place, prompt in enumerate(prompts)}
    arrays = {
        "batches": torch.tensor([len(batch) for batch in batches], dtype=torch.int64),
        "prompts": _flat(prompts, torch.int32),
        "prompt_lengths": _lengths(prompts),
        "prompt_of": torch.tensor([places[tuple(row.prompt_ids)] for row in rows], dtype=torch.int64),
        "responses": _flat([row.response_ids for row in rows], torch.int32),
        "response_lengths": _lengths([row.response_ids for row in rows]),
        "groups": torch.tensor([row.group for row in rows], dtype=torch.int64),
        "slots": torch.tensor([row.slot for row in rows], dtype=torch.int64),
    }
    for name in _COLUMNS:
        arrays[name] = _flat([getattr(row, name) for row in rows], torch.float32)
    for name in _OPTIONAL:
        values = [getattr(row, name) for row in rows]
        arrays[f"has_{name}"] = torch.tensor([value is not None for value in values], dtype=torch.bool)
        arrays[name] = _flat([value for value in values if value is not None], torch.float32)
    return arrays


def rows_from_arrays(arrays: dict[str, Tensor]) -> list[list[Row]]:
    """The lists of rows that `rows_to_arrays` was given."""
    lengths: list[int] = arrays["response_lengths"].tolist()
    prompts = _split(arrays["prompts"], arrays["prompt_lengths"].tolist())
    columns = {name: _split(arrays[name], lengths) for name in _COLUMNS}
    optional = {name: _sparse(arrays[name], arrays[f"has_{name}"].tolist(), lengths) for name in _OPTIONAL}
    rows = [
        Row(
            prompt_ids=prompts[place],
            response_ids=response,
            group=group,
            slot=slot,
            advantages=columns["advantages"][index],
            token_weights=columns["token_weights"][index],
            rollout_logprobs=columns["rollout_logprobs"][index],
            old_logprobs=optional["old_logprobs"][index],
            reference_logprobs=optional["reference_logprobs"][index],
        )
        for index, (place, response, group, slot) in enumerate(
            zip(
                arrays["prompt_of"].tolist(),
                _split(arrays["responses"], lengths),
                arrays["groups"].tolist(),
                arrays["slots"].tolist(),
            )
        )
    ]
    following = iter(rows)
    return [[next(following) for _ in range(size)] for size in arrays["batches"].tolist()]


def _flat(lists: Iterable[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([value for values in lists for value in values], dtype=dtype)


def _lengths(lists: Iterable[Sequence[float]]) -> Tensor:
    return torch.tensor([len(values) for values in lists], dtype=torch.int64)


def _split(flat: Tensor, lengths: Sequence[int]) -> list[list[Any]]:
    return [part.tolist() for part in flat.split(list(lengths))]


def _sparse(flat: Tensor, present: Sequence[bool], lengths: Sequence[int]) -> list[list[float] | None]:
    """One list where `present`, None elsewhere."""
    parts = iter(_split(flat, [length for length, there in zip(lengths, present) if there]))
    return [next(parts) if there else None for there in present]
