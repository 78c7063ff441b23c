"""The tables of `tests.benchmarks.numerics`, on answers made up."""

from __future__ import annotations

import math
from dataclasses import replace

from tests.benchmarks.numerics import ARMS, Measured, compared, of, tables


def answers(arm: str, threads: int, last: int, top: float, accuracy: float) -> Measured:
    return Measured(
        arm=arm,
        batch=8,
        threads=threads,
        tokens=[[5, 6, 7], [5, 6, last]],
        top1=[[top, 0.5, 0.5], [0.5, 0.5, 0.5]],
        accuracy=accuracy,
        seconds=2.0,
        peak=10**9,
        kv_cache=10**8,
    )


def test_formats_are_compared_with_themselves() -> None:
    found = [
        answers("bfloat16", 1, 8, 0.9, 0.5),
        answers("bfloat16", 2, 9, 0.7, 0.75),
        *(answers(arm, threads, 8, 0.9, 0.5) for arm in ("LayerCast", "float32") for threads in (1, 2)),
    ]
    spread = compared(of(found, "bfloat16"))
    assert (spread.percent, spread.index, spread.std_length) == (50, 2, 0)
    # stds sqrt(2) * 0.1, 0, 0 in the first answer and none before the second's divergence at 2
    assert math.isclose(spread.std_top1, math.sqrt(2) * 0.1 / 3 / 2)
    lines = tables(found).splitlines()
    assert lines[2] == "| bfloat16 | 50.0 % | 2.0 | 235.7023 | 0.000 | 62.5% | 17.68% |"
    assert lines[3] == "| LayerCast | 0.0 % | -1.0 | 0.0000 | 0.000 | 50.0% | 0.00% |"
    assert lines[8] == "| bfloat16 | 8 | 1 | 2.0 | 3 | 1000 | 100 | 50.0% |"
    assert len(lines) == 2 + len(ARMS) + 1 + 2 + len(found)
    assert compared([found[2], replace(found[3], threads=4)]).std_top1 == 0
