from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from rlhf.clock import Clock
from rlhf.metrics import unknown


def _ticking() -> tuple[Callable[[float], None], Callable[[], float]]:
    """A time that goes on only when told to."""
    at = [1000.0]

    def advance(seconds: float) -> None:
        at[0] += seconds

    return advance, lambda: at[0]


def test_phases_by_hand() -> None:
    advance, now = _ticking()
    clock = Clock(now=now)
    advance(1)
    with clock("rollout"):
        advance(2)
        with clock("reward"):
            advance(4)
        advance(8)
    with clock("update"):
        advance(16)
    with clock("rollout"):
        advance(32)
    advance(64)
    expected = {"time/rollout": 42, "time/reward": 4, "time/update": 16, "time/other": 65, "time/step": 127}
    assert clock.metrics() == {**expected, "time/elapsed": 127}


def test_each_step_begins_anew_and_elapsed_goes_on() -> None:
    advance, now = _ticking()
    clock = Clock(elapsed=100.0, now=now)
    with clock("rollout"):
        advance(2)
    assert clock.metrics() == {"time/rollout": 2, "time/other": 0, "time/step": 2, "time/elapsed": 102}
    advance(3)
    assert clock.metrics() == {"time/other": 3, "time/step": 3, "time/elapsed": 105}


def test_exception_and_open_phase_keep_the_sum_right() -> None:
    advance, now = _ticking()
    clock = Clock(now=now)

    def fail() -> None:
        with clock("rollout"), clock("reward"):
            advance(2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert clock.phase == "other"
    with clock("update"):
        advance(3)
        assert clock.phase == "update"
        inside = clock.metrics()
        advance(5)
    assert inside["time/step"] == 5 == inside["time/reward"] + inside["time/update"]
    assert clock.metrics()["time/update"] == 5


def test_it_knows_how_long_nothing_has_changed_and_which_phase_failed_first() -> None:
    advance, now = _ticking()
    clock = Clock(now=now)
    with clock("update"):
        advance(5)
        assert (clock.still, clock.failed) == (5, "")
    assert clock.still == 0
    with pytest.raises(ValueError, match="no"), clock("rollout"), clock("reward"):
        raise ValueError("no")
    assert clock.failed == "reward"


def test_phase_inside_itself_counts_once() -> None:
    advance, now = _ticking()
    clock = Clock(now=now)
    with clock("rollout"):
        advance(1)
        with clock("rollout"):
            advance(2)
    assert clock.metrics()["time/rollout"] == 3


@pytest.mark.parametrize("name", ["other", "step", "elapsed"])
def test_reserved_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"time/{name} is computed by the clock"), Clock()(name):
        pass


def test_other_threads_need_their_own_clock() -> None:
    clock = Clock()
    caught: list[str] = []

    def work() -> None:
        try:
            with clock("rollout"):
                pass
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == ["phase 'rollout' began on another thread: give each thread its own Clock."]


def test_real_seconds_add_up() -> None:
    start = time.perf_counter()
    clock = Clock()
    with clock("rollout"):
        time.sleep(0.03)
    with clock("update"):
        time.sleep(0.02)
    metrics = clock.metrics()
    whole = time.perf_counter() - start
    phases = sum(metrics[f"time/{name}"] for name in ("rollout", "update", "other"))
    assert metrics["time/step"] == phases
    assert 0.05 <= metrics["time/step"] <= whole
    assert 0.03 <= metrics["time/rollout"] < 0.03 + whole - 0.05 + 0.01
    assert unknown(metrics) == []
