"""`RollCall`: where each rank is, told through a store, beside the connections on which ranks may hang."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

WAITING = "waiting for rank 0"
"""What a follower does between two commands."""

_TORCH = str(Path(torch.__file__).parent)
_COLLECTIVES = str(Path(_TORCH, "distributed"))


class Activity:
    """What a rank is doing, and since when; any thread may ask."""

    def __init__(self, phase: str = WAITING) -> None:
        self._state = (phase, time.monotonic())

    def begin(self, phase: str) -> None:
        """It does something else from now on."""
        self._state = (phase, time.monotonic())

    @property
    def phase(self) -> str:
        """What it is doing."""
        return self._state[0]

    @property
    def still(self) -> float:
        """Seconds since it began with that."""
        return time.monotonic() - self._state[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a rank says of itself."""

    phase: str
    """Its command, or `WAITING`; of rank 0 the phase and the step."""
    still: float
    """Seconds since it began with that."""
    place: str
    """Where its main thread is: the innermost call that is not torch's."""
    waits: bool
    """Whether that thread is in a collective: there, but others may not be."""

    @property
    def busy(self) -> bool:
        """Whether rank 0 has told it to do something that is not done."""
        return self.phase != WAITING


class RollCall:
    """Words of ranks in a store. One thread of each rank uses it, now and then.

    Raises RuntimeError (`torch.distributed.DistError`) when the store is gone.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """`store`: of this start of the ranks alone."""
        self._store = store
        self.rank, self.size = rank, size
        self._words = 0
        self._heard: dict[int, tuple[str, float]] = {}
        self._call = 0

    def tell(self, phase: str, still: float) -> None:
        """Leave a word for the others, and this process's stacks where they were asked for."""
        self._words += 1
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        word = Word(phase=phase, still=still, place=_place(frame), waits=_in_collective(frame))
        self._store.set(f"word/{self.rank}", json.dumps([self._words, asdict(word)]))
        call = self._called()
        if call > self._call:
            self._call = call
            self._store.set(f"stacks/{call}/{self.rank}", _stacks())

    def leave(self) -> None:
        """Say that no more words will come."""
        self._store.set(f"word/{self.rank}", json.dumps([-1, None]))

    def word(self, rank: int) -> Word | None:
        """The last word of a rank; None before the first and after it has left."""
        if not self._store.check([f"word/{rank}"]):
            return None
        text = self._store.get(f"word/{rank}").decode()
        if self._heard.get(rank, ("", 0.0))[0] != text:
            self._heard[rank] = (text, time.monotonic())
        _, plain = json.loads(text)
        return Word(**plain) if plain else None

    def silent(self, rank: int) -> float:
        """Seconds for which `word` has given the same word of a rank."""
        return time.monotonic() - self._heard[rank][1]

    def stacks(self, patience: float) -> dict[int, str]:
        """Ask the others where their threads are; what they said within `patience` seconds, by rank."""
        self._call = self._store.add("stacks/calls", 1)
        limit = time.monotonic() + patience
        missing = {rank: f"stacks/{self._call}/{rank}" for rank in range(self.size) if rank != self.rank}
        found: dict[int, str] = {}
        while missing and time.monotonic() < limit:
            for rank, key in list(missing.items()):
                if self._store.check([key]):
                    found[rank] = self._store.get(missing.pop(rank)).decode()
            time.sleep(0.05)
        return found

    def _called(self) -> int:
        return self._store.add("stacks/calls", 0)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost call outwards; torch's dispatch of an operator is no call of its own."""
    while frame is not None:
        if Path(frame.f_code.co_filename).name != "_ops.py":
            yield frame
        frame = frame.f_back


def _in_collective(frame: FrameType) -> bool:
    innermost = next(_frames(frame), None)
    return innermost is not None and innermost.f_code.co_filename.startswith(_COLLECTIVES)


def _place(frame: FrameType) -> str:
    own = (one for one in _frames(frame) if not one.f_code.co_filename.startswith(_TORCH))
    found = next(own, frame)
    return f"{found.f_code.co_name} ({Path(found.f_code.co_filename).name}:{found.f_lineno})"


def _stacks() -> str:
    """Where every Python thread of this process is, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
