"""`RUN@STEP`: a step of a run, which is given by its folder or by its name in `runs/`. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError

_RUN_STEP = re.compile(r"^(?P<run>.+)@(?P<step>\d+)$")


@dataclass(frozen=True, slots=True)
class RunStep:
    """One step of a run that is on this machine."""

    name: str
    """`RUN@STEP` as it was given."""
    folder: Path
    """The run's folder."""
    step: int


def is_run_step(name: str) -> bool:
    """Whether a text has the form `RUN@STEP`."""
    return _RUN_STEP.match(name) is not None


def find(name: str, label: str, runs: Path = Path("runs")) -> RunStep:
    """The step that `name` means. Raises `UserError`, a sentence that begins with `label`, without one."""
    parts = _RUN_STEP.match(name)
    if parts is None:
        raise UserError(f"{label} names no step of a run: write RUN@STEP, for example runs/demo@40.")
    return RunStep(name, run_folder(parts["run"], label, runs), int(parts["step"]))


def run_folder(run: str, label: str, runs: Path) -> Path:
    """The folder of a run. Raises `UserError`, a sentence that begins with `label`, when there is none."""
    folder = next((place for place in (Path(run).expanduser(), runs / run) if place.is_dir()), None)
    if folder is None:
        raise UserError(f"{label} names no run: there is neither {run} nor {runs / run}.")
    return folder
