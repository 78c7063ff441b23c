"""The overhead of pools: its table from known rates, and a quick form of the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import pool_overhead
from tests.benchmarks.pool_overhead import BARE, CHILD, INPROCESS, RAY


def test_pairs_of_the_same_round_are_compared() -> None:
    rates = {
        BARE: [100.0, 200.0, 300.0],
        INPROCESS: [100.0, 200.0, 300.0],
        CHILD: [80.0, 160.0, 240.0],
        RAY: [40.0, 160.0, 240.0],
    }
    lines = pool_overhead.table(rates).splitlines()
    assert lines[2] == f"| {BARE} | 200 | - | - | - |"
    assert lines[3] == f"| {INPROCESS} | 200 | +0.0% | {BARE} | +0.0% to +0.0% |"
    assert lines[4] == f"| {CHILD} | 160 | +25.0% | {BARE} | +25.0% to +25.0% |"
    assert lines[5] == f"| {RAY} | 160 | +0.0% | {CHILD} | +0.0% to +100.0% |"


def test_a_quick_form_of_all_arms(tiny_llama: Path) -> None:
    """On the tiny model, whose vocabulary the prompts must fit in; the numbers mean nothing."""
    pytest.importorskip("ray")
    options = ["--model", str(tiny_llama), "--rounds", "1", "--tokens", "2", "--eager", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.pool_overhead", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()[-6:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [BARE, INPROCESS, CHILD, RAY]
    assert all(float(line.split(" | ")[1]) > 0 for line in lines[2:])
