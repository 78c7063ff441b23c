"""The gap between engine and learner, in its smallest form."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.engine_gap import FORMATS, gaps


def test_layercast_leaves_only_rounding_of_float32(tiny_llama: Path) -> None:
    before, after = gaps(tiny_llama, *FORMATS["LayerCast"], updates=1)
    assert 0 < max(before.gap_mean, after.gap_mean) < 1e-5
    assert before.size == after.size > 0
