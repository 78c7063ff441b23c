"""Engines killed in every phase of a run with `rollout.restarts`: what comes out is the undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.cli import main
from rlhf.tracking.jsonl import read
from rollout import recorder
from rollout.child_engine import ChildEngine
from tests.integration.test_resumed_runs import RUN, outcome

CHILD = [*RUN, "rollout.process=child"]

UNEVALUATED = ["evaluation.at_start=false", "evaluation.every=0", "evaluation.at_end=false"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes out of a run whose engine lives."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main([*CHILD, f"run.dir={folder}"]) == 0
    return outcome(folder)


def restarts(folder: Path) -> list[float]:
    """`rollout/engine_restarts` after each step."""
    return [row["rollout/engine_restarts"] for row in read(folder / "metrics.jsonl")]


def without_restarts(found: dict[str, Any]) -> dict[str, Any]:
    """An outcome without what says that engines were started again."""
    name = "rollout/engine_restarts"
    for row in [*found["metrics"], found["state"]["counters"]["last_metrics"]]:
        row.pop(name, None)
    return found


class Killer:
    """SIGKILLs an engine's process once at each of its moments: `(when, call, version in force)`.

    `when` is `before` the call is sent or `during` it; the call `load` is the loading of the model.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *moments: tuple[str, str, int]) -> None:
        self.left = list(moments)
        self._current = threading.local()
        call, send, wait = ChildEngine._call, Connection.send, ChildEngine._wait_ready

        def killing_call(engine: ChildEngine, name: str, *arguments: Any) -> Any:
            self._current.engine = engine
            self.strike(engine, "before", name)
            return call(engine, name, *arguments)

        def killing_send(connection: Connection, message: Any) -> None:
            send(connection, message)
            if isinstance(message, tuple) and message[1] != "close":
                self.strike(self._current.engine, "during", message[1])

        def killing_wait(engine: ChildEngine) -> None:
            if not engine._ready:
                self.strike(engine, "during", "load")
            wait(engine)

        monkeypatch.setattr(ChildEngine, "_call", killing_call)
        monkeypatch.setattr(Connection, "send", killing_send)
        monkeypatch.setattr(ChildEngine, "_wait_ready", killing_wait)

    def strike(self, engine: Any, when: str, name: str) -> None:
        """Kill, if this is one of the moments left."""
        moment = (when, name, engine.weight_version)
        if moment in self.left:
            self.left.remove(moment)
            self.kill(engine)

    def kill(self, engine: Any) -> None:
        """The process of the engine."""
        os.kill(engine.pid, signal.SIGKILL)


def kept_ids(folder: Path) -> list[tuple[str, int]]:
    """Group and sample of every response that was learned from."""
    return [
        (group.id, made.sample_index)
        for step in recorder.steps(folder / "rollouts")
        for group in recorder.read(folder / "rollouts", step)
        for made in group.trajectories
        if group.verdict == "kept"
    ]


def test_killed_in_every_phase(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 0 is loaded, 1 proves the channel, and so step 1 generates under 1."""
    killer = Killer(
        monkeypatch,
        ("during", "load", 0),
        ("during", "init_transfer", 0),
        ("during", "score", 1),
        ("during", "generate", 2),
        ("before", "generate", 3),
        ("during", "receive_weights", 3),
        ("before", "receive_weights", 5),  # it died while the learner learned
    )
    folder = tmp_path / "run"
    assert main([*CHILD, "rollout.restarts=7", f"run.dir={folder}"]) == 0
    assert killer.left == []
    counts = restarts(folder)
    assert counts == sorted(counts)
    assert counts[-1] == 7
    ids = kept_ids(folder)
    assert len(ids) == len(set(ids)) == 6 * 4 * 8
    assert without_restarts(outcome(folder)) == undisturbed


def test_on_ray_a_killed_engine_and_a_killed_actor(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run on Ray is the local one, bit for bit, with an engine and an actor killed on the way."""
    pytest.importorskip("ray")
    from rollout.ray_engine import RayEngine

    moments = [("generating", 2, "engine"), ("installing weights", 3, "actor"), ("generating", 4, "actor")]
    result = RayEngine._result

    def killing_result(engine: RayEngine, answer: Any, doing: str) -> Any:
        for moment in [one for one in moments if one[:2] == (doing, engine.weight_version)]:
            moments.remove(moment)
            process = psutil.Process(engine._pid)
            (process if moment[2] == "engine" else process.parent() or process).kill()
        return result(engine, answer, doing)

    monkeypatch.setattr(RayEngine, "_result", killing_result)
    folder = tmp_path / "run"
    options = ["rollout.pool=ray", "rollout.ray.wait_s=300", "rollout.threads=1", "rollout.restarts=3"]
    assert main([*CHILD, *options, f"run.dir={folder}"]) == 0
    assert moments == []
    assert restarts(folder)[-1] == 3
    assert without_restarts(outcome(folder)) == undisturbed


def test_beyond_the_limit_the_run_stops_with_the_last_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    Killer(monkeypatch, *[("during", "generate", 1)] * 9)
    folder = tmp_path / "run"
    assert main([*CHILD, "rollout.restarts=1", *UNEVALUATED, f"run.dir={folder}"]) == 1
    (said,) = [line for line in caplog.messages if line.startswith("An engine is started again: ")]
    assert re.fullmatch(
        r"An engine is started again: the engine's process \d+ ended by SIGKILL while generating, .* Further "
        r"restarts are counted in rollout/engine_restarts, at most rollout\.restarts=1\.",
        said,
    )
    assert re.fullmatch(
        r"rlhf: the run stopped in step 1: the engine's process \d+ ended by SIGKILL while generating, which "
        r"the kernel did not send for want of memory \(its log is .*/logs/engine-0\.log\)\. Then the same .*",
        capsys.readouterr().err.splitlines()[-1],
    )
