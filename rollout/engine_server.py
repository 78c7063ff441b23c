"""The process behind `rollout.child_engine.ChildEngine`: one `VllmEngine` that answers calls from a pipe.

`python -m rollout.engine_server FD PARENT`: `FD` is the child's end of a socket pair, `PARENT` the process
that started it. Messages are pickled by `multiprocessing.Connection`; both ends are this program.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rollout.engine import Sampling
from rollout.engine_spec import EngineSpec
from rollout.parent import end_with_parent
from rollout.vllm_engine import VllmEngine
from rollout.wire import PackedCompletions, PackedRequests, pack_completions, unpack_requests
from trainer.errors import described

CALLS = frozenset(
    (
        "generate",
        "score",
        "init_transfer",
        "receive_weights",
        "memory",
        "effective_sampling",
        "weight_version",
        "pause",
        "resume",
        "sleep",
        "close",
    )
)
"""What the parent may call; `weight_version` is a property."""

Call = tuple[int, str, tuple[Any, ...]]
"""Number, name and arguments of a call."""

SHARED_MEMORY = Path("/dev/shm")

READY = 0
"""Number of the message that says that the engine is loaded; calls count from 1."""


STACKS_SIGNAL = signal.SIGUSR1
"""Makes the process write where its Python threads are to its log, whatever it is doing."""


def forget_openmp_file() -> None:
    """Start Intel's OpenMP, where it is preloaded, and remove the file in `/dev/shm` that it makes.

    It serves nothing but to find a second copy of that library in the process, and would outlive a kill.
    """
    with contextlib.suppress(AttributeError):  # another OpenMP, or none
        ctypes.CDLL(None).omp_get_max_threads()
    remove_openmp_file(os.getpid())


def remove_openmp_file(pid: int) -> None:
    """Remove what Intel's OpenMP of process `pid` left in `/dev/shm`."""
    for file in SHARED_MEMORY.glob(f"__KMP_REGISTERED_LIB_{pid}_*"):
        file.unlink(missing_ok=True)


def serve(connection: Connection) -> None:
    """Build the engine that the first message describes, then answer calls until the end."""
    spec: EngineSpec = connection.recv()
    gc.disable()  # importing and loading make a million objects that stay: scanning them again is waste
    try:
        engine = VllmEngine(spec)
    except Exception as error:
        connection.send((READY, False, portable(error)))
        return
    gc.enable()
    connection.send((READY, True, None))
    with contextlib.suppress(EOFError):
        Calls(connection, engine).run()


class Calls:
    """Answers calls in the order in which they come, with one exception.

    `pause`, and what follows it up to `resume`, is answered between two steps of a round in progress; in a
    pause a round or an end waits for `resume`.
    """

    def __init__(self, connection: Connection, engine: VllmEngine) -> None:
        self._connection = connection
        self._engine = Served(engine)
        self._later: deque[Call] = deque()
        engine.between_steps = self._in_a_round

    def run(self) -> None:
        """Answer until `close`. Raises EOFError at the pipe's end."""
        while True:
            call = self._later.popleft() if self._later else self._connection.recv()
            self._answer(call)
            if call[1] == "close":
                return

    def _in_a_round(self) -> None:
        while self._connection.poll():
            call = self._connection.recv()
            if call[1] == "pause":
                self._answer(call)
            else:
                self._later.append(call)

    def _answer(self, call: Call) -> None:
        number, name, arguments = call
        self._connection.send((number, *answer(self._engine, name, arguments)))
        if name == "pause":
            self._until_resumed()

    def _until_resumed(self) -> None:
        name = ""
        while name != "resume":
            call = self._connection.recv()
            name = call[1]
            if name in ("generate", "close"):
                self._later.append(call)
            else:
                self._answer(call)


class Served:
    """A `VllmEngine` as calls reach it through the pipe: rounds come and go as arrays."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine

    def generate(self, requests: PackedRequests, sampling: Sampling) -> PackedCompletions:
        """See `VllmEngine.generate`."""
        return pack_completions(self._engine.generate(unpack_requests(requests), sampling))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def answer(engine: Served, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Call one method; `(True, result)` or `(False, (exception, its traceback))`."""
    try:
        if name not in CALLS:
            raise ValueError(f"The engine has no call '{name}'.")
        target = getattr(engine, name)
        return True, target(*arguments) if callable(target) else target
    except Exception as error:
        return False, portable(error)


def portable(error: Exception) -> tuple[Exception | str, str]:
    """The exception itself when the parent can rebuild it (a builtin or one of `rollout`), else its text."""
    lines = traceback.format_exc()
    print(lines, file=sys.stderr, flush=True)  # into the log, which the sentence names
    if type(error).__module__.split(".")[0] in ("builtins", "rollout"):
        try:
            pickle.loads(pickle.dumps(error))
            return error, lines
        except Exception:  # a constructor that does not take what pickle hands it
            pass
    return described(error), lines


def main() -> None:
    """Entry point."""
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL)
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent)
    forget_openmp_file()
    os.set_inheritable(descriptor, False)
    serve(Connection(descriptor))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # tearing the interpreter down takes seconds and releases nothing that the system does not


if __name__ == "__main__":
    main()
