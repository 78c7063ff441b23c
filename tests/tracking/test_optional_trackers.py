"""wandb, mlflow and trackio for real, offline; skipped where the package is not installed."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.tracking.base import build, installed
from rlhf.tracking.config import TrackingConfig
from tests.tracking.samples import group

CONFIG = {"loop": {"steps": 2}, "algorithm": {"clip": {"low": 0.2}}, "long": "x" * 7000}


def _track(name: str, folder: Path) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    run = folder / "run-1"
    run.mkdir()
    with build(TrackingConfig(names=[name], completions_every=1)) as trackers:
        trackers.start(CONFIG, run)
        for step in range(3):
            trackers.log(step, {"train/accuracy": step / 4, "learner/grad_norm": math.nan})
            trackers.completions(step, [group(1, {"2": 1.0})])
    assert trackers.failures == {}


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_asking_for_one_that_is_missing_gives_the_pip_command(name: str) -> None:
    if installed(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(
        UserError, match=f"the tracker {name} needs the package {name}, which is not installed: "
    ):
        build(TrackingConfig(names=[name]))


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    _track("wandb", tmp_path)
    (record,) = tmp_path.glob("run-1/wandb/offline-run-*/run-*.wandb")
    assert b"train/accuracy" in record.read_bytes()
    tables = list(tmp_path.glob("run-1/wandb/offline-run-*/files/media/table/completions_*.json"))
    assert json.loads(tables[0].read_text())["columns"][:2] == ["prompt", "response"]


def test_mlflow_in_a_local_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _track("mlflow", tmp_path)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("whetstone").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/accuracy")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert run.info.status == "FINISHED"
    assert run.data.params["algorithm.clip.low"] == "0.2"
    assert len(client.list_artifacts(run.info.run_id, "completions")) == 3


def test_trackio_in_a_local_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    _track("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "whetstone.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
    assert [row["train/accuracy"] for row in rows if "train/accuracy" in row] == [0.0, 0.25, 0.5]
