"""`TrackingConfig`: where a run's numbers go."""

from __future__ import annotations

from dataclasses import dataclass, field

ALWAYS = ("console", "jsonl", "tensorboard")
"""Trackers that every run has."""


@dataclass
class TrackingConfig:
    """Trackers beside those that always run (console, `metrics.jsonl`, TensorBoard), and what is shown."""

    names: list[str] = field(default_factory=list)
    """Trackers beside the three that always run: `wandb`, `mlflow`, `trackio` (installed apart), or your own
    (`rlhf.tracking.base.register`)."""
    project: str = "whetstone"
    """Project (wandb, trackio) or experiment (mlflow) that groups runs."""
    completions_every: int = 10
    """Show a few completions every this many steps; 0 shows none. All are in `rollouts/` anyway."""
    completions_shown: int = 3
    """How many completions are shown each time, from as many groups. At least 1."""

    def check(self) -> list[str]:
        """Sentences about values out of range. Unknown and missing trackers are found by `base.build`."""
        found = []
        if self.completions_every < 0:
            found.append(
                f"tracking.completions_every={self.completions_every} is negative: set a number of steps, "
                f"or 0 to show none."
            )
        if self.completions_shown < 1:
            found.append(
                f"tracking.completions_shown={self.completions_shown} must be at least 1: raise it, or set "
                f"tracking.completions_every=0 to show none."
            )
        if not self.project.strip():
            found.append("tracking.project is empty: give the project a name, for example whetstone.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            found.append(f"tracking.names={self.names} names {repeated[0]} twice: name each tracker once.")
        return found
