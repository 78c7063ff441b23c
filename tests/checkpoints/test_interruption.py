"""Signals: the first is noted, the second interrupts, and former handlers come back."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf.interruption import SIGNALS, Interruption


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_noted_and_the_second_interrupts(number: signal.Signals, status: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    interruption = Interruption()
    with interruption:
        signal.raise_signal(number)
        assert interruption.received is number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interruption.status == status
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_installs_nothing() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]

    def handlers_inside() -> list[object]:
        with Interruption():
            return [signal.getsignal(each) for each in SIGNALS]

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(handlers_inside).result() == before
