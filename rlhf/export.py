"""`rlhf export`: a run's model as a Hugging Face folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf.checkpoint import STATE
from rlhf.errors import UserError
from rlhf.models import ModelConfig, resolve


def export(run: str, to: str) -> str:
    """Copy the last checkpoint of `RUN`, or `RUN@STEP`, to an empty folder; returns what was written.

    The training state is left out. The folder appears whole or not at all. Raises `UserError` for an unknown
    run or a target in use.
    """
    name = run if "@" in Path(run).name else f"{run.rstrip('/')}@last"
    source = resolve(ModelConfig(path=name)).folder
    target = Path(to).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {to} is not empty: name a new folder.")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(STATE))
    if target.exists():
        target.rmdir()
    partial.rename(target)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    return f"{source} -> {target} ({size / 1e6:.0f} MB)"
