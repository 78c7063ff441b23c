"""`Recorder`: what is read equals what was written, floats included."""

from __future__ import annotations

import datetime
import math
import random
import struct
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rollout.recorder import Recorder, read, steps
from rollout.types import FinishReason, Group, Prompt, Trajectory, VersionSpan


def single(value: float) -> float:
    """`value` as an engine returns it: a float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def trajectory(rng: random.Random, index: int) -> Trajectory:
    length = rng.randrange(0, 20)
    return Trajectory(
        prompt_ids=[1, 2, 3],
        response_ids=[rng.randrange(49_152) for _ in range(length)],
        logprobs=[single(-rng.expovariate(1.0)) for _ in range(length)],
        finish_reason=rng.choice(list(FinishReason)),
        version_spans=[
            VersionSpan(start=0, end=length // 2, version=3),
            VersionSpan(start=length // 2, end=length, version=4),
        ],
        sample_index=index,
        seed=rng.getrandbits(63),
        text="Zwölf — 12\n\u0000",
        adapter=rng.choice([None, "alice@3"]),
        rewards={"exact": 1.0, "length": -0.1 * index} if index else {},
        reward=rng.gauss(0, 1),
        accuracy=1 / 3,
        extracted=rng.choice([None, "12"]),
        grade_status="timeout",
        advantage=rng.gauss(0, 1) * 1e-17,
        step_spans=[(0, 2), (2, length)],
    )


def group(number: int) -> Group:
    rng = random.Random(number)
    row = {
        "question": "2 + 3?",
        "level": 2,
        "nested": {"terms": [2, 3.5, None, True]},
        "made": datetime.datetime(2026, 11, 24, 12, 30, tzinfo=datetime.UTC),
        "image": b"\x00\xff",
        "days": [datetime.date(2026, 11, 24), datetime.date(1, 1, 1)],
        "at": datetime.time(12, 30, 0, 5),
        "price": {"net": Decimal("12.50"), "gross": Decimal("1E+3")},
    }
    prompt = Prompt(
        id=f"sums:{number}",
        token_ids=[1, 2, 3],
        text="<|im_start|>2 + 3?",
        answer=None,
        source="sums",
        row=row,
    )
    return Group(
        id=f"{number}/0",
        prompt=prompt,
        trajectories=[trajectory(rng, index) for index in range(4)],
        born=12,
        verdict=rng.choice(["kept", "carried", "all_wrong"]),
    )


def test_what_is_read_equals_what_was_written(tmp_path: Path) -> None:
    groups = [group(number) for number in range(20)]
    path = Recorder(tmp_path / "rollouts").write(12, groups)
    assert path == tmp_path / "rollouts" / "step_000012.parquet"
    back = read(tmp_path / "rollouts", 12)
    assert back == groups
    assert str(back[0].prompt.row) == str(groups[0].prompt.row), "1 == Decimal(1), so texts are compared too"


def test_floats_survive_to_the_last_bit(tmp_path: Path) -> None:
    one = group(0)
    one.trajectories[1].advantage = math.nan
    one.trajectories[2].reward = math.inf
    one.trajectories[3].advantage = 5e-324
    Recorder(tmp_path).write(0, [one])
    back = read(tmp_path, 0)[0].trajectories
    assert math.isnan(back[1].advantage)
    assert back[2].reward == math.inf
    assert back[3].advantage == 5e-324
    assert back[0].logprobs == one.trajectories[0].logprobs


def test_a_step_is_replaced_whole(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.write(3, [group(0), group(1)])
    recorder.write(3, [group(2)])
    recorder.write(11, [group(3)])
    assert read(tmp_path, 3) == [group(2)]
    assert steps(tmp_path) == [3, 11]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".parquet", ".parquet"]


def test_the_file_is_a_plain_table(tmp_path: Path) -> None:
    path = Recorder(tmp_path).write(0, [group(0)])
    table = pq.read_table(path, columns=["group", "verdict", "text", "accuracy", "rewards"])
    assert table.num_rows == 4
    assert table["accuracy"].to_pylist() == [1 / 3] * 4
    assert table["rewards"].to_pylist()[1] == [("exact", 1.0), ("length", -0.1)]


def test_a_step_without_groups_reads_back_empty(tmp_path: Path) -> None:
    Recorder(tmp_path).write(0, [])
    assert read(tmp_path, 0) == []


def test_what_cannot_be_recorded_is_named(tmp_path: Path) -> None:
    empty = group(0)
    empty.trajectories = []
    with pytest.raises(ValueError, match="Group '0/0' has no trajectories"):
        Recorder(tmp_path).write(0, [empty])
    odd = group(1)
    odd.prompt.row["when"] = object()
    with pytest.raises(ValueError, match="data row of prompt 'sums:1': column 'when' holds a object"):
        Recorder(tmp_path).write(0, [odd])
    assert steps(tmp_path) == []
