"""`Checkpoints`: a run's saved states, each a checksummed folder that appears whole or not at all.

`checkpoints/step-N` is a Hugging Face folder (`RUN@N`) with what a resumed run needs in `training_state/`. It
is written beside its place, flushed to the disk, sealed with a manifest of checksums, and renamed, so
neither a kill nor a full disk touches the checkpoints that are there. What is in it is the caller's matter.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf.files import sync

FOLDER = "checkpoints"
STATE = "training_state"
"""Folder inside a checkpoint that resuming reads and that a Hugging Face reader ignores."""
MANIFEST = "manifest.json"


@dataclass
class CheckpointConfig:
    """When the state of a run is saved, and how much of it stays. A checkpoint holds the model and, in
    float32, trained weights and optimizer."""

    every: int = 0
    """Steps between checkpoints; 0 leaves only the one of the last step, or of the step that Ctrl-C ended."""
    keep: int = 2
    """How many checkpoints stay, the newest ones. At least 1."""
    save_best: bool = False
    """Save whenever an evaluation is better than all before it (after step 0), and keep the best one too.
    Needs `evaluation.split=validation`: the held-out set is not for choosing."""

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        found = []
        if self.every < 0:
            found.append(
                f"checkpoint.every={self.every} is negative: set a number of steps, or 0 to save at the end "
                f"only."
            )
        if self.keep < 1:
            found.append(f"checkpoint.keep={self.keep} must be at least 1: raise it.")
        return found


class Checkpoints:
    """The checkpoints of one run's folder."""

    def __init__(self, run_folder: Path, config: CheckpointConfig | None = None) -> None:
        """Nothing is created before `write`. `config` says what is due and what stays."""
        self.folder = run_folder / FOLDER
        self.config = config or CheckpointConfig()

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps that have a folder, damaged or not, ascending."""
        names = [re.fullmatch(r"step-(\d+)", entry.name) for entry in self.folder.glob("step-*")]
        return sorted(int(name[1]) for name in names if name)

    def due(self, step: int, accuracies: Mapping[int, float], *, last: bool) -> bool:
        """Whether `step` is to be saved. `accuracies`: of all evaluations so far, by step.

        The last step always is, unless it is saved already or nothing was learned yet.
        """
        if last:
            return step > 0 and step not in self.steps()
        regular = self.config.every > 0 and step % self.config.every == 0
        return regular or (self.config.save_best and step == _best(accuracies))

    def write(self, step: int, save: Callable[[Path], None], accuracies: Mapping[int, float]) -> Path:
        """Have `save` fill a folder, make it the checkpoint of `step`, and remove what need not stay.

        Whatever goes wrong before the end, the earlier checkpoints stand.
        """
        self._remove_leftovers()
        partial = self.folder / f".step-{step}.partial"
        partial.mkdir(parents=True)
        try:
            save(partial)
            _seal(partial, step)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._remove(step)
        os.replace(partial, self.path(step))
        sync(self.folder)
        self._prune(accuracies)
        return self.path(step)

    def problem(self, step: int) -> str:
        """Why the checkpoint of `step` cannot be trusted, as a clause; empty when every checksum is right."""
        folder = self.path(step)
        if not folder.is_dir():
            return "it does not exist"
        manifest = folder / STATE / MANIFEST
        if not manifest.is_file():
            return f"it has no {STATE}/{MANIFEST}"
        try:
            files = {
                name: entry["blake2b"] for name, entry in json.loads(manifest.read_text())["files"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"its {STATE}/{MANIFEST} is not readable"
        for name, digest in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _digest(folder / name) != digest:
                return f"{name} does not have the checksum that it was written with"
        return ""

    def cut_back(self, step: int) -> None:
        """Remove every checkpoint after `step`, and what a killed run left half written."""
        for later in self.steps():
            if later > step:
                self._remove(later)
        self._remove_leftovers()

    def _prune(self, accuracies: Mapping[int, float]) -> None:
        there = self.steps()
        staying = set(there[-self.config.keep :])
        if self.config.save_best:
            staying.add(_best({step: accuracies[step] for step in there if step in accuracies}))
        for step in there:
            if step not in staying:
                self._remove(step)

    def _remove(self, step: int) -> None:
        """Rename, then delete: a kill in between leaves nothing that looks like a checkpoint."""
        if self.path(step).exists():
            doomed = self.folder / f".step-{step}.removed"
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(self.path(step), doomed)
            shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        for entry in self.folder.glob(".step-*"):
            shutil.rmtree(entry)


def _best(accuracies: Mapping[int, float]) -> int:
    """The step after 0 with the highest accuracy, the earliest of equals; -1 when there is none."""
    trained = {step: accuracies[step] for step in sorted(accuracies) if step > 0}
    return max(trained, key=lambda step: trained[step], default=-1)


def _seal(folder: Path, step: int) -> None:
    """Flush every file and write the manifest of their checksums, last."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
            entry = {"bytes": path.stat().st_size, "blake2b": _digest(path)}
            files[path.relative_to(folder).as_posix()] = entry
    manifest = folder / STATE / MANIFEST
    manifest.parent.mkdir(exist_ok=True)
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n")
    for path in (manifest, *(entry for entry in folder.rglob("*") if entry.is_dir()), folder):
        sync(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
