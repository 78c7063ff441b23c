"""Trackio, a local dashboard with W&B's interface. `TRACKIO_DIR` says where it keeps its database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.tracking.base import Continued, Shown, choose, finite
from rlhf.tracking.config import TrackingConfig
from rollout.types import Group


class TrackioTracker:
    """One trackio run, named after the run's folder."""

    def __init__(self, config: TrackingConfig) -> None:
        """`config.project` is the trackio project."""
        self._config = config
        self._run: Any = None

    def start(self, config: dict[str, Any], folder: Path, continued: Continued | None = None) -> None:
        """Open the run. Machine metrics are ours (`memory/*`), so trackio's own are off."""
        import trackio

        self._run = trackio.init(
            project=self._config.project,
            name=folder.name,
            config=config,
            resume="allow" if continued else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row; NaN and infinities are left out."""
        self._run.log(finite(metrics), step=step)

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """A table `completions`."""
        import trackio

        rows = [shown.cells() for shown in choose(groups, self._config.completions_shown)]
        self._run.log({"completions": trackio.Table(columns=list(Shown.COLUMNS), data=rows)}, step=step)

    def close(self) -> None:
        """Write out what is left and end the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
