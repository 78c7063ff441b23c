"""Whetstone's RL: `rlhf.train(recipe, overrides, reward=fn, dataset=rows)`, and `rlhf` from a shell."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

if typing.TYPE_CHECKING:
    from rlhf.loop import Summary


def train(
    recipe: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    reward: Callable[..., Any] | None = None,
    dataset: Sequence[Mapping[str, Any]] | None = None,
) -> Summary:
    """Train a recipe; its `Summary` has the run folder, last metrics, first and last evaluation.

    `overrides` maps dotted keys to values, `{"loop.steps": 20}`. `reward`, a
    `fn(prompts, responses, answers, rows, **extra) -> list[float | dict]`, replaces the recipe's reward;
    `dataset`, a list of rows, replaces its data. Raises `rlhf.errors.UserError` when it cannot run.
    """
    from rlhf.compose import load

    config = load(recipe, as_overrides(overrides or {}))
    # Only now: a configuration that cannot run is refused without loading torch.
    from rlhf.pipeline import train_config

    return train_config(config, recipe, reward=reward, dataset=dataset)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """`{"a.b": [1, "x"]}` -> `['a.b=[1,"x"]']`: Python values in Hydra's override grammar."""
    return [f"{key}={_literal(value)}" for key, value in values.items()]


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_literal(v) for v in value) + "]"
    return str(value)


def _quoted(text: str) -> str:
    """Text in double quotes; Hydra reads a backslash as an escape only in front of a quote."""
    escaped = re.sub(r'(\\+)(?="|\Z)', r"\1\1", text).replace('"', r"\"")
    return f'"{escaped}"'
