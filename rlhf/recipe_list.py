"""`rlhf recipes`: what each shipped recipe does, its paper and what it needs, read from its first lines."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Recipe:
    """The self-description at the head of a recipe file."""

    name: str
    does: str
    paper: str
    needs: str


def recipes() -> list[Recipe]:
    """Every file under `recipes/` that describes itself with `# does:`, sorted by name."""
    root = Path(str(importlib.resources.files("recipes")))
    found = [_read(root, path) for path in sorted(root.rglob("*.yaml"))]
    return [recipe for recipe in found if recipe is not None]


def table() -> str:
    """One block a recipe, plain text that survives a pipe."""
    return "\n".join(
        f"{recipe.name}\n    {recipe.does}\n    {recipe.paper}; needs {recipe.needs}" for recipe in recipes()
    )


def _read(root: Path, path: Path) -> Recipe | None:
    head = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        key, _, value = line.lstrip("# ").partition(":")
        head[key] = value.strip()
    if "does" not in head:
        return None
    name = path.relative_to(root).with_suffix("").as_posix()
    return Recipe(name, head["does"], head.get("paper", ""), head.get("needs", ""))
