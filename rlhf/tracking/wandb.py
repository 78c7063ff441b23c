"""Weights & Biases. Its own environment variables hold (`WANDB_MODE=offline`, `WANDB_API_KEY`, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.tracking.base import Continued, Shown, choose
from rlhf.tracking.config import TrackingConfig
from rollout.types import Group


class WandbTracker:
    """One W&B run, named after the run's folder; local files stay inside that folder."""

    def __init__(self, config: TrackingConfig) -> None:
        """`config.project` is the W&B project."""
        self._config = config
        self._run: Any = None
        self.run_id = ""
        """W&B's id of the run."""

    def start(self, config: dict[str, Any], folder: Path, continued: Continued | None = None) -> None:
        """Open the run, or a resumed one's again: W&B ignores steps that it has. Raises what wandb raises
        when it cannot log in."""
        import wandb

        self._run = wandb.init(
            project=self._config.project,
            name=folder.name,
            dir=str(folder),
            config=config,
            id=continued.run_id if continued and continued.run_id else None,
            resume="allow" if continued else None,
            settings=wandb.Settings(console="off"),
        )
        self.run_id = str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One history row."""
        self._run.log(dict(metrics), step=step)

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """A table `completions` in the same history row."""
        import wandb

        rows = [shown.cells() for shown in choose(groups, self._config.completions_shown)]
        self._run.log({"completions": wandb.Table(columns=list(Shown.COLUMNS), data=rows)}, step=step)

    def close(self) -> None:
        """Upload what is left and end the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
