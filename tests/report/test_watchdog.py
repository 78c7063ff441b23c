"""`Watchdog`: a hang is named once, with stacks; a run that moves is left alone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.clock import Clock
from rlhf.watchdog import STACKS, Watchdog

LIMIT = 0.2
"""Seconds without a change of phase that count as a hang here."""

SPINNING = """
import re, threading
from pathlib import Path
from rlhf.clock import Clock
from rlhf.watchdog import Watchdog

def grade():
    re.match(r"(a+)+$", "a" * 40 + "b")

clock = Clock()
with Watchdog(0.2 / 60, clock, Path("."), step=lambda: 1), clock("reward"):
    grade()
"""
"""A regular expression that takes weeks and lets no other thread run meanwhile."""


def watching(folder: Path, clock: Clock, **options: object) -> Watchdog:
    return Watchdog(LIMIT / 60, clock, folder, step=lambda: 4, **options)  # type: ignore[arg-type]


def judge_until(done: Callable[[], bool]) -> None:
    """Hang until the watchdog is done with it."""
    limit = time.monotonic() + 60
    while not done() and time.monotonic() < limit:
        time.sleep(0.01)


def test_a_hang_is_named_once_with_the_stacks_of_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    stacks = {"engine process 7": "in engine_server.py", "engine process 8": ""}
    with watching(tmp_path, clock, engine_stacks=lambda: stacks):
        for hangs in (1, 2):
            with clock("rollout"), clock("reward"):
                judge_until(lambda hangs=hangs: len(caplog.messages) == hangs)  # type: ignore[misc]
                time.sleep(LIMIT)  # it is said once
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith(
        "run.watchdog_minutes=0.00333333: the phase 'reward' of step 4 has not ended for 0.00"
    )
    assert caplog.messages[0].endswith(
        f"minutes; where every thread is stands in {tmp_path / STACKS}. The run is not stopped: wait, or end "
        "it with Ctrl-C twice."
    )
    written = (tmp_path / STACKS).read_text()
    assert written.count("the phase 'reward' of step 4") == 2
    assert written.count("in judge_until") == 2
    assert "engine process 7:\nin engine_server.py\n\nengine process 8:\ndoes not answer\n" in written


def test_a_run_that_moves_and_one_that_is_not_watched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with Watchdog(1.0, clock, tmp_path, step=lambda: 1) as watchdog:
        for _ in range(3):
            with clock("update"):
                watchdog._look()
    threads = threading.active_count()
    with Watchdog(0.0, clock, tmp_path, step=lambda: 1):
        assert threading.active_count() == threads
    assert caplog.messages == []
    assert not (tmp_path / STACKS).exists()


def test_stacks_that_cannot_be_written_are_no_second_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / STACKS).symlink_to("/dev/full")
    clock = Clock()
    with watching(tmp_path, clock), clock("publish"):
        judge_until(lambda: bool(caplog.messages))
    assert "where every thread is could not be written (No space left on device)." in caplog.messages[0]


def test_code_that_lets_no_other_thread_run_is_shown_on_standard_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SPINNING], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "in <module>" in line:
            break
    process.kill()
    process.communicate()
    assert said.startswith("Timeout (0:00:00.")
    assert "in grade" in said
