"""TensorBoard event files under `<run>/tensorboard`: scalars by metric name, the rest as text."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.tracking.base import Continued, Shown, choose
from rlhf.tracking.config import TrackingConfig
from rollout.types import Group

if typing.TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Writes with torch's `SummaryWriter`, flushed each step so that a running TensorBoard follows."""

    def __init__(self, config: TrackingConfig) -> None:
        """`config.completions_shown` completions are written each time."""
        self._shown = config.completions_shown
        self._writer: SummaryWriter | None = None

    def start(self, config: dict[str, Any], folder: Path, continued: Continued | None = None) -> None:
        """Open the event file and store the configuration as text; TensorBoard hides what is void."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder / FOLDER), purge_step=continued.step + 1 if continued else None
        )
        text = json.dumps(config, indent=2, default=str).replace("\n", "\n    ")
        self._writer.add_text("config", f"    {text}", global_step=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar a metric; NaN and infinities are kept, TensorBoard marks them."""
        writer = self._opened()
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step=step)
        writer.flush()

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """One Markdown table under `completions`."""
        writer = self._opened()
        writer.add_text("completions", _table(choose(groups, self._shown)), global_step=step)
        writer.flush()

    def close(self) -> None:
        """Write out and close the event file."""
        if self._writer is not None:
            self._writer.close()

    def _opened(self) -> SummaryWriter:
        if self._writer is None:
            raise RuntimeError("the tracker was not started: call start(config, folder) first.")
        return self._writer


def _table(rows: Sequence[Shown]) -> str:
    lines = ["| " + " | ".join(Shown.COLUMNS) + " |", "|---" * len(Shown.COLUMNS) + "|"]
    lines += ["| " + " | ".join(_cell(cell) for cell in row.cells()) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: str | float) -> str:
    text = value if isinstance(value, str) else f"{value:.4g}"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")
