"""The soak in small: an engine and the driver are killed, and every sample is accounted for."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.benchmarks.soak import MARK, soak


def test_quick(tmp_path: Path) -> None:
    found = soak(tmp_path, steps=6, every=2, seed=0, kinds=("engine", "driver"))
    assert found.problems == [], (tmp_path / "torchrun.log").read_text()
    assert found.kills == {"engine": 1, "driver": 1}
    assert (found.job.starts, found.accounts.begins) == (1, 2), "torchrun starts the ranks again"
    assert found.accounts.samples["trained"] == 6 * 4 * 8
    assert "| steps trained | 6 of 6 |" in found.table()
    assert not [p.pid for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(MARK)]
