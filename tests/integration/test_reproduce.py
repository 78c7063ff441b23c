"""`rlhf eval BENCHMARK reproducibility=N`: every condition for real, and its table by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.reproduce import FORMATS, PAGE, Condition, Outcome, conditions, table


def test_conditions_change_the_batch_first() -> None:
    found = conditions(3)
    assert {condition.form for condition in found} == set(FORMATS)
    assert [(c.batch, c.threads) for c in found[:3]] == [(1, 1), (8, 1), (32, 1)]
    with pytest.raises(UserError, match="reproducibility=1 must lie in 2"):
        conditions(1)


def test_the_table_by_hand() -> None:
    outcomes = {
        Condition(form="bfloat16", batch=1, threads=1): Outcome(
            tokens=[[1, 2], [5]], top1=[[0.5, 0.4], [0.9]], accuracy=0.5, seconds=1.0, peak=2e9
        ),
        Condition(form="bfloat16", batch=8, threads=1): Outcome(
            tokens=[[1, 3], [5]], top1=[[0.7, 0.4], [0.9]], accuracy=1.0, seconds=3.0, peak=1.5e6
        ),
    }
    # One of two problems diverges at its second token; before that 0.5 against 0.7 has a deviation of 0.1414,
    # the other problem none; both lengths are equal; 50 and 100 % have a deviation of 35.36 points.
    lines = table(outcomes).splitlines()
    assert lines[2] == "| bfloat16 | 707.1068 | 50.0 % | 1.0 | 0.000 | 75.0% | 35.36% |"
    assert lines[4:] == [
        "| seconds, peak MB | batch 1, threads 1 | batch 8, threads 1 |",
        "|---|---|---|",
        "| bfloat16 | 1.0, 2000 | 3.0, 2 |",
    ]


def test_sampled_responses_and_servers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "aime24", "reproducibility=2"]) == 2
    said = capsys.readouterr().err
    assert "compares greedy responses and protocol.temperature=1: set protocol=greedy" in said
    assert main(["eval", "gsm8k", "reproducibility=2", "endpoint.url=http://localhost:9/v1"]) == 2
    assert "reproducibility starts engines of its own" in capsys.readouterr().err


def rounded(model: Path, folder: Path) -> Path:
    """The model with its weights in bfloat16, as all formats can read it without loss."""
    shutil.copytree(model, folder / "model")
    weights = folder / "model" / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    return folder / "model"


def test_every_format_is_answered_and_nothing_twice(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "sums.jsonl"
    rows = [{"problem": f"{n} + 1?", "answer": n + 1} for n in range(3)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "eval", "jsonl", "reproducibility=2", f"data.path={problems}",
        f"model.path={rounded(tiny_llama, tmp_path)}",
        f"run.dir={tmp_path / 'r'}", "protocol.max_new_tokens=8", "rollout.eager=true",
    ]  # fmt: skip
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    for part in (lines[2:5], lines[8:11]):
        assert [row.split(" | ")[0].removeprefix("| ") for row in part] == list(FORMATS)
    assert len(list((tmp_path / "r").glob("*-batch*.json"))) == 6
    # One model: what is kept in bfloat16 and computed in float32 is what float32 computes.
    cast, plain = (
        json.loads((tmp_path / "r" / f"{form}-batch1-threads1.json").read_text())
        for form in ("layercast", "float32")
    )
    assert cast["tokens"] == plain["tokens"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").glob("*.json")}
    (tmp_path / "r" / PAGE).unlink()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (tmp_path / "r" / PAGE).is_file()
    assert main([*command, "protocol.max_new_tokens=9"]) == 2  # never mixed with what is there
    assert "holds another evaluation (protocol differs)" in capsys.readouterr().err
