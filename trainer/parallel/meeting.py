"""A name for one start of the ranks, which no earlier start had.

torchrun starts ranks again after one has died (`--max-restarts`), and gives them the same store, in which the
addresses of the dead still stand. Its count of restarts does not tell starts apart: with several machines
each counts its own. So ranks agree on a name, under which they then exchange addresses.
"""

from __future__ import annotations

import hashlib
import time
import uuid

import torch.distributed as dist

PAUSE_SECONDS = 0.02
"""Between two looks at the store."""


def agreed_name(store: dist.Store, rank: int, size: int) -> str:
    """Meet the other ranks in `store`; the same text on all, once all are there.

    Each leaves a word that it has just made up. Rank 0 names a meeting after the words that it finds, again
    and again, as a word may be that of a rank's predecessor, until every rank has found its own word in one.
    """
    own = uuid.uuid4().hex
    store.set(f"meeting/word/{rank}", own)
    return _lead(store, size, own) if rank == 0 else _follow(store, rank, own)


def _lead(store: dist.Store, size: int, own: str) -> str:
    others = range(1, size)
    while True:
        words = [own, *(_text(store, f"meeting/word/{rank}") for rank in others)]
        name = hashlib.blake2b("".join(words).encode(), digest_size=8).hexdigest()
        store.set("meeting/called", " ".join([name, *words]))
        time.sleep(PAUSE_SECONDS)
        if all(store.check([f"meeting/{name}/{rank}"]) for rank in others):
            store.set(f"meeting/{name}/complete", "yes")
            return name


def _follow(store: dist.Store, rank: int, own: str) -> str:
    while True:
        name, *words = _text(store, "meeting/called").split()
        if words[rank] == own:
            store.set(f"meeting/{name}/{rank}", "here")
            if store.check([f"meeting/{name}/complete"]):
                return name
        time.sleep(PAUSE_SECONDS)


def _text(store: dist.Store, key: str) -> str:
    """What stands under `key`; waits for it."""
    return store.get(key).decode()
