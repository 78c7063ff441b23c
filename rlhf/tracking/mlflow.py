"""MLflow. `MLFLOW_TRACKING_URI` names the server; without it: `mlflow.db` beside the run folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.tracking.base import Continued, choose, finite, flatten
from rlhf.tracking.config import TrackingConfig
from rollout.types import Group

_PARAMETERS_AT_ONCE = 100
_LONGEST_PARAMETER = 6000


class MlflowTracker:
    """One MLflow run, named after the run's folder, through a client of its own (no global active run)."""

    def __init__(self, config: TrackingConfig) -> None:
        """`config.project` is the MLflow experiment."""
        self._config = config
        self._client: Any = None
        self.run_id = ""
        """MLflow's id of the run."""
        self._closed = False

    def start(self, config: dict[str, Any], folder: Path, continued: Continued | None = None) -> None:
        """Open the run and store the configuration as parameters; a resumed run's stays as it is."""
        from mlflow import MlflowClient

        local = folder.resolve().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{local / 'mlflow.db'}")
        found = self._client.get_experiment_by_name(self._config.project)
        artifacts = None if uri else (local / "mlflow-artifacts").as_uri()
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(self._config.project, artifact_location=artifacts)
        )
        if continued and continued.run_id:
            self.run_id = continued.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        self._log_parameters(flatten(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One value a metric; NaN and infinities, which MLflow's stores do not hold alike, are left out."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        rows = [Metric(name, value, now, step) for name, value in finite(metrics).items()]
        self._client.log_batch(self.run_id, metrics=rows)

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """A JSON artifact `completions/step-N.json`."""
        rows = [asdict(shown) for shown in choose(groups, self._config.completions_shown)]
        self._client.log_dict(self.run_id, {"completions": rows}, f"completions/step-{step}.json")

    def close(self) -> None:
        """Mark the run as finished."""
        if self.run_id and not self._closed:
            self._closed = True
            self._client.set_terminated(self.run_id)

    def _log_parameters(self, flat: dict[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(name, str(value)[:_LONGEST_PARAMETER]) for name, value in flat.items()]
        for start in range(0, len(rows), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self.run_id, params=rows[start : start + _PARAMETERS_AT_ONCE])
