"""Workers really are killed, and only the guilty task pays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.rewards import sandbox
from rlhf.rewards.sandbox import Job, Outcome, SandboxError, WorkerPool

JOBS = {"echo": Job("tests.rewards.hostile:echo"), "obey": Job("tests.rewards.hostile:obey")}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(JOBS, workers=2, timeout_s=1.0, memory_mb=1024)
    yield made
    made.close()


def gone(pid: int) -> bool:
    """Whether a process has ended (an unreaped zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not gone(pid):
        time.sleep(0.02)
    return gone(pid)


def surrounded(order: str) -> list[tuple[str, object]]:
    """The hostile order in the middle of 40 harmless tasks."""
    tasks: list[tuple[str, object]] = [("echo", number) for number in range(40)]
    tasks.insert(20, ("obey", order))
    return tasks


def check_neighbors(outcomes: list[Outcome]) -> Outcome:
    """All 40 neighbors are right; returns the hostile task's outcome."""
    guilty = outcomes.pop(20)
    assert [outcome.value for outcome in outcomes] == [[number, number] for number in range(40)]
    assert all(outcome.failure == "" for outcome in outcomes)
    return guilty


def test_order_is_kept(pool: WorkerPool) -> None:
    outcomes = pool.map([("echo", {"n": number}) for number in range(500)])
    assert [outcome.value[0]["n"] for outcome in outcomes] == list(range(500))
    assert pool.map([]) == []


def test_alarm_ends_a_sleeping_grader_and_spares_the_worker(pool: WorkerPool) -> None:
    replaced = pool.replaced
    guilty = check_neighbors(pool.map(surrounded("sleep")))
    assert guilty == Outcome(None, "timeout", "no answer within 1 s (reward.timeout_s)")
    assert pool.replaced == replaced


@pytest.mark.parametrize("order", ["sleep deaf", "swallow"])
def test_deaf_grader_is_killed(pool: WorkerPool, order: str) -> None:
    replaced, began = pool.replaced, time.monotonic()
    guilty = check_neighbors(pool.map(surrounded(order)))
    assert (guilty.failure, guilty.message) == ("timeout", "no answer within 1 s (reward.timeout_s)")
    assert pool.replaced == replaced + 1
    assert time.monotonic() - began > 1.0 + sandbox.GRACE_S - 0.05


@pytest.mark.parametrize(
    ("order", "message", "workers"),
    [
        ("exit", "the worker died (exit status 3)", 1),
        ("kill", "the worker died (SIGKILL)", 2),
        ("garbage", "the worker sent something unreadable", 1),
    ],
)
def test_crash_costs_one_answer(pool: WorkerPool, order: str, message: str, workers: int) -> None:
    replaced = pool.replaced
    guilty = check_neighbors(pool.map(surrounded(order)))
    assert (guilty.failure, guilty.message) == ("error", message)
    assert pool.replaced == replaced + workers


def test_a_kill_from_outside_costs_no_answer(pool: WorkerPool) -> None:
    """Not that of the answer being graded, and not the run when a worker is still starting."""
    assert check_neighbors(pool.map(surrounded("kill once"))) == Outcome("lives")
    fresh = WorkerPool(JOBS, workers=2, timeout_s=5.0, memory_mb=1024)
    fresh.start()
    os.kill(fresh._workers[0].process.pid, signal.SIGKILL)
    assert [outcome.value for outcome in fresh.map([("echo", 1)] * 9)] == [[1, 1]] * 9
    fresh.close()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("raise", "ZeroDivisionError: integer division or modulo by zero"),
        ("quit", "SystemExit: 4"),
        ("unreadable", "TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_exception_costs_one_answer_and_no_worker(pool: WorkerPool, order: str, message: str) -> None:
    replaced = pool.replaced
    guilty = check_neighbors(pool.map(surrounded(order)))
    assert (guilty.failure, guilty.message) == ("error", message)
    assert pool.replaced == replaced


def test_memory_hog_fails_and_its_worker_is_replaced(pool: WorkerPool) -> None:
    replaced = pool.replaced
    guilty = check_neighbors(pool.map(surrounded("hog")))
    assert (guilty.failure, guilty.message) == ("error", "out of memory (reward.memory_mb)")
    assert pool.replaced == replaced + 1


def test_printing_and_reading_do_no_harm(pool: WorkerPool) -> None:
    assert check_neighbors(pool.map(surrounded("noise"))).value == ""


def test_own_session(pool: WorkerPool) -> None:
    """Ctrl-C at the terminal reaches our process group only."""
    assert pool.map([("obey", "session")])[0].value != os.getsid(0)


def test_many_hostile_tasks_at_once(pool: WorkerPool) -> None:
    orders = ["raise", "exit", "kill", "pid", "quit", "hog"] * 3
    outcomes = pool.map([("obey", order) for order in orders])
    assert [outcome.failure for outcome in outcomes] == ["error", "error", "error", "", "error", "error"] * 3


def test_pool_outlives_the_thread_that_started_it(pool: WorkerPool) -> None:
    """The kernel's death signal follows the *thread* that made a process; ours lives as long as the pool."""
    fresh = WorkerPool(JOBS, workers=1, timeout_s=5.0, memory_mb=1024)
    found: list[int] = []

    def use() -> None:
        found.append(fresh.map([("obey", "pid")])[0].value)

    for _ in range(2):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        time.sleep(0.2)
    assert found[0] == found[1]
    fresh.close()
    assert gone(found[0])


def test_threads_may_share_a_pool(pool: WorkerPool) -> None:
    results: dict[int, list[Outcome]] = {}

    def use(n: int) -> None:
        results[n] = pool.map([("echo", n)] * 50)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(outcome.value == [n, n] for n in range(4) for outcome in results[n])


def test_workers_die_with_a_killed_parent() -> None:
    code = (
        "from rlhf.rewards.sandbox import Job, WorkerPool\n"
        "jobs = {'obey': Job('tests.rewards.hostile:obey')}\n"
        "pool = WorkerPool(jobs, workers=1, timeout_s=600, memory_mb=0)\n"
        "print(pool.map([('obey', 'pid')])[0].value, flush=True)\n"
        "pool.map([('obey', 'sleep deaf')])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    assert not gone(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(worker)


def test_killing_takes_what_the_grader_started() -> None:
    fresh = WorkerPool(JOBS, workers=1, timeout_s=5.0, memory_mb=1024)
    pid = fresh.map([("obey", "pid"), ("obey", "fork")])[0].value
    children = [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and not gone(int(entry)) and _session(int(entry)) == pid
    ]
    assert len(children) >= 2
    fresh.close()
    assert all(wait_until_gone(child) for child in children)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def test_worker_that_died_while_idle_is_replaced_without_blame() -> None:
    fresh = WorkerPool(JOBS, workers=1, timeout_s=5.0, memory_mb=1024)
    pid = fresh.map([("obey", "pid")])[0].value
    os.kill(pid, signal.SIGKILL)
    assert wait_until_gone(pid)
    assert fresh.map([("echo", 1)])[0].value == [1, 1]
    fresh.close()


def test_workers_are_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "RECYCLE_AFTER", 10)
    fresh = WorkerPool(JOBS, workers=1, timeout_s=5.0, memory_mb=1024)
    first = fresh.map([("obey", "pid")] * 10)[0].value
    second = fresh.map([("obey", "pid")])[0].value
    assert first != second
    assert fresh.replaced == 0
    fresh.close()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tests.rewards.hostile:broken", "ValueError: no such model"),
        ("tests.rewards.nowhere:job", "ModuleNotFoundError: No module named 'tests.rewards.nowhere'"),
        ("tests.rewards.hostile:dead", "a grading worker did not start: the worker died (exit status 9)."),
    ],
)
def test_a_job_that_cannot_start_says_so(factory: str, message: str) -> None:
    fresh = WorkerPool({"job": Job(factory)}, workers=2, timeout_s=1.0, memory_mb=1024)
    with pytest.raises(SandboxError) as caught:
        fresh.map([("job", 1)])
    assert str(caught.value) == message
    fresh.close()
    with pytest.raises(SandboxError, match="closed"):
        fresh.map([("job", 1)])
    fresh.close()
