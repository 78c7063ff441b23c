"""Runs that signals end and `resume=auto` goes on with: equal to the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf import metrics as naming
from rlhf import state_file
from rlhf.checkpoint import STATE, Checkpoints
from rlhf.tracking.jsonl import read
from rollout import recorder

STEPS = 6
RUN = [
    "train", "dapo/tiny", f"loop.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=9",
    "evaluation.every=2", "algorithm.dynamic_sampling.oversample=2",
    "algorithm.dynamic_sampling.surplus=carry", "learner.schedule.name=linear",
    "tracking.completions_every=1",
]  # fmt: skip
"""Carries groups over and changes the learning rate, so that these must be resumed too."""


GRADED_APART = [
    "reward.parts.style.kind=format",
    "reward.parts.style.args.pattern='.+'",
    "reward.accuracy_from=exact",
]
"""A part that is graded in processes of its own."""


def start(
    folder: Path, *overrides: str, program: Sequence[str] = ("-m", "rlhf.cli")
) -> subprocess.Popen[str]:
    """A run in a session of its own. `program`: what Python is given before `rlhf`'s own arguments."""
    return subprocess.Popen(
        [sys.executable, *program, *RUN, f"run.dir={folder}", *overrides],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for the end; returns what was said on standard error."""
    said = process.communicate(timeout=240)[1]
    assert process.returncode == status, said
    return said


def wait_for(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Until `step` is logged, or the run has ended."""
    path = folder / "metrics.jsonl"
    limit = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < limit:
        if path.exists() and any(row["step"] >= step for row in read(path)):
            return
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the whole process group of the run, no matter what it is doing."""
    os.killpg(process.pid, signal.SIGKILL)
    finish(process, -signal.SIGKILL)


def shared_memory() -> set[str]:
    """Names in `/dev/shm`."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def left_behind(before: set[str], pids: Iterable[int]) -> list[str]:
    """What is new in `/dev/shm`, but what other processes than `pids` registered their OpenMP under."""
    ours = "|".join(map(str, pids))
    foreign = re.compile(rf"__KMP_REGISTERED_LIB_(?!({ours})_)")
    return [name for name in shared_memory() - before if not foreign.match(name)]


def steady(row: dict[str, float]) -> dict[str, float]:
    """A row of metrics without what depends on the clock or the machine."""
    found = {}
    for name, value in row.items():
        metric = naming.lookup(name)
        if metric and metric.unit != "seconds" and metric.section not in ("memory", "throughput"):
            found[name] = value
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """All that two equal runs have in common."""
    state = state_file.read(Checkpoints(folder).path(STEPS) / STATE)
    state["counters"]["last_metrics"] = steady(state["counters"]["last_metrics"])
    del state["elapsed"], state["randomness"]
    rollouts = folder / "rollouts"
    return {
        "metrics": [{"step": row["step"], **steady(row)} for row in read(folder / "metrics.jsonl")],
        "weights": _bytes(state["learner"].pop("weights")),
        "optimizer": _bytes(state["learner"].pop("optimizer")),
        "state": state,
        "rollouts": [recorder.read(rollouts, step) for step in recorder.steps(rollouts)],
        "completions": (folder / "completions.jsonl").read_text(),
        "evaluations": {p.name: p.read_text() for p in sorted((folder / "evaluations").glob("*.jsonl"))},
        "model": (Checkpoints(folder).path(STEPS) / "model.safetensors").read_bytes(),
    }


def _bytes(value: Any) -> Any:
    """Nested containers with each tensor as its bytes, which `==` compares to the last bit."""
    if isinstance(value, dict):
        return {key: _bytes(item) for key, item in value.items()}
    return value.numpy().tobytes() if hasattr(value, "numpy") else value


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Part by part, so that a failure names the part."""
    for ours, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert ours == theirs
    assert [part for part in one if one[part] != other[part]] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run gives that nothing ended."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(folder))
    return outcome(folder)


def test_a_killed_run_equals_the_uninterrupted_one(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    moment = random.Random(3)
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(process, folder, moment.randint(3, 5))
    time.sleep(moment.uniform(0, 0.3))
    kill(process)
    said = finish(start(folder, "resume=auto"))
    assert "goes on after step" in said
    assert_equal(outcome(folder), uninterrupted)


def test_ended_by_sigterm_and_resumed(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    said = finish(process, 143).strip().splitlines()[-1]
    ended = int(read(folder / "metrics.jsonl")[-1]["step"])
    assert said == (
        f"rlhf: interrupted after step {ended} of {STEPS}: the same command with run.dir={folder} "
        f"resume=auto goes on after step {ended}."
    )
    assert Checkpoints(folder).steps()[-1] == ended < STEPS
    assert (folder / "report.md").is_file()
    assert f"goes on after step {ended}" in finish(start(folder, "resume=auto"))
    assert Checkpoints(folder).steps()[-1] == STEPS
    assert_equal(outcome(folder), uninterrupted)


OFFLOADING = """
import sys
from rlhf.cli import main
from trainer.memory.offload import StateOffload
inner, moved = StateOffload.offload, []
def offload(self, tensors):
    inner(self, tensors)
    moved.append(self.bytes_away)
StateOffload.offload = offload
status = main(sys.argv[1:])
print("rounds", len(moved), "bytes", min(moved), file=sys.stderr)
sys.exit(status)
"""
"""A run that says at its end how often its learner's state was put away, and the least of it."""


def test_a_run_whose_learner_rests_on_disk_is_the_same(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    where = ["learner.memory.offload_state=disk", f"learner.memory.folder={tmp_path}"]
    said = finish(start(folder, *where, program=("-c", OFFLOADING)))
    rounds, least = map(int, re.findall(r"^rounds (\d+) bytes (\d+)$", said, re.M)[0])
    assert rounds >= STEPS + STEPS // 2 + 1  # every step generates, every second one and the start evaluate
    assert (
        least == 460_800 - 5 * 64 * 4
    )  # before the first update: all weights but the norms', too small to move
    assert_equal(outcome(folder), uninterrupted)


def test_another_seed_is_another_run(uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(start(folder, "run.seed=1"))
    other = outcome(folder)
    for part in ("metrics", "weights", "optimizer", "rollouts", "model"):
        assert other[part] != uninterrupted[part], part
    with pytest.raises(AssertionError):
        assert_equal(other, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_three_times(seed: int, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    """Also before the first checkpoint, while loading, and while a checkpoint is written."""
    moment = random.Random(seed)
    folder = tmp_path / "run"
    for first, last in ((0, 2), (2, 4), (4, 5)):
        process = start(folder, "resume=auto")
        wait_for(process, folder, moment.randint(first, last))
        time.sleep(moment.uniform(0, 0.3))
        kill(process)
    finish(start(folder, "resume=auto"))
    assert_equal(outcome(folder), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.lora.rank=4", "learner.optimizer.name=schedulefree"],
        ["rollout.process=child", "rollout.dtype=bfloat16", "learner.dtype=bfloat16"],
        ["learner.optimizer.name=muon", "algorithm.kl.coefficient=0.1", "checkpoint.save_best=true",
         "evaluation.split=validation", "data.validation=4"],
    ],
    ids=["lora", "bfloat16", "best"],
)  # fmt: skip
def test_other_learners_and_engines(overrides: list[str], tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finish(start(whole, *overrides))
    process = start(folder, *overrides)
    wait_for(process, folder, 3)
    kill(process)
    finish(start(folder, *overrides, "resume=auto"))
    assert_equal(outcome(folder), outcome(whole))
    assert Checkpoints(folder).steps() == Checkpoints(whole).steps()


HELD = """
import os, sys, time
from pathlib import Path
from rlhf import checkpoint
from rlhf.cli import main
from rollout.weights.shm import ShmSender

moment, step, *arguments = sys.argv[1:]
owner, name = {"publish": (ShmSender, "install"), "checkpoint": (checkpoint, "_seal")}[moment]
going_on = getattr(owner, name)

def held(*given):
    if Path("run/metrics.jsonl").read_text().count("\\n") == int(step):
        Path("held").touch()
        time.sleep(600)
    return going_on(*given)

setattr(owner, name, held)
sys.exit(main(arguments))
"""
"""A run that stands still at a moment: in the publish of a step, when its weights lie in the segment and no
engine has them, or in a checkpoint's writing, when its files are there and not yet sealed."""

ALONE = ["rollout.process=child", *GRADED_APART, "loop.steps=4", "evaluation.every=0", "resume=auto"]


def kill_while_held(folder: Path, moment: str, rows: int) -> list[int]:
    """Start a run, wait until it stands in `moment` with `rows` rows logged, and kill it; its processes."""
    process = start(folder, *ALONE, program=["-c", HELD, moment, str(rows)])
    limit = time.monotonic() + 200
    while not (folder.parent / "held").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    commands = [" ".join(child.cmdline()) for child in family]
    assert any("rollout.engine_server" in command for command in commands)
    assert len(family) > 1, "graders too"
    kill(process)
    (folder.parent / "held").unlink()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    return [process.pid, *(child.pid for child in family)]


def test_killed_in_a_publish_and_in_a_checkpoint(tmp_path: Path) -> None:
    before = shared_memory()
    folder = tmp_path / "run"
    pids = kill_while_held(folder, "publish", rows=3)  # steps 0 to 2: step 3 has learned and is not logged
    assert Checkpoints(folder).steps() == [2]
    assert list(folder.glob(".weights-*")) == []
    pids += kill_while_held(folder, "checkpoint", rows=5)
    assert left_behind(before, pids) == []
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [".step-4.partial", "step-2"]
    assert len(list((folder / "checkpoints/.step-4.partial").iterdir())) > 3
    said = finish(start(folder, *ALONE))
    assert f"{folder} goes on after step 2." in said
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-2", "step-4"]
    assert [Checkpoints(folder).problem(step) for step in (2, 4)] == ["", ""]
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
