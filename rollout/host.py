"""`EngineHost`: where engines are started, and started again. `LocalHost` is this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rollout.child_engine import ChildEngine
from rollout.config import EngineProcess
from rollout.engine import Engine
from rollout.engine_spec import EngineSpec
from rollout.vllm_engine import VllmEngine

LOOPBACK = "127.0.0.1"


class StartingEngine(Engine, Protocol):
    """An engine that may still be loading its model."""

    def wait(self) -> None:
        """Wait until the model is loaded; raises what loading it raised."""
        ...


class EngineHost(Protocol):
    """Where engines run. Implementations: `LocalHost`, `rollout.ray_host.RayHost`."""

    @property
    def one_machine(self) -> bool:
        """Whether every engine can open this process's memory, as the `shm` transport needs."""
        ...

    @property
    def address(self) -> str:
        """The address at which engines reach this process."""
        ...

    def start(self, index: int, spec: EngineSpec) -> StartingEngine:
        """Begin to start engine `index`, counted from 0; returns at once.

        May be called again for an engine that is gone and closed.
        """
        ...

    def close(self) -> None:
        """Give back what was taken for engines, which are closed by now; safe to call twice."""
        ...


class LocalHost:
    """This machine: engines in child processes, or one in this process."""

    one_machine = True
    address = LOOPBACK

    def __init__(
        self, process: EngineProcess = EngineProcess.child, gpus: Sequence[Sequence[int]] = ()
    ) -> None:
        """`gpus`: one list of numbers an engine; nothing given, all that this process sees."""
        self._process = process
        self._gpus = gpus

    def start(self, index: int, spec: EngineSpec) -> StartingEngine:
        """A child that loads its model, or an engine in this process that has loaded it."""
        if self._process is EngineProcess.inprocess:
            return VllmEngine(spec)
        return ChildEngine(spec, self._gpus[index] if self._gpus else ())

    def close(self) -> None:
        """Nothing was taken."""
