"""The whole loop on a tiny model: real vLLM, real publishing, real files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlhf
from rlhf import metrics as naming
from rlhf.tracking.jsonl import read
from rollout import recorder

FAST = ["loop.steps=3", "evaluation.every=2", "checkpoint.every=2"]

OPTIONAL = {
    "policy/kl_reference": "a reference model",
    "weights/merge_gap": "LoRA",
    "learner/skipped_steps": "learner.on_nonfinite=skip",
    "memory/peak_<phase>": "a sample, taken once a second, inside a step",
    "memory/device_allocated": "CUDA",
    "memory/device_peak": "CUDA",
    "tracking/failures": "a tracker that failed",
    "rollout/engine_restarts": "rollout.restarts",
    "ahead/rollout_seconds": "loop.staleness",
    "ahead/reward_seconds": "loop.staleness",
    "ahead/wait_seconds": "loop.staleness",
    "ahead/bound_seconds": "loop.staleness",
    "ahead/other_seconds": "loop.staleness",
    "ahead/ready": "loop.staleness",
}
"""Rows of the naming table that this run does not write, and what would."""


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """One `rlhf` call in a process of its own."""
    command = [sys.executable, "-m", "rlhf.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished `dapo/tiny` run."""
    cwd = tmp_path_factory.mktemp("cli")
    done = run_cli("train", "dapo/tiny", *FAST, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Report: runs/dapo-tiny/report.md" in done.stdout
    return cwd / "runs" / "dapo-tiny"


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "report.md",
        "report/learning_curve.png",
    ):
        assert (finished / name).is_file(), name
    assert (finished / "checkpoints" / "step-3" / "model.safetensors").is_file()
    assert sorted(p.name for p in (finished / "evaluations").glob("*.jsonl")) == [
        "step-0.jsonl",
        "step-2.jsonl",
        "step-3.jsonl",
    ]


def test_every_metric_has_its_row_in_the_naming_table(finished: Path) -> None:
    rows = read(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    names = {name for row in rows for name in row} - {"step", "timestamp"}
    assert naming.unknown(names) == []
    for name in (
        "train/accuracy",
        "eval/accuracy",
        "time/rollout",
        "memory/rss",
        "weights/version",
        "policy/entropy",
    ):
        assert name in names


def test_every_row_of_the_naming_table_is_written(finished: Path) -> None:
    rows = read(finished / "metrics.jsonl")
    written = {naming.lookup(name) for row in rows for name in row}
    missing = [row.name for row in naming.METRICS if row not in written]
    assert [name for name in missing if name not in OPTIONAL] == []


def test_counters_add_up(finished: Path) -> None:
    for row in read(finished / "metrics.jsonl")[1:]:
        assert row["train/responses"] == 8 * row["selection/offered"]
        phases = sum(
            v for k, v in row.items() if k.startswith("time/") and k not in ("time/step", "time/elapsed")
        )
        assert math.isclose(phases, row["time/step"], rel_tol=1e-6)
        assert row["selection/kept"] <= 4
    last = read(finished / "metrics.jsonl")[-1]
    assert last["weights/version"] == 4
    assert last["train/prompts"] >= 3 * 4


def test_rollouts_are_recorded_with_their_verdicts(finished: Path) -> None:
    assert recorder.steps(finished / "rollouts") == [1, 2, 3]
    rows = read(finished / "metrics.jsonl")
    for step in (1, 2, 3):
        groups = recorder.read(finished / "rollouts", step)
        assert len([g for g in groups if g.verdict == "kept"]) == rows[step]["selection/kept"]
        for group in groups:
            assert all(len(t.logprobs) == len(t.response_ids) for t in group.trajectories)
            assert len({t.seed for t in group.trajectories}) == 8
    seeds = [
        t.seed for s in (1, 2, 3) for g in recorder.read(finished / "rollouts", s) for t in g.trajectories
    ]
    assert len(seeds) == len(set(seeds))


def test_kept_groups_carry_their_advantages(finished: Path) -> None:
    kept = [g for s in (1, 2, 3) for g in recorder.read(finished / "rollouts", s) if g.verdict == "kept"]
    assert kept
    for group in kept:
        assert abs(sum(t.advantage for t in group.trajectories)) < 1e-4
        assert any(t.advantage != 0 for t in group.trajectories)


def test_the_saved_model_evaluates_like_the_run_did(finished: Path) -> None:
    done = run_cli("eval", "dapo/tiny", f"model.path={finished}@last", cwd=finished.parents[1])
    assert done.returncode == 0, done.stderr
    last = read(finished / "metrics.jsonl")[-1]
    assert f"eval/accuracy {last['eval/accuracy']:.4g}" in done.stdout
    assert f"eval/length_mean {last['eval/length_mean']:.4g}" in done.stdout


def test_export_writes_a_model_folder(finished: Path, tmp_path: Path) -> None:
    done = run_cli("export", str(finished), "--to", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "training_state").exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        finished / "checkpoints" / "step-3" / "model.safetensors"
    ).read_bytes()
    again = run_cli("export", str(finished), "--to", str(tmp_path / "out"), cwd=tmp_path)
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_from_python_in_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def shorter(
        prompts: list[str], responses: list[str], answers: list[str], rows: list[dict], **extra: object
    ) -> list[dict]:
        assert {row["level"] for row in rows} <= {1, 2}
        return [{"brief": 1 / (1 + len(r)), "accuracy": float(len(r) % 2)} for r in responses]

    dataset = [{"prompt": f"{i} + 1", "answer": str(i + 1), "level": 1 + i % 2} for i in range(40)]
    summary = rlhf.train("dapo/tiny", {"loop.steps": 1, "data.heldout": 4}, reward=shorter, dataset=dataset)
    assert summary.steps == 1
    assert summary.folder == Path("runs/dapo-tiny")
    assert 0 < summary.metrics["reward/reward.brief_mean"] <= 1


def test_dry_run_loads_no_model_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from rlhf.cli import main; status = main(['train', 'dapo/tiny', '--dry-run']); "
        "print(status, [m for m in ('torch', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "dapo/tiny can run" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["train", "--help"]])
def test_help_is_quick(arguments: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    done = run_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout
    assert time.monotonic() - started < 20, "bounded loosely: CI machines are shared"


def test_metrics_lines_are_one_object_each(finished: Path) -> None:
    for line in (finished / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def test_evaluating_an_empty_split_is_one_sentence(tmp_path: Path) -> None:
    done = run_cli("eval", "dapo/tiny", "evaluation.split=validation", cwd=tmp_path)
    assert done.returncode == 2
    assert "data.validation=0 leaves nothing to evaluate" in done.stderr
    assert done.stdout == ""


def test_a_run_that_must_not_go_on_says_why_in_one_sentence(tmp_path: Path) -> None:
    done = run_cli("train", "dapo/tiny", "loop.steps=1", "weights.tolerance=1e-30", cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "rlhf: the run stopped in step 1: After version 1, engine 0 and learner disagree on the probe"
    )
    assert "Traceback" not in done.stderr
