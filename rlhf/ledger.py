"""`Ledger`: what became of every group of a run, one line an event, appended and never cut back.

`rollouts/` and `metrics.jsonl` hold the history that counts, and are cut back when a run goes on from a
checkpoint. `ledger.jsonl` also holds what was lost: a reader who knows nothing of the run but this file can
account for every sample. A sample is named by its group's id and its place in the group.

| event | what it says |
|---|---|
| `begin` | the run begins, or goes on after step `after`: what stands above of later steps is void |
| `drawn` | `groups` of `samples` responses each are asked of the engines for `step` |
| `again` | the engine of `groups` died while it generated them for `step`; they were generated again |
| `selected` | what became of the groups that `step` looked at: `kept`, `carried`, `dropped` by reason |
| `trained` | the learner has learned from `groups` in `step` |

An event is one `write` to a file opened to append: after a kill a line is there or is not. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.algorithms.dynamic_sampling import Selection
from rollout.types import Group

LEDGER = "ledger.jsonl"


class Ledger:
    """Appends to the ledger of the run in a folder. Any thread may write."""

    def __init__(self, folder: Path) -> None:
        """Open it; a last line that a full disk or a power cut left without its end is cut off."""
        path = folder / LEDGER
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)

    def begin(self, after: int) -> None:
        """The run goes on after this step; 0 for a new one, and for one that begins anew."""
        self._write("begin", after=after, time=round(time.time(), 3), process=os.getpid())

    def drawn(self, step: int, groups: Sequence[str], samples: int) -> None:
        """These are asked of the engines."""
        self._write("drawn", step=step, groups=list(groups), samples=samples)

    def again(self, step: int, groups: Sequence[str]) -> None:
        """These were generated again, from their beginning."""
        self._write("again", step=step, groups=list(groups))

    def selected(self, step: int, selection: Selection) -> None:
        """A step has chosen."""
        dropped: defaultdict[str, list[str]] = defaultdict(list)
        for group in selection.dropped:
            dropped[group.verdict].append(group.id)
        self._write(
            "selected",
            step=step,
            kept=_ids(selection.groups),
            carried=_ids(selection.carried),
            dropped=dropped,
        )

    def trained(self, step: int, groups: Sequence[Group]) -> None:
        """A step has learned."""
        self._write("trained", step=step, groups=_ids(groups))

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, event: str, **what: Any) -> None:
        line = json.dumps({"event": event, **what}, separators=(",", ":")).encode() + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), LEDGER)


def _ids(groups: Sequence[Group]) -> list[str]:
    return [group.id for group in groups]
