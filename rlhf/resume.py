"""Where a run goes on: which checkpoint of its folder, under the same configuration, with later records cut.

Imports no torch.
"""

from __future__ import annotations

import fcntl
import fnmatch
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.checkpoint import STATE, Checkpoints
from rlhf.compose import to_yaml
from rlhf.config import Config
from rlhf.errors import UserError
from rlhf.evaluation import runner
from rlhf.tracking import jsonl
from rlhf.tracking.base import flatten
from rollout import recorder

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    "resume", "run.name", "run.dir", "run.watchdog_minutes", "loop.steps", "loop.max_tokens",
    "checkpoint.*", "evaluation.every", "tracking.*", "learner.on_nonfinite", "learner.token_budget",
    "learner.memory.*", "learner.parallel.*", "rollout.kv_cache_gib", "rollout.gpu_memory",
    "rollout.max_num_seqs", "rollout.sleep_level", "rollout.pool", "rollout.ray.*", "reward.timeout_s",
    "reward.memory_mb", "reward.workers",
)  # fmt: skip
"""Keys, `*` for any text, in which a resumed run may differ from what its folder says: what changes nothing,
and what a fault may ask for (memory, time limits), which changes numbers by their rounding only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a resumed run begins."""

    step: int
    """Its last step that counts; -1 when it was ended before its first checkpoint and begins anew."""
    state: Path | None
    """Folder that `rlhf.state_file.read` takes; None when `step` is -1."""


class FolderLock:
    """Keeps a second run out of a folder for as long as this process, or the run in it, lives."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` when a living run holds the folder. File systems without locks keep none out."""
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"run.dir={folder} is in use by a run that still lives: wait for its end, or stop it."
            ) from None
        except OSError:
            logger.info("%s cannot be locked on this file system.", folder)

    def close(self) -> None:
        """Let others in; safe to call twice. The kernel does it when the process ends."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def recorded(folder: Path) -> dict[str, Any]:
    """The configuration that the folder's run wrote; empty when it was ended before it wrote any."""
    path = folder / "config.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def find(config: Config, folder: Path) -> Start | None:
    """Where `config.resume` says to begin in the run's `folder`; None for a new run.

    Raises `UserError` when the configuration is not the folder's, or no whole checkpoint is as asked.
    """
    then = recorded(folder)
    if config.resume == "never" or not then:
        return None
    _refuse_changes(config, then, folder)
    checkpoints = Checkpoints(folder)
    step = _newest_whole(checkpoints, folder) if config.resume == "auto" else int(config.resume)
    if step >= 0 and config.resume != "auto":
        _refuse_damaged(checkpoints, step)
    return Start(step=step, state=checkpoints.path(step) / STATE if step >= 0 else None)


def cut_back(folder: Path, step: int) -> None:
    """Remove what the run recorded after `step` (-1: everything); checkpoints first, so that a kill in the
    middle is mended by resuming once more."""
    Checkpoints(folder).cut_back(step)
    jsonl.cut_back(folder, step)
    runner.cut_back(folder, step)
    recorder.cut_back(folder / "rollouts", step)
    for segment in folder.glob(".weights-*"):  # a transfer's file that a kill left behind
        segment.unlink()


def _refuse_changes(config: Config, recorded: Mapping[str, Any], folder: Path) -> None:
    then, now = flatten(recorded), flatten(yaml.safe_load(to_yaml(config)))
    for key in [*now, *(key for key in then if key not in now)]:
        same = key in then and key in now and then[key] == now[key]
        if not same and not any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE):
            raise UserError(
                f"resume={config.resume}: {key}={_shown(now, key)} is not {_shown(then, key)}, with which "
                f"{folder} was begun: set it back, or start a new run in another run.dir."
            )


def _shown(flat: Mapping[str, Any], key: str) -> str:
    value = flat.get(key, "(not set)")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _newest_whole(checkpoints: Checkpoints, folder: Path) -> int:
    """The last step whose checkpoint is whole; damaged ones are named and passed over. -1 without any."""
    there = checkpoints.steps()
    for index in range(len(there) - 1, -1, -1):
        problem = checkpoints.problem(there[index])
        if not problem:
            return there[index]
        before = f"step {there[index - 1]} is tried next" if index else "there is none before it"
        logger.warning(
            "The checkpoint %s is damaged (%s): %s.", checkpoints.path(there[index]), problem, before
        )
    if there:
        raise UserError(
            f"resume=auto: no checkpoint in {checkpoints.folder} is whole: start a new run in another "
            f"run.dir."
        )
    logger.warning("%s was ended before its first checkpoint: the run begins anew.", folder)
    return -1


def _refuse_damaged(checkpoints: Checkpoints, step: int) -> None:
    problem = checkpoints.problem(step)
    if not problem:
        return
    earlier = (s for s in reversed(checkpoints.steps()) if s < step and not checkpoints.problem(s))
    before = next(earlier, None)
    remedy = (
        "no whole one is before it, start a new run in another run.dir"
        if before is None
        else f"the one before it is whole, set resume={before}"
    )
    raise UserError(
        f"resume={step}: the checkpoint {checkpoints.path(step)} cannot be used, {problem}: {remedy}."
    )
