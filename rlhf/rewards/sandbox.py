"""Killable worker processes: a task that hangs, crashes or eats memory costs itself and nothing else.

A worker is a fresh Python process of its own session that imports what its jobs need, never the trainer.
Tasks go to it as pickles (what we send is ours); answers come back as lines of JSON, one a task, so a
worker that hostile text has taken over can send a wrong value but run no code here. Because every task is
answered for itself, the parent always knows which one is running: that one alone is blamed, the others of
its chunk go to another worker. A SIGKILL may have come from anywhere: the task is tried once more.

Three limits: an alarm inside the worker after `timeout_s` (cheap: the worker lives on), SIGKILL of its whole
process group one second later (for loops in C that no alarm interrupts), and `RLIMIT_AS` for memory. Workers
get SIGKILL from the kernel when the thread that made them ends; they are made by a thread that lives as long
as the pool, hence the pool may be used from any thread.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pickle
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any

from rlhf.errors import UserError
from rollout.parent import end_with_parent

GRACE_S = 1.0
"""Seconds between the alarm inside the worker and SIGKILL from outside."""
START_LIMIT_S = 180.0
"""Seconds that a worker may take to import its jobs."""
CHUNK = 32
"""Most tasks handed over at once."""
_TIME = " (reward.timeout_s)"
RECYCLE_AFTER = 20_000
"""Tasks after which a worker is replaced between rounds (libraries' caches grow)."""


class SandboxError(RuntimeError):
    """Workers cannot be started at all; the text says why."""


@dataclass(frozen=True)
class Job:
    """What a worker can do: `factory` (`module:attribute`) is called with `kwargs` once a worker and gives
    the function that each task of this job calls with its payload. The result must be JSON."""

    factory: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of one task."""

    value: Any = None
    failure: str = ""
    """Empty, `timeout` or `error`."""
    message: str = ""
    """Why it failed."""


class WorkerPool:
    """Up to `workers` processes, started when first needed, replaced when they die."""

    def __init__(self, jobs: dict[str, Job], *, workers: int, timeout_s: float, memory_mb: int) -> None:
        self._setup = pickle.dumps((os.getpid(), timeout_s, memory_mb, jobs))
        self._timeout_s = timeout_s
        self._wanted = workers
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grading-spawner")
        self._lock = threading.Lock()
        self._closed = False
        self.replaced = 0
        """Workers that were killed or died so far."""

    def start(self) -> None:
        """Start every worker without waiting for it."""
        with self._lock:
            self._staff(self._wanted)

    def map(self, tasks: Sequence[tuple[str, Any]]) -> list[Outcome]:
        """Run every `(job, payload)`; outcomes in order. One round at a time, from any thread.

        Raises `SandboxError` when workers cannot be started.
        """
        with self._lock:
            if self._closed:
                raise SandboxError("the grading workers are closed.")
            round_ = _Round(tasks)
            try:
                self._run(round_)
            except BaseException:
                self._stop_all()
                raise
            self._recycle()
            return [outcome or Outcome() for outcome in round_.outcomes]

    def close(self) -> None:
        """Kill every worker; safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._stop_all()
                self._selector.close()
                self._spawner.shutdown()

    def _run(self, round_: _Round) -> None:
        starts = 0
        while round_.unfinished:
            starts += self._staff(min(self._wanted, len(round_.pending) + self._busy()))
            if starts > 2 * len(round_.tasks) + self._wanted + 3:
                raise SandboxError(
                    "grading workers die as soon as they have started: look at what they wrote to standard "
                    "error, or raise reward.memory_mb."
                )
            for worker in list(self._workers):
                if worker.idle and round_.pending:
                    self._hand_over(worker, round_)
            self._listen(round_)

    def _staff(self, wanted: int) -> int:
        """Drop workers that died while idle, start what is missing; returns how many were started."""
        for worker in list(self._workers):
            if worker.idle and worker.process.poll() is not None:
                self._remove(worker)
        missing = wanted - len(self._workers)
        for _ in range(missing):
            worker = self._spawner.submit(_Worker, self._setup).result()
            self._workers.append(worker)
            self._selector.register(worker.replies, selectors.EVENT_READ, worker)
        return max(missing, 0)

    def _hand_over(self, worker: _Worker, round_: _Round) -> None:
        share = -(-len(round_.pending) // (2 * self._wanted))
        indices = [round_.pending.popleft() for _ in range(min(CHUNK, share))]
        worker.running.extend(indices)
        worker.deadline = time.monotonic() + self._timeout_s + GRACE_S
        with contextlib.suppress(BrokenPipeError):  # a worker that has just died is found by `_listen`
            worker.requests.write(pickle.dumps([(index, *round_.tasks[index]) for index in indices]))
            worker.requests.flush()

    def _listen(self, round_: _Round) -> None:
        """Wait for answers, deaths and deadlines, and settle them."""
        nearest = min(worker.deadline for worker in self._workers)
        wait = max(0.0, min(nearest - time.monotonic(), START_LIMIT_S))
        heard = {key.data for key, _ in self._selector.select(wait)}
        for worker in list(self._workers):
            if worker in heard:
                self._hear(worker, round_)
            elif time.monotonic() > worker.deadline:
                limit, key = (self._timeout_s, _TIME) if worker.ready else (START_LIMIT_S, "")
                self._lose(worker, round_, "timeout", f"no answer within {limit:g} s{key}")

    def _hear(self, worker: _Worker, round_: _Round) -> None:
        received = os.read(worker.replies.fileno(), 1 << 16)
        if not received:
            status = worker.process.wait()
            if status == -signal.SIGKILL and round_.spares(worker.running):
                self._replace(worker, round_)
            else:
                self._lose(worker, round_, "error", f"the worker died ({_ending(status)})")
            return
        *lines, worker.partial = (worker.partial + received).split(b"\n")
        for line in lines:
            reply = _decode(line)
            if "fatal" in reply:
                raise SandboxError(reply["fatal"])
            if "ready" in reply:
                worker.ready, worker.deadline = True, float("inf")
            elif not worker.running or reply.get("index") != worker.running[0]:
                self._lose(worker, round_, "error", "the worker sent something unreadable")
                return
            else:
                self._settle(worker, round_, reply)
                if reply.get("retire"):
                    self._lose(worker, round_, "", "")
                    return

    def _settle(self, worker: _Worker, round_: _Round, reply: dict[str, Any]) -> None:
        outcome = Outcome(reply.get("value"), reply.get("failure", ""), reply.get("message", ""))
        round_.finish(worker.running.popleft(), outcome)
        worker.done += 1
        limit = self._timeout_s + GRACE_S if worker.running else float("inf")
        worker.deadline = time.monotonic() + limit

    def _lose(self, worker: _Worker, round_: _Round, failure: str, message: str) -> None:
        """Kill `worker`, blame the task that it was at (when `failure` says so), give the others back."""
        if not worker.ready:
            raise SandboxError(f"a grading worker did not start: {message}.")
        if failure and worker.running:
            round_.finish(worker.running.popleft(), Outcome(None, failure, message))
        self._replace(worker, round_)

    def _replace(self, worker: _Worker, round_: _Round) -> None:
        """Kill `worker` and give all its tasks back."""
        round_.pending.extendleft(reversed(worker.running))
        self._remove(worker)
        self.replaced += 1

    def _remove(self, worker: _Worker) -> None:
        self._selector.unregister(worker.replies)
        self._workers.remove(worker)
        worker.kill()

    def _stop_all(self) -> None:
        for worker in list(self._workers):
            self._remove(worker)

    def _recycle(self) -> None:
        for worker in list(self._workers):
            if worker.done >= RECYCLE_AFTER:
                self._remove(worker)

    def _busy(self) -> int:
        return sum(1 for worker in self._workers if worker.running)


class _Round:
    """The tasks of one `map` call: which wait, and what became of the others."""

    def __init__(self, tasks: Sequence[tuple[str, Any]]) -> None:
        self.tasks = tasks
        self.pending: deque[int] = deque(range(len(tasks)))
        self.outcomes: list[Outcome | None] = [None] * len(tasks)
        self.unfinished = len(tasks)
        self._spared: set[int] = set()

    def spares(self, running: Sequence[int]) -> bool:
        """Whether the task that a killed worker was at, the first of these, is not to blame: the first time,
        and when there is none."""
        if not running:
            return True
        spared = running[0] not in self._spared
        self._spared.add(running[0])
        return spared

    def finish(self, index: int, outcome: Outcome) -> None:
        """Record the outcome of task `index`."""
        self.outcomes[index] = outcome
        self.unfinished -= 1


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, setup: bytes) -> None:
        paths = dict.fromkeys(os.path.abspath(path) for path in ["", *sys.path])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from rlhf.rewards.sandbox import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests: IO[bytes] = self.process.stdin
        self.replies: IO[bytes] = self.process.stdout
        self.ready = False
        self.running: deque[int] = deque()
        self.deadline = time.monotonic() + START_LIMIT_S
        self.partial = b""
        self.done = 0
        with contextlib.suppress(BrokenPipeError):
            self.requests.write(setup)
            self.requests.flush()

    @property
    def idle(self) -> bool:
        """Whether it waits for tasks."""
        return self.ready and not self.running

    def kill(self) -> None:
        """SIGKILL the process and whatever it started, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                pipe.close()


def _decode(line: bytes) -> dict[str, Any]:
    """One reply; an unreadable one is an empty dict, which fits no task."""
    with contextlib.suppress(ValueError):
        reply = json.loads(line)
        if isinstance(reply, dict):
            return reply
    return {}


def _ending(returncode: int) -> str:
    """How a process ended, in words."""
    return signal.Signals(-returncode).name if returncode < 0 else f"exit status {returncode}"


# ---- the worker's side ----


class _OutOfTimeError(BaseException):
    """The alarm inside a worker. No `Exception`: a grader's own `except Exception` must not swallow it."""


def serve() -> None:
    """Main function of a worker process."""
    requests, replies = _take_pipes()
    parent, timeout_s, memory_mb, jobs = pickle.load(requests)
    end_with_parent(parent)
    _limit_memory(memory_mb)
    signal.signal(signal.SIGALRM, _out_of_time)
    try:
        functions = {name: resolve(job.factory)(**job.kwargs) for name, job in jobs.items()}
    except BaseException as error:
        _send(replies, {"fatal": _describe(error)})
        return
    _collect_rarely()
    _send(replies, {"ready": True})
    while True:
        try:
            chunk = pickle.load(requests)
        except EOFError:
            return
        for index, job, payload in chunk:
            _send(replies, {"index": index, **_attempt(functions[job], payload, timeout_s)})


def resolve(path: str) -> Any:
    """The object that `module:attribute` names."""
    module, _, attribute = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes to the parent, moved out of the way of whatever a grader prints or reads."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _limit_memory(memory_mb: int) -> None:
    """Cap the address space; 0 leaves it open. No core dumps either way."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mb:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


def _collect_rarely() -> None:
    """Leave what the jobs imported to the garbage collector's past: parsing costs a third less (measured)."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def _out_of_time(_signal: int, _frame: FrameType | None) -> None:
    raise _OutOfTimeError


def _attempt(function: Callable[[Any], Any], payload: Any, timeout_s: float) -> dict[str, Any]:
    """Run one task under the alarm; whatever it raises is its own failure."""
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            value = function(payload)
            json.dumps(value)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        return {"value": value}
    except _OutOfTimeError:
        return {"failure": "timeout", "message": f"no answer within {timeout_s:g} s{_TIME}"}
    except MemoryError:
        return {"failure": "error", "message": "out of memory (reward.memory_mb)", "retire": True}
    except BaseException as error:
        return {"failure": "error", "message": _describe(error)}


def _describe(error: BaseException) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text[:500]


def _send(replies: IO[bytes], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()
