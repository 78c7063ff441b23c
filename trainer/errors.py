"""What stops a learner, and how an allocation that failed is known. Imports no torch."""

from __future__ import annotations

import re

_ALLOCATION = re.compile(r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc", re.I)
"""What torch, CUDA and the C++ runtime say when memory runs out; on a CPU torch has no type for it."""

_SIZE = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.I)


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite; weights and optimizer are as before the step."""


class RankError(RuntimeError):
    """Another rank of the learner failed or is gone; one sentence."""


class OffloadError(RuntimeError):
    """What was to be put elsewhere between a learner's calls could not be; one sentence."""


def described(error: BaseException) -> str:
    """An exception for use inside a sentence: its type and the first line of what it says, no full stop."""
    lines = str(error).strip().splitlines()
    said = lines[0].strip()[:300].rstrip(".") if lines else ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on a CPU, or a GPU's."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _ALLOCATION.search(str(error)) is not None
    )


def asked_for(error: BaseException) -> str:
    """What the failed allocation asked for, `23.84 GiB`; empty when it does not say."""
    found = _SIZE.search(str(error))
    if found is None:
        return ""
    number, unit = found[1].split(" ") if " " in found[1] else (found[1], "")
    return f"{int(number) / (1 << 30):.2f} GiB" if unit == "bytes" else found[1]
