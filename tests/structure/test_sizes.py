"""No file and no function is longer than one person holds in the head."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("adapters", "trainer", "rollout", "rlhf", "recipes", "tests", ".ci")
MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 100


def files() -> list[Path]:
    """Every Python file of ours."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and length in lines of every function, nested ones too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files()}
    assert len(lengths) > 50
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE} == {}


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {name} has {lines} lines"
        for path in files()
        for name, lines in functions(path.read_text("utf-8"))
        if lines > MOST_LINES_OF_A_FUNCTION
    ]
    assert long == []


def test_lengths_are_counted() -> None:
    source = "def outer():\n    def inner():\n        pass\n    return inner\n"
    assert dict(functions(source)) == {"outer": 4, "inner": 2}
