from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from tests.benchmarks.measuring import (
    markdown,
    peak_resident,
    power_law,
    reset_peak,
    resident,
    run_measured,
)

MIB = 2**20
SIZE = 160 * MIB

HOLD = f"import time; b = bytearray(b'x') * {SIZE}; time.sleep(0.3); del b; time.sleep(0.2)"
SHARED = f"""
import mmap, os, time
block = mmap.mmap(-1, {SIZE})
block.write(b"x" * {SIZE})
if os.fork() == 0:
    assert all(block[i] == 120 for i in range(0, {SIZE}, 4096))
    time.sleep(0.6)
    os._exit(0)
time.sleep(0.8)
"""
"""A child reads all of its parent's memory, so that RSS counts it twice."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="PSS is known on Linux only")


def peak_of(code: str, tmp_path: Path) -> int:
    return run_measured([sys.executable, "-c", code], log=tmp_path / "log").peak


@linux
def test_peak_of_a_known_allocation(tmp_path: Path) -> None:
    empty = peak_of("import time; time.sleep(0.5)", tmp_path)
    held = peak_of(HOLD, tmp_path)
    assert 0 < empty < 40 * MIB
    assert abs(held - empty - SIZE) < 8 * MIB


@linux
def test_allocations_of_a_child_count_and_add_up(tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}])"
    assert SIZE < peak_of(child, tmp_path) < SIZE + 64 * MIB


@linux
def test_shared_pages_count_once(tmp_path: Path) -> None:
    # For a moment `b"x" * SIZE` is a second block beside the mapping; pages counted twice would be a third.
    assert peak_of(SHARED, tmp_path) < 2 * SIZE + 48 * MIB


@linux
def test_looks_are_frequent_enough(tmp_path: Path) -> None:
    usage = run_measured([sys.executable, "-c", "import time; time.sleep(1)"], log=tmp_path / "log")
    assert 10 <= usage.looks_per_second <= 21
    assert 1 <= usage.seconds < 5


def test_failed_program_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with status 3:\nlast words"):
        run_measured(
            [sys.executable, "-c", "print('last words', flush=True); raise SystemExit(3)"],
            log=tmp_path / "log",
        )


@linux
def test_own_peak_can_be_reset() -> None:
    block = bytearray(b"x") * SIZE
    del block
    reset_peak()
    before = resident()
    assert peak_resident() - before < 4 * MIB
    block = bytearray(b"x") * SIZE
    del block
    assert abs(peak_resident() - before - SIZE) < 8 * MIB


def test_known_powers_are_found() -> None:
    sizes = [4, 8, 16, 32]
    fit = power_law(sizes, [3 * size**1.5 for size in sizes])
    assert fit.exponent == pytest.approx(1.5)
    assert fit.factor == pytest.approx(3)
    assert fit.residual == pytest.approx(0, abs=1e-12)
    assert power_law(sizes, [7.0] * 4).exponent == pytest.approx(0)


def test_residual_is_what_is_left() -> None:
    # Around y = x, the outer points 10 % too high and the inner ones 10 % too low, in logarithms.
    fit = power_law(
        [1, 10, 100, 1000], [x * math.exp(e) for x, e in zip([1, 10, 100, 1000], [0.1, -0.1, -0.1, 0.1])]
    )
    assert fit.exponent == pytest.approx(1)
    assert fit.residual == pytest.approx(0.1)


@pytest.mark.parametrize(("x", "y"), [([1, 1], [1, 2]), ([1, 2], [0, 1]), ([1, 2], [1]), ([0, 1], [1, 1])])
def test_what_has_no_power_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="No power can be fitted"):
        power_law(x, y)


def test_table() -> None:
    assert markdown(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"
