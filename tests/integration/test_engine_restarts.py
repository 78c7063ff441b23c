"""Engines killed in every phase of a run with `rollout.restarts`: what comes out is the undisturbed run."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.tracking.jsonl import read
from rollout import recorder
from rollout.child_engine import ChildEngine
from tests.integration.test_resumed_runs import RUN, outcome

CHILD = [*RUN, "rollout.process=child"]


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


def kill_when(monkeypatch: pytest.MonkeyPatch, due: Callable[[ChildEngine, str], bool], late: bool) -> None:
    """SIGKILL an engine's process at calls that are `due`, before they are sent or (`late`) after."""
    method = "_receive" if late else "_call"
    original = getattr(ChildEngine, method)

    def killing(self: ChildEngine, *arguments: Any) -> Any:
        if due(self, self._doing if late else arguments[0]):
            os.kill(self.pid, signal.SIGKILL)
        return original(self, *arguments)

    monkeypatch.setattr(ChildEngine, method, killing)


def test_killed_in_every_phase(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While loading, generating, scoring the probe, installing, opening the channel and idle: once each."""
    moments = {
        ("loading its model", 0), ("opening the weight channel", 0), ("scoring", 1), ("generating", 2),
        ("installing weights", 3), ("generating", 5),
    }  # fmt: skip
    idle = {("receive_weights", 5)}

    def now(left: set[tuple[str, int]]) -> Callable[[ChildEngine, str], bool]:
        def due(engine: ChildEngine, doing: str) -> bool:
            moment = (doing, engine.weight_version)
            if moment not in left:
                return False
            left.remove(moment)
            return True

        return due

    kill_when(monkeypatch, now(moments), late=True)
    kill_when(monkeypatch, now(idle), late=False)
    folder = tmp_path / "run"
    assert main([*CHILD, "rollout.restarts=7", f"run.dir={folder}"]) == 0
    assert (moments, idle) == (set(), set())
    counts = restarts(folder)
    assert counts[-1] == 7
    assert counts == sorted(counts)
    ids = [
        (group.id, made.sample_index)
        for step in recorder.steps(folder / "rollouts")
        for group in recorder.read(folder / "rollouts", step)
        for made in group.trajectories
        if group.verdict == "kept"
    ]
    assert len(ids) == len(set(ids)) == 6 * 4 * 8
    assert without_restarts(outcome(folder)) == undisturbed


def test_beyond_the_limit_the_run_stops_with_the_last_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_when(monkeypatch, lambda engine, doing: doing == "generating", late=True)
    folder = tmp_path / "run"
    assert main([*CHILD, "rollout.restarts=1", "evaluation.every=0", f"run.dir={folder}"]) == 1
    said = capsys.readouterr().err
    assert said.count("An engine is started again: ") == 1
    assert re.search(
        r"An engine is started again: the engine's process \d+ ended by SIGKILL while generating, .* Further "
        r"restarts are counted in rollout/engine_restarts, at most rollout\.restarts=1\.",
        said,
    )
    assert re.fullmatch(
        r"rlhf: the run stopped in step 1: the engine's process \d+ ended by SIGKILL while generating, which "
        r"the kernel did not send for want of memory \(its log is .*/logs/engine-0\.log\)\. Then the same .*",
        said.splitlines()[-1],
    )
