"""`ChildEngine`: a `VllmEngine` in a process of its own, behind a pipe.

vLLM's own engine process starts stepping while requests still arrive, outlives a SIGKILLed driver and dies
on the driver's Ctrl-C. This one is handed a whole round at once, has its own session (no Ctrl-C of ours
reaches it), dies with its parent however that ends, and has threads, preloaded libraries and variables of
its own. A learner of several ranks can hold one, because torchrun's variables are not passed on.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import errno
import functools
import itertools
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rollout
from rollout.engine import Completion, Request, Sampling
from rollout.engine_server import READY, SHARED_MEMORY, STACKS_SIGNAL, remove_openmp_file
from rollout.engine_spec import EngineSpec, thread_count
from rollout.errors import LOADING, EngineDied, EngineError
from rollout.wire import (
    PackedCompletions,
    PackedRequests,
    pack_requests,
    unpack_completions,
)
from trainer.errors import described
from trainer.parallel.visible_gpus import VISIBLE_GPUS, gpu_names

logger = logging.getLogger(__name__)

TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 31), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
"""Keeps glibc from handing memory back after every step: each step would fault 25 MB tables in again, a tenth
of its time. tcmalloc, where it is preloaded, does the same and ignores these."""

IDLE_THREADS = {"KMP_BLOCKTIME": "3"}
"""Milliseconds for which Intel's OpenMP lets an idle thread spin. Its default of 200 takes a core from the
learner whenever the engine has just answered: scoring the probe after a publish took twice as long."""

CLOSE_SECONDS = 10.0
"""How long a child may take to release its engine before it is killed."""

STACKS_SECONDS = 2.0
"""How long a child may take to write where its threads are."""

DOING = {
    "generate": "generating",
    "score": "scoring",
    "init_transfer": "opening the weight channel",
    "receive_weights": "installing weights",
    "pause": "pausing",
    "resume": "resuming",
    "sleep": "going to sleep",
}
"""Calls in words."""


class ChildEngine:
    """An engine in a child process. Implements `rollout.engine.Engine`.

    The constructor returns at once, so that several engines load at the same time; `wait` (or the first call)
    waits until the model is loaded. Any thread may call; one call at a time, but that `pause`, and calls
    until `resume`, may come in the midst of a round.

    Calls raise `EngineDied` when the process is gone, what the engine raised when that is a builtin exception
    or one of `rollout`'s, else `EngineError`. Tracebacks are in the child's log.
    """

    def __init__(self, spec: EngineSpec, gpus: Sequence[int] = ()) -> None:
        """Start the child. `gpus`: numbers of those GPUs of this process that it sees; empty: all of them."""
        self.spec = spec
        self.log_path = Path(spec.log_path or _temporary_log())
        self._temporary = not spec.log_path
        self._version = 0
        self._numbers = itertools.count(READY + 1)
        self._ready = False
        self._kills = kernel_kills()
        self._closed = False
        self._rounds = threading.Lock()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._answers = Answers()
        # The parent-death signal follows the *thread* that forked: a thread that lasts must do it.
        self._process, self._connection = (
            _spawner(os.getpid()).submit(_spawn, spec, self.log_path, gpus).result()
        )
        self._finalizer = weakref.finalize(self, _kill, self._process)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def label(self) -> str:
        """What it is called where its stacks are written."""
        return f"engine process {self.pid}"

    @property
    def weight_version(self) -> int:
        """The version of the installed weights; 0 are those loaded from disk."""
        return self._version

    def wait(self) -> None:
        """Wait until the model is loaded; raises what loading it raised."""
        with self._sending:
            self._wait_ready()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `rollout.vllm_engine.VllmEngine.generate`."""
        return unpack_completions(self.generate_packed(pack_requests(requests), sampling))

    def generate_packed(self, requests: PackedRequests, sampling: Sampling) -> PackedCompletions:
        """`generate` as it crosses the pipe, for whoever hands it on."""
        with self._rounds:
            return self._call("generate", requests, sampling)

    def score(self, sequences: Sequence[list[int]], temperature: float = 1.0) -> list[list[float]]:
        """See `rollout.vllm_engine.VllmEngine.score`."""
        return self._exchange("score", list(sequences), temperature)

    def effective_sampling(self, sampling: Sampling) -> dict[str, Any]:
        """See `rollout.vllm_engine.VllmEngine.effective_sampling`."""
        return self._exchange("effective_sampling", sampling)

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Open the weight channel that `spec.transport` names."""
        self._exchange("init_transfer", info)

    def receive_weights(self, info: dict[str, Any], version: int) -> dict[str, Any]:
        """See `rollout.vllm_engine.VllmEngine.receive_weights`."""
        report = self._exchange("receive_weights", info, version)
        self._version = version
        return report

    def pause(self) -> None:
        """See `rollout.vllm_engine.VllmEngine.pause`; a round that is asked for meanwhile waits."""
        self._exchange("pause")

    def resume(self) -> None:
        """See `rollout.vllm_engine.VllmEngine.resume`."""
        self._exchange("resume")

    def sleep(self, level: int) -> None:
        """See `rollout.vllm_engine.VllmEngine.sleep`."""
        self._exchange("sleep", level)

    def memory(self) -> dict[str, float]:
        """Resident bytes of the child and bytes of its KV cache."""
        return self._exchange("memory")

    def stacks(self) -> str:
        """Where every Python thread of the child is, also while a call hangs; empty when it cannot say."""
        if not self._ready or self._closed or self._process.poll() is not None:
            return ""
        before = self.log_path.stat().st_size
        self._process.send_signal(STACKS_SIGNAL)
        limit = time.monotonic() + STACKS_SECONDS
        while self.log_path.stat().st_size == before and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.05)  # the rest of the same dump
        with self.log_path.open("rb") as log:
            log.seek(before)
            return log.read().decode(errors="replace")

    def close(self) -> None:
        """End the child: gently when it is idle, by SIGKILL when it does not answer. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._rounds.acquire(timeout=CLOSE_SECONDS):
            if self._lock.acquire(timeout=CLOSE_SECONDS):
                self._end()
                self._lock.release()
            self._rounds.release()
        self._finalizer()
        self._connection.close()
        if self._temporary:
            self.log_path.unlink(missing_ok=True)

    def _end(self) -> None:
        """Ask an idle child to end, and wait for it; what goes wrong leaves it to be killed."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self._ready and self._process.poll() is None:
                self._connection.send((next(self._numbers), "close", ()))
                self._process.wait(CLOSE_SECONDS)

    def _exchange(self, name: str, *arguments: Any) -> Any:
        """A call other than for a round, which it may fall into."""
        with self._lock:
            return self._call(name, *arguments)

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._closed:
            raise EngineError("The engine is closed.")
        doing = DOING.get(name, f"answering {name}")
        with self._sending:
            self._wait_ready()
            number = next(self._numbers)
            self._answers.expect(number)
            try:
                self._connection.send((number, name, arguments))
            except OSError:
                raise self._died(doing, "before") from None
        return self._receive(number, doing)

    def _wait_ready(self) -> None:
        if not self._ready:
            self._receive(READY, LOADING)
            self._ready = True

    def _receive(self, number: int, doing: str) -> Any:
        try:
            succeeded, value = self._answers.take(number, self._connection)
        except (EOFError, OSError):
            raise self._died(doing) from None
        if succeeded:
            return value
        error, lines = value
        if type(error) in (str, RuntimeError):
            said = error if isinstance(error, str) else described(error)
            error = EngineError(f"the engine failed while {doing}: {said}.")
        if isinstance(error, EngineError):
            self._temporary = False  # the sentence names the log
            raise type(error)(f"{str(error).rstrip('.')} (its log is {self.log_path}).")
        error.add_note(f"In the engine's process {self.pid}:\n{lines}")
        raise error

    def _died(self, doing: str, when: str = "while") -> EngineDied:
        self._temporary = False  # the sentence names the log
        try:
            status = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._finalizer()
            status = self._process.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        why = sender(self._kills, kernel_kills()) if status == -signal.SIGKILL else ""
        return EngineDied(
            f"the engine's process {self.pid} ended {how} {when} {doing}{why} (its log is {self.log_path})."
        )


class Answers:
    """What comes out of the pipe, for whichever thread waits for it: one of them reads for all."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reading = False
        self._arrived: dict[int, tuple[bool, Any]] = {}
        self._awaited: set[int] = set()

    def expect(self, number: int) -> None:
        """Keep the answer to call `number`, also when it comes before `take`: call this before sending."""
        with self._changed:
            self._awaited.add(number)

    def take(self, number: int, connection: Connection) -> tuple[bool, Any]:
        """The answer to call `number`; those to calls that an interrupt gave up are passed over.

        Raises EOFError or OSError when the other end is gone.
        """
        with self._changed:
            self._awaited.add(number)
            try:
                while number not in self._arrived:
                    if self._reading:
                        self._changed.wait()
                    else:
                        self._read(connection)
                return self._arrived.pop(number)
            finally:
                self._awaited.remove(number)

    def _read(self, connection: Connection) -> None:
        """Receive one answer, without the lock meanwhile, and wake all who wait."""
        self._reading = True
        self._changed.release()
        try:
            answered, succeeded, value = connection.recv()
        finally:
            self._changed.acquire()
            self._reading = False
            self._changed.notify_all()
        if answered in self._awaited:
            self._arrived[answered] = (succeeded, value)


