"""A script for `test_full_disk`: runs on a small disk of their own, each full at another moment.

`unshare --mount python -m tests.integration.full_disk FOLDER` mounts the disk at FOLDER, where nobody else
sees it, and prints what became of each run as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf import loop, pipeline
from rlhf.checkpoint import Checkpoints
from rlhf.cli import main
from rlhf.tracking.jsonl import read
from rollout import recorder

SIZE = "64m"


def fill(disk: Path) -> None:
    """Take every block."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def trained(folder: Path, *overrides: str) -> tuple[int, list[str]]:
    """Exit status and the last line on standard error of a run of three steps."""
    said = io.StringIO()
    arguments = ["train", "dapo/tiny", f"run.dir={folder}", "loop.steps=3", "checkpoint.every=1"]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main([*arguments, "evaluation.every=0", *overrides])
    return status, said.getvalue().strip().splitlines()[-1:]


@contextlib.contextmanager
def before(module: Any, name: str, step: int, action: Callable[[Any], None]) -> Any:
    """Do `action` once, before the loop calls `name` with `run.step == step`."""
    original = getattr(module, name)

    def acting(run: Any, *arguments: Any, **options: Any) -> Any:
        if getattr(run, "step", step) == step:
            action(run)
        return original(run, *arguments, **options)

    setattr(module, name, acting)
    try:
        yield
    finally:
        setattr(module, name, original)


def state(folder: Path) -> dict[str, Any]:
    """What is left in a run's folder."""
    saved = Checkpoints(folder)
    return {
        "whole": [step for step in saved.steps() if not saved.problem(step)],
        "damaged": [step for step in saved.steps() if saved.problem(step)],
        "metrics": [row["step"] for row in read(folder / "metrics.jsonl")],
        "rollouts": recorder.steps(folder / "rollouts"),
        "leftovers": sorted(path.name for path in folder.rglob("*.partial")),
    }


def full_metrics(run: Any) -> None:
    """Every further write to `metrics.jsonl` meets a full device."""
    device = os.open("/dev/full", os.O_WRONLY)
    os.dup2(device, run.trackers._members["jsonl"]._metrics.fileno())
    os.close(device)


def runs(disk: Path) -> dict[str, Any]:
    """Outcome by what could not be written."""
    moments = {
        "rollouts": (loop, "record", 1, lambda _: fill(disk)),
        "metrics": (loop, "close_step", 2, full_metrics),
        "evaluation": (loop, "evaluate_if_due", 3, lambda _: fill(disk)),
        "checkpoint": (loop, "checkpoint_if_due", 2, lambda _: fill(disk)),
        "report": (pipeline, "_write_report", 0, lambda _: fill(disk)),
    }
    found = {}
    for what, moment in moments.items():
        folder = disk / what
        logged: list[str] = []
        with heard(logged), before(*moment):
            status, said = trained(folder)
        found[what] = {"status": status, "said": said, "logged": logged, **state(folder)}
        if what == "checkpoint":
            found["resumed while full"] = {"said": trained(folder, "resume=auto"), **state(folder)}
        (disk / "filler").unlink(missing_ok=True)
    found["resumed"] = {"said": trained(disk / "checkpoint", "resume=auto"), **state(disk / "checkpoint")}
    return found


@contextlib.contextmanager
def heard(messages: list[str]) -> Any:
    """Collect what is logged as an error."""
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(target)], check=True)
    print(json.dumps(runs(target)))
