"""What rank 0's watchdog says of other ranks, and they of rank 0. A real hang: `test_distributed_runs.py`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from rlhf import rank_watch
from rlhf.clock import Clock
from rlhf.rank_watch import Followers, Presence
from rlhf.watchdog import STACKS, Watchdog
from trainer.parallel.roll_call import Activity, RollCall

LIMIT = 0.3
"""Seconds."""


def watched(folder: Path, store: dist.Store, clock: Clock) -> Watchdog:
    followers = Followers(RollCall(store, 0, 3))
    return Watchdog(LIMIT / 60, clock, folder, step=lambda: 4, followers=followers)


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The only sentence, as soon as there is one."""
    limit = time.monotonic() + 20
    while not caplog.messages and time.monotonic() < limit:
        time.sleep(0.01)
    (sentence,) = caplog.messages
    return sentence


def test_a_busy_rank_is_named_while_rank_0_moves_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 works, and says where; rank 2 has said a word and died. Rank 0 changes phase all the time."""
    monkeypatch.setattr(rank_watch, "ANSWER_SECONDS", 1.0)
    store, clock, activity = dist.HashStore(), Clock(), Activity()
    activity.begin("end_rollout")
    presence = Presence(LIMIT / 60, RollCall(store, 1, 3), activity, 0.05)
    presence._look()
    RollCall(store, 2, 3).tell("update", 0.0)
    with presence, watched(tmp_path, store, clock):
        limit = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < limit:
            with clock("rollout"):
                time.sleep(0.01)
    sentence = said(caplog)
    assert sentence.startswith("run.watchdog_minutes=0.005: 'end_rollout' on rank 1 has not ended for 0.")
    assert "; rank 1 has not arrived: at 'end_rollout' it is in test_a_busy_rank_is_named_while" in sentence
    assert "; rank 2 has not arrived: it does not answer, its last word was 'update'; where" in sentence
    written = (tmp_path / STACKS).read_text()
    assert "in test_a_busy_rank_is_named" in written.partition("rank 1:\n")[2].partition("rank 2:\n")[0]
    assert "rank 2:\ndoes not answer\n" in written


def test_ranks_that_wait_for_rank_0_are_not_blamed() -> None:
    store = dist.HashStore()
    followers = Followers(RollCall(store, 0, 3))
    ranks = [Presence(1, RollCall(store, rank, 3), Activity(), 0.05) for rank in (1, 2)]
    with ranks[0], ranks[1]:
        found = followers.muster(0.05)
        assert followers.look("reward", 4, 100.0, limit=60.0) == ""
    assert found.clauses == []
    assert list(found.stacks) == ["rank 1", "rank 2"]
    assert all("in test_ranks_that_wait_for_rank_0" in stacks for stacks in found.stacks.values())


def test_a_silent_rank_0_is_named_by_rank_1_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_watch, "SLACK_SECONDS", 0.0)
    store = dist.HashStore()
    leader = RollCall(store, 0, 3)
    ranks = [Presence(LIMIT / 60, RollCall(store, rank, 3), Activity(), 0.05) for rank in (1, 2)]
    with ranks[0], ranks[1]:
        time.sleep(2 * LIMIT)
        assert caplog.messages == [], "rank 0 has not begun"
        leader.tell("the phase 'rollout' of step 3", 0.1)
        sentence = said(caplog)
        leader.leave()
        time.sleep(2 * LIMIT)
    assert sentence.startswith("run.watchdog_minutes=0.005: rank 0 has given no sign for 0.")
    assert "the last was of the phase 'rollout' of step 3, in tell (roll_call.py:" in sentence
    assert len(caplog.messages) == 1
