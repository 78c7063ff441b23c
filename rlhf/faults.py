"""What a run may meet that no configuration mends, as one sentence: what happened, and what helps.

`docs/faults.md` lists every fault with its sentence and exit status.
"""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.config import Config
from rlhf.errors import RewardRaisedError, RunStoppedError, UserError
from rollout.errors import EngineError
from rollout.weights.errors import ProbeError, WeightTransferError
from trainer.errors import NonFiniteError, OffloadError, RankError, asked_for, out_of_memory
from trainer.memory.config import ActivationCheckpointing

TRACEBACK = "error.txt"
"""File in the run's folder: the traceback of what a user's own function raised."""

_SENTENCES = (WeightTransferError, ProbeError, EngineError, NonFiniteError, OffloadError, RankError)
"""Errors that are one sentence already."""

_DISK = {
    errno.ENOSPC: ("is full", "free some space"),
    errno.EDQUOT: ("has no more room for this user", "free some space"),
    errno.EIO: ("fails with input/output errors", "choose another run.dir"),
    errno.EROFS: ("is read-only", "choose another run.dir, or mount it for writing"),
}
"""What a disk may do to a run, and what helps."""

_WRITING = {
    "record": "rollouts",
    "tracking": "metrics",
    "evaluation": "the evaluation",
    "checkpoint": "the checkpoint",
    "publish": "weights for the engines",
}
"""What each phase writes."""


@contextmanager
def stopping(
    config: Config,
    what: Callable[[], str],
    *,
    phase: Callable[[], str] = lambda: "loading",
    folder: Callable[[], Path | None] = lambda: None,
    then: Callable[[], str] = lambda: "",
) -> Iterator[None]:
    """What must end a run becomes one `RunStoppedError`: `what()`, why, and `then()`, how to go on.

    A reward function that raised becomes a `UserError` that names the file with its traceback, in `folder()`
    or, without one, among the temporary files. All else passes. `WHETSTONE_TRACEBACK=1` lets everything
    through, for whoever suspects a mistake of ours.
    """
    try:
        yield
    except RewardRaisedError as error:
        raise UserError(f"{error}{_traceback(error, folder())}") from error
    except UserError:
        raise
    except Exception as error:
        said = sentence(error, config, phase(), folder())
        if not said or os.environ.get("WHETSTONE_TRACEBACK"):
            raise
        raise RunStoppedError(" ".join(filter(None, [f"{what()}: {said}", then()]))) from error


def sentence(error: BaseException, config: Config, phase: str, folder: Path | None = None) -> str:
    """The sentence for what stopped a run in `phase`; empty for what is none of the known faults."""
    if isinstance(error, _SENTENCES):
        return str(error)
    disk = disk_trouble(error, _WRITING.get(phase, "the run's files"), folder)
    if disk:
        return disk
    if out_of_memory(error):
        return _learner_memory(error, config, phase)
    return ""


def disk_trouble(error: BaseException, what: str, folder: Path | None) -> str:
    """The sentence for a disk that did not take `what`; empty when the error is not of the disk.

    Libraries written in Rust (safetensors, tokenizers) raise types of their own, which name the number.
    """
    for number, (trouble, remedy) in _DISK.items():
        if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
            where = f" of {folder}" if folder else ""
            return f"the disk{where} {trouble}, {what} could not be written: {remedy}."
    return ""


def _learner_memory(error: BaseException, config: Config, phase: str) -> str:
    learner = config.learner
    asked = f", asking for {size} more" if (size := asked_for(error)) else ""
    remedies = [f"lower learner.token_budget={learner.token_budget}"]
    if learner.memory.activation_checkpointing is not ActivationCheckpointing.full:
        remedies.append("set learner.memory.activation_checkpointing=full")
    if not learner.lora.rank:
        remedies.append("start anew with an adapter only (learner.lora.rank=16)")
    return f"the learner ran out of memory in the phase '{phase}'{asked}: {', or '.join(remedies)}."


def _traceback(error: BaseException, folder: Path | None) -> str:
    """Save the traceback of what caused `error`; a sentence about where, empty when that failed too."""
    cause = error.__cause__ or error
    try:
        if folder is None:
            descriptor, name = tempfile.mkstemp(prefix="whetstone-error-", suffix=".txt")
            os.close(descriptor)
            path = Path(name)
        else:
            path = folder / TRACEBACK
        path.write_text("".join(traceback.format_exception(cause)), encoding="utf-8")
    except OSError:
        return ""
    return f" Its traceback is in {path}."
