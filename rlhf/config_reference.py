"""docs/configuration.md, printed from the dataclasses: every key, its type, default and docstring.

`python -m rlhf.config_reference > docs/configuration.md`; a test compares the two.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import cache
from typing import Any

from rlhf.config import Config
from rlhf.evaluation.benchmark import BenchmarkConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One row of the reference."""

    name: str
    kind: str
    default: str
    text: str


def reference() -> list[Key]:
    """Every key in the order of declaration; `<name>` stands for an entry of a dictionary."""
    return list(_keys(Config, ""))


def benchmark_reference() -> list[Key]:
    """The keys that a benchmark has and a training recipe has not."""
    shared = {"model", "rollout"}
    return [key for key in _keys(BenchmarkConfig, "") if key.name.partition(".")[0] not in shared]


def markdown() -> str:
    """The reference as a page, a section for each part of the configuration."""
    lines = [
        "# Configuration",
        "",
        "Every key of a recipe. `rlhf train RECIPE key=value` changes one; an unknown key is refused.",
        "Keys inside a dictionary are written with the entry's name: `reward.parts.exact.weight=1`.",
        "",
        "Printed from the dataclasses: `python -m rlhf.config_reference > docs/configuration.md`.",
    ]
    lines += _tables(reference(), "## {}")
    lines += ["", "## Benchmarks", ""]
    lines += ["`rlhf eval BENCHMARK` has `model` and `rollout` as above, and these keys:"]
    lines += _tables(benchmark_reference(), "### {}, of a benchmark")
    return "\n".join(lines) + "\n"


def _tables(keys: Iterable[Key], heading: str) -> Iterator[str]:
    """A heading and a table for each section."""
    for section, rows in itertools.groupby(keys, lambda key: key.name.partition(".")[0]):
        yield from ["", heading.format(section), ""]
        yield from ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in rows:
            yield f"| `{key.name}` | {key.kind} | {key.default} | {key.text} |"


def _keys(cls: type, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(cls)
    texts = _docstrings(cls)
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from _keys(typing.cast(type, kind), f"{name}.")
            continue
        yield Key(name, _kind(kind), _default(field), texts.get(field.name, ""))
        entry = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
        if dataclasses.is_dataclass(entry):
            yield from _keys(typing.cast(type, entry), f"{name}.<name>.")


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """The string below each field, on one line."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    found = {}
    for field, after in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(after.value.value).split()).replace("|", "\\|")
    return found


def _kind(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " \\| ".join(kind.__members__)
    if typing.get_origin(kind) is dict:
        value = typing.get_args(kind)[1]
        return "dictionary" if not dataclasses.is_dataclass(value) else "dictionary of sections"
    if typing.get_origin(kind) is list:
        return f"list of {_kind(typing.get_args(kind)[0])}"
    return getattr(kind, "__name__", str(kind))


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, Enum):
        value = value.name
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value}`" if value not in ("", None) else "empty"


if __name__ == "__main__":
    print(markdown(), end="")
