"""What must answer at once imports nothing heavy: help, the list of recipes, a checked configuration."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "vllm", "transformers", "datasets", "peft", "ray", "numba")

LIST_MODULES = """
import json, sys
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""

RUN_COMMAND = """
from rlhf.cli import main
try:
    status = main({arguments})
except SystemExit as end:
    status = end.code
assert not status, status
"""
"""`rlhf ARGUMENTS`, going on after argparse's own exit."""

COMMANDS = [
    ["--help"],
    ["recipes"],
    *([name, "--help"] for name in ("train", "explain", "eval", "replay", "recipes", "doctor", "export")),
]


def run(code: str) -> tuple[str, set[str]]:
    """Standard output of `code` in a fresh interpreter, and the top-level modules that it had imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LIST_MODULES}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_import_nothing_heavy(arguments: list[str]) -> None:
    output, modules = run(RUN_COMMAND.format(arguments=arguments))
    assert modules.isdisjoint(HEAVY)
    assert "dapo/arithmetic" in output if arguments == ["recipes"] else "usage: rlhf" in output


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"]], ids=" ".join)
def test_commands_answer_within_a_second(arguments: list[str]) -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run(RUN_COMMAND.format(arguments=arguments))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0


def test_a_checked_configuration_imports_nothing_heavy() -> None:
    output, modules = run(
        "from rlhf.compose import load\nprint(load('dapo/tiny', ['loop.steps=3']).loop.steps)"
    )
    assert output == "3\n"
    assert modules.isdisjoint(HEAVY)


def test_the_engine_plugin_imports_neither_trainer_nor_hydra() -> None:
    """Every vLLM worker process imports it."""
    _, modules = run("import rollout.weights.plugin")
    assert modules.isdisjoint({"trainer", "rlhf", "hydra", "omegaconf", "transformers"})


@pytest.mark.parametrize("package", ["adapters", "trainer", "rollout", "rlhf", "recipes"])
def test_package_doors_import_nothing_heavy(package: str) -> None:
    _, modules = run(f"import {package}")
    assert modules.isdisjoint(HEAVY)
