"""Rows to padding-free micro-batches under a token budget, a group's prompt laid down once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from trainer.batch import GroupSpan, Row, TokenBatch


@dataclass(slots=True, kw_only=True)
class _Unit:
    """Rows of one group that stand behind one copy of their prompt."""

    indices: list[int]
    length: int
    """Packed tokens."""


def pack(rows: Sequence[Row], token_budget: int, share_prompts: bool) -> list[TokenBatch]:
    """Pack `rows` into micro-batches of at most `token_budget` tokens each.

    Rows with an empty response carry nothing to learn and are left out; `TokenBatch.row_indices` names the
    rows that are in. A group over the budget is split and its prompt repeated. A single row over the budget
    gets a micro-batch of its own. The result is a function of the rows and their order alone.

    Raises:
        ValueError: rows of one group have different prompts, a prompt is empty, or a list of a row does not
            have one entry a response token.
    """
    units = _units(rows, token_budget, share_prompts)
    return [_token_batch(rows, units_of_bin) for units_of_bin in _first_fit(units, token_budget)]


def packed_length(row: Row) -> int:
    """Tokens that `row` adds behind its prompt: the last response token is only a target."""
    return len(row.response_ids) - 1


def _units(rows: Sequence[Row], token_budget: int, share_prompts: bool) -> list[_Unit]:
    """Rows gathered by group; a group that would go over the budget goes on in a new unit."""
    units: list[_Unit] = []
    open_units: dict[int, _Unit] = {}
    for index, row in enumerate(rows):
        if not row.response_ids:
            continue
        _check_row(row, index)
        unit = open_units.get(row.group) if share_prompts else None
        if unit is not None and rows[unit.indices[0]].prompt_ids != row.prompt_ids:
            raise ValueError(
                f"Rows of group {row.group} have different prompts: give each prompt its own group."
            )
        if unit is None or unit.length + packed_length(row) > token_budget:
            unit = _Unit(indices=[], length=len(row.prompt_ids))
            open_units[row.group] = unit
            units.append(unit)
        unit.indices.append(index)
        unit.length += packed_length(row)
    return units


def _check_row(row: Row, index: int) -> None:
    if not row.prompt_ids:
        raise ValueError(f"Row {index} has an empty prompt: the first response token needs a predecessor.")
    for name in ("advantages", "token_weights", "rollout_logprobs", "old_logprobs", "reference_logprobs"):
        values = getattr(row, name)
        if values is not None and len(values) != len(row.response_ids):
            raise ValueError(
                f"Row {index}: {name} has {len(values)} entries for {len(row.response_ids)} response tokens."
            )


def _first_fit(units: Iterable[_Unit], token_budget: int) -> list[list[_Unit]]:
    """First-fit decreasing: near the fewest micro-batches, and units of like length side by side."""
    bins: list[tuple[int, list[_Unit]]] = []
    for unit in sorted(units, key=lambda unit: -unit.length):
        for place, (used, content) in enumerate(bins):
            if used + unit.length <= token_budget:
                content.append(unit)
                bins[place] = (used + unit.length, content)
                break
        else:
            bins.append((unit.length, [unit]))
    return [content for _, content in bins]


def _token_batch(rows: Sequence[Row], units: Sequence[_Unit]) -> TokenBatch:
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    spans: list[GroupSpan] = []
    indices = list(chain.from_iterable(unit.indices for unit in units))
    for unit in units:
        prompt = rows[unit.indices[0]].prompt_ids
        span = GroupSpan(
            prompt_start=len(tokens), prompt_length=len(prompt), response_starts=[], response_lengths=[]
        )
        tokens += prompt
        positions += range(len(prompt))
        for index in unit.indices:
            row, start, length = rows[index], len(tokens), packed_length(rows[index])
            span.response_starts.append(start)
            span.response_lengths.append(length)
            predictors += [span.prompt_start + len(prompt) - 1, *range(start, start + length)]
            tokens += row.response_ids[:-1]
            positions += range(len(prompt), len(prompt) + length)
        spans.append(span)
    return _with_columns([rows[index] for index in indices], tokens, positions, predictors, spans, indices)


def _with_columns(
    rows: list[Row],
    tokens: list[int],
    positions: list[int],
    predictors: list[int],
    spans: list[GroupSpan],
    indices: list[int],
) -> TokenBatch:
    return TokenBatch(
        input_ids=torch.tensor(tokens),
        position_ids=torch.tensor(positions),
        spans=spans,
        predictors=torch.tensor(predictors),
        targets=torch.tensor([token for row in rows for token in row.response_ids]),
        row_ids=torch.repeat_interleave(
            torch.arange(len(rows)), torch.tensor([len(row.response_ids) for row in rows])
        ),
        rows=len(rows),
        advantages=_column(rows, "advantages"),
        token_weights=_column(rows, "token_weights"),
        rollout_logprobs=_column(rows, "rollout_logprobs"),
        old_logprobs=_optional_column(rows, "old_logprobs"),
        reference_logprobs=_optional_column(rows, "reference_logprobs"),
        slots=torch.tensor([row.slot for row in rows]),
        unshared_tokens=sum(len(row.prompt_ids) + packed_length(row) for row in rows),
        row_indices=indices,
    )


def _column(rows: Sequence[Row], name: str) -> torch.Tensor:
    """`[M]` float32 of one per-token list."""
    return torch.tensor([value for row in rows for value in getattr(row, name)], dtype=torch.float32)


def _optional_column(rows: Sequence[Row], name: str) -> torch.Tensor | None:
    present = [getattr(row, name) is not None for row in rows]
    if all(present):
        return _column(rows, name)
    if any(present):
        raise ValueError(
            f"{name} is set on {sum(present)} of {len(rows)} rows of a micro-batch: set all or none."
        )
    return None
