"""Turns: one at a time, in the order of asking, also after somebody gave up."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from rollout.turns import Turns


def asking(turns: Turns, name: str, log: list[str]) -> threading.Thread:
    """A thread that is in the queue when this returns."""

    def take() -> None:
        with turns():
            log.append(name)
            time.sleep(0.01)
            log.append(name)

    before = len(turns._queue)
    thread = threading.Thread(target=take)
    thread.start()
    while len(turns._queue) == before:
        time.sleep(0.001)
    return thread


def test_who_asked_first_comes_first_and_alone() -> None:
    turns = Turns()
    log: list[str] = []
    with turns():
        threads = [asking(turns, name, log) for name in "abcd"]
        assert log == []
    for thread in threads:
        thread.join(10)
    assert log == [name for name in "abcd" for _ in range(2)]


def test_one_that_comes_back_at_once_does_not_overtake() -> None:
    turns = Turns()
    log: list[str] = []
    with turns():
        thread = asking(turns, "publish", log)
    with turns():
        log.append("next round")
    thread.join(10)
    assert log == ["publish", "publish", "next round"]


def test_an_exception_ends_a_turn() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns():
        raise KeyError
    with turns():
        pass


def test_ctrl_c_while_waiting_gives_the_place_up() -> None:
    turns, leave = Turns(), threading.Event()
    log: list[str] = []

    def hold() -> None:
        with turns():
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    while not turns._queue:
        time.sleep(0.001)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), turns():
        raise AssertionError("another one's turn")
    thread = asking(turns, "next", log)
    leave.set()
    thread.join(10)
    holder.join(10)
    assert log == ["next", "next"]
