"""`agreed_name` and `RollCall`: what ranks tell each other through a store. Ranks are threads here."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from trainer.parallel.meeting import agreed_name
from trainer.parallel.roll_call import WAITING, RollCall


def meet(store: dist.Store, size: int, late: int = 0) -> set[str]:
    """The names that so many ranks agree on; rank `late` comes a moment after the others."""

    def rank(number: int) -> str:
        time.sleep(0.3 * (number == late))
        return agreed_name(store, number, size)

    with ThreadPoolExecutor(size) as ranks:
        return set(ranks.map(rank, range(size)))


def test_every_start_has_a_name_of_its_own_though_the_store_remembers_the_last() -> None:
    """The late rank's old word, and the old meeting, are there when the others begin."""
    store = dist.HashStore()
    names = [meet(store, 3, late) for late in (0, 0, 1, 2)]
    assert [len(found) for found in names] == [1, 1, 1, 1]
    assert len(set.union(*names)) == 4


def test_a_rank_whose_predecessor_had_just_arrived_is_waited_for() -> None:
    """Rank 2 leaves its word and dies; the others must not begin without the one that comes after it."""
    store = dist.HashStore()
    store.set("meeting/word/2", "of the dead")
    with ThreadPoolExecutor(3) as ranks:
        early = [ranks.submit(agreed_name, store, rank, 3) for rank in (0, 1)]
        time.sleep(0.3)
        assert not any(one.done() for one in early)
        last = ranks.submit(agreed_name, store, 2, 3)
        assert {one.result(10) for one in (*early, last)} == {last.result()}


def test_words_and_stacks() -> None:
    store = dist.HashStore()
    ours, theirs = RollCall(store, 0, 3), RollCall(store, 1, 3)
    assert ours.word(1) is None
    theirs.tell("update", 4.0)
    word = ours.word(1)
    assert word is not None
    assert (word.phase, word.still, word.busy, word.waits) == ("update", 4.0, True, False)
    assert re.fullmatch(r"tell \(roll_call\.py:\d+\)", word.place), "it is the main thread that speaks here"
    time.sleep(0.1)
    ours.word(1)
    assert 0.1 <= ours.silent(1) < 5.0
    theirs.tell(WAITING, 0.0)
    word = ours.word(1)
    assert word is not None
    assert not word.busy
    assert ours.silent(1) < 0.1
    stop = threading.Event()

    def speaking() -> None:
        while not stop.wait(0.02):
            theirs.tell(WAITING, 0.0)

    thread = threading.Thread(target=speaking)
    thread.start()
    stacks = ours.stacks(1.0)
    stop.set()
    thread.join()
    assert list(stacks) == [1], "rank 2 does not answer"
    assert "in test_words_and_stacks" in stacks[1]
    theirs.leave()
    assert ours.word(1) is None