def sender(kills_before: int | None, kills_now: int | None) -> str:
    """Who sent a SIGKILL, as far as the kernel's count of processes killed for want of memory tells.

    Before and now; None where it does not count.
    """
    if kills_before is None or kills_now is None:
        return ", sent by somebody or, for want of memory, by the kernel"
    if kills_now == kills_before:
        return ", which the kernel did not send for want of memory"
    return (
        ", most likely sent by the kernel for want of memory: lower rollout.kv_cache_gib, "
        "rollout.max_num_seqs or learner.token_budget"
    )


def kernel_kills() -> int | None:
    """Processes that this machine's kernel has killed for want of memory since it started; None when it does
    not count them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


@functools.cache
def _spawner(pid: int) -> ThreadPoolExecutor:
    """One thread for the life of process `pid` that starts every child of it."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"engine-spawner-{pid}")


def _spawn(
    spec: EngineSpec, log_path: Path, gpus: Sequence[int]
) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with ours, theirs, log_path.open("ab") as log:
        process = subprocess.Popen(
            # -P: a module of the working directory must not shadow an installed one.
            [sys.executable, "-P", "-m", "rollout.engine_server", str(theirs.fileno()), str(os.getpid())],
            env=_environment(spec, gpus),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        connection = Connection(ours.detach())
    with contextlib.suppress(OSError):  # it has died already, which waiting for it will say
        connection.send(spec)
    return process, connection


def _environment(spec: EngineSpec, gpus: Sequence[int] = ()) -> dict[str, str]:
    """The child's variables: ours without torchrun's, with threads, libraries and GPUs of its own."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    root = str(Path(rollout.__file__).parents[1])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH", "")]))
    variables = ALLOCATOR | IDLE_THREADS | variables
    variables["OMP_NUM_THREADS"] = str(thread_count(spec.threads))
    libraries = preload_libraries() if spec.preload else []
    if libraries:
        variables["LD_PRELOAD"] = ":".join([*libraries, *filter(None, [variables.get("LD_PRELOAD")])])
    if gpus:
        variables[VISIBLE_GPUS] = gpu_names(gpus)
    return variables


def preload_libraries() -> tuple[str, ...]:
    """tcmalloc and Intel's OpenMP, as vLLM advises on a CPU: those that can be had here now. Linux only."""
    if sys.platform != "linux":
        return ()
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    return tuple(filter(None, [tcmalloc, str(openmp) if openmp.exists() and _room_for_openmp() else None]))


def _room_for_openmp(folder: Path = SHARED_MEMORY) -> bool:
    """Whether Intel's OpenMP can register in `folder`: it writes a page there, and a full one kills it
    (SIGBUS). Where it may not write at all it registers elsewhere."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        if full:
            logger.warning("%s is full: engines start without Intel's OpenMP, which is faster.", folder)
        return not full
    return True


def _temporary_log() -> str:
    descriptor, path = tempfile.mkstemp(prefix="whetstone-engine-", suffix=".log")
    os.close(descriptor)
    return path


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    remove_openmp_file(process.pid)
