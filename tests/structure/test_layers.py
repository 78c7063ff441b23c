"""Imports run downward through the layers, never in a circle; optional packages stay in their wrappers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = ("adapters", "trainer", "rollout", "rlhf", "recipes")
"""Bottom to top: a module may import from its own layer and those to the left."""

WRAPPERS = {
    "vllm": ("rollout",),
    "ray": ("rollout", "trainer.parallel"),
    "peft": ("adapters", "trainer", "rlhf.models", "rlhf.export"),
    "math_verify": ("rlhf.rewards",),
    "reasoning_gym": ("rlhf.data",),
    "wandb": ("rlhf.tracking",),
    "mlflow": ("rlhf.tracking",),
    "trackio": ("rlhf.tracking",),
    "tensorboard": ("rlhf.tracking",),
}
"""Optional package -> the modules (with all below them) that may import it."""


@dataclass(frozen=True)
class Edge:
    """`module` imports `target`, a dotted name, at `line`; `typing_only` when under `if TYPE_CHECKING`."""

    module: str
    target: str
    line: int
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def read_edges(module: str, source: str, is_package: bool) -> Iterator[Edge]:
    """Every import of one file, those inside functions too."""
    tree = ast.parse(source)
    guarded = {id(node) for block in ast.walk(tree) if _is_typing_block(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, is_package, node)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            yield Edge(module, target, node.lineno, id(node) in guarded)


def _is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module in the layers."""
    found = {}
    for path in (path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def edges() -> list[Edge]:
    """Every import in the layers."""
    return [
        edge
        for module, path in modules().items()
        for edge in read_edges(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    ]


def is_upward(edge: Edge) -> bool:
    """Whether an edge goes from a layer to one above it."""
    source, target = edge.module.split(".")[0], edge.target.split(".")[0]
    return target in LAYERS and LAYERS.index(target) > LAYERS.index(source)


def is_outside_wrapper(edge: Edge) -> bool:
    """Whether an edge imports an optional package from a module that does not wrap it."""
    homes = WRAPPERS.get(edge.target.split(".")[0])
    return homes is not None and not any(f"{edge.module}.".startswith(f"{home}.") for home in homes)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a directed graph as `[a, b, ..., a]`; empty when there is none (depth-first search)."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if circle := visit(target):
                return circle
        path.pop()
        done.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := visit(node))), [])


def our_module(target: str, known: dict[str, Path]) -> str | None:
    """The longest prefix of a dotted name that is a module of ours."""
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target or None


def test_every_layer_has_modules() -> None:
    assert {name.split(".")[0] for name in modules()} == set(LAYERS)
    assert len(edges()) > 100


def test_recipes_hold_no_code() -> None:
    assert [name for name in modules() if name.startswith("recipes")] == ["recipes"]


def test_no_import_goes_upward() -> None:
    assert [str(edge) for edge in edges() if is_upward(edge)] == []


def test_no_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for edge in edges():
        target = our_module(edge.target, modules())
        if target and target != edge.module and not edge.typing_only:
            graph[edge.module].add(target)
    assert find_circle(graph) == []


def test_optional_packages_stay_in_their_wrappers() -> None:
    assert [str(edge) for edge in edges() if is_outside_wrapper(edge)] == []


@pytest.mark.parametrize(
    ("module", "source", "upward"),
    [
        ("trainer.learner", "import rollout.types", True),
        ("trainer.learner", "def f():\n    from rlhf.errors import UserError", True),
        ("adapters.lora", "from trainer import batch", True),
        ("rollout.weights.shm", "from ..types import Group", False),
        ("rlhf.loop", "from trainer.learner import Learner", False),
        ("trainer.learner", "import torch", False),
    ],
)
def test_upward_edges_are_seen(module: str, source: str, upward: bool) -> None:
    assert [is_upward(edge) for edge in read_edges(module, source, False)] == [upward]


@pytest.mark.parametrize(
    ("module", "is_package", "source", "target"),
    [
        ("rollout.weights.shm", False, "from . import probe", "rollout.weights.probe"),
        ("rollout.weights.shm", False, "from ..types import Group", "rollout.types.Group"),
        ("rollout.weights", True, "from .shm import x", "rollout.weights.shm.x"),
    ],
)
def test_relative_imports_are_resolved(module: str, is_package: bool, source: str, target: str) -> None:
    assert [edge.target for edge in read_edges(module, source, is_package)] == [target]


def test_wrappers_are_matched_by_whole_names() -> None:
    def outside(module: str, source: str) -> list[bool]:
        return [is_outside_wrapper(edge) for edge in read_edges(module, source, False)]

    assert outside("trainer.learner", "import vllm") == [True]
    assert outside("rollout.vllm_engine", "import vllm.config") == [False]
    assert outside("rlhf.rewards_extra", "import math_verify") == [True]
    assert outside("rlhf.rewards.math", "import math_verify") == [False]


def test_circles_are_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
