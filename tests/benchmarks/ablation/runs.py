"""Starts the runs of the ablation, some side by side, and turns each finished one into its result."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rlhf.config import Config
from tests.benchmarks.ablation.arms import BY_NAME, Arm, fingerprint, relevant, resolve
from tests.benchmarks.ablation.results import summarize

_PR_SET_PDEATHSIG = 1
_TAIL = 15
"""Lines of a failed run's output that are shown."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run that is to be made."""

    arm: Arm
    seed: int
    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        """Resolved and checked."""
        return resolve(self.recipe, self.arm, self.seed, self.overrides)

    @property
    def dapo(self) -> Config:
        """The full recipe, which arms are compared with."""
        return resolve(self.recipe, BY_NAME["dapo"], self.seed, self.overrides)

    def folder(self, out: Path) -> Path:
        """One for every configuration: an unfinished run of another one is not gone on with."""
        return out / f"{self.arm.name}-seed{self.seed}-{fingerprint(relevant(self.config))}"

    def command(self, out: Path) -> list[str]:
        """`rlhf train`, which goes on where a stopped run of this folder left off."""
        settings = [*self.overrides, *self.arm.overrides, f"run.seed={self.seed}"]
        place = [f"run.dir={self.folder(out)}", "resume=auto"]
        return [sys.executable, "-m", "rlhf.cli", "train", self.recipe, *settings, *place]


@dataclass(slots=True)
class _Started:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path


def run_all(
    jobs: Sequence[Job], out: Path, results: Path, *, side_by_side: int = 1, minutes: float | None = None
) -> int:
    """Make the runs in order, `side_by_side` at once with an equal share of the cores each; returns how many
    failed. None is started after `minutes`. A signal ends the runs in good order and raises `SystemExit`."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    waiting, running, failed = list(jobs), list[_Started](), 0
    with _ending_in_order(running):
        while running or (waiting and time.monotonic() < deadline):
            while waiting and len(running) < side_by_side and time.monotonic() < deadline:
                running.append(_start(waiting.pop(0), out, side_by_side))
            for started in [s for s in running if s.process.poll() is not None]:
                running.remove(started)
                failed += not _finish(started, out, results)
            time.sleep(0.2)
    if waiting:
        print(f"{len(waiting)} runs were not started: the limit of {minutes:g} minutes is reached.")
    return failed


def _start(job: Job, out: Path, side_by_side: int) -> _Started:
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    threads = max(1, cores // side_by_side)
    log = job.folder(out).with_suffix(".log")
    print(f"{job.arm.name} seed {job.seed}: started with {threads} thread(s), output in {log}", flush=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            job.command(out),
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    return _Started(job, process, log)


def _end_with_parent() -> None:
    """In the child: SIGTERM when this program dies in whatever way, so that no run goes on alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _finish(started: _Started, out: Path, results: Path) -> bool:
    """Write the result of a run that ended; False, with the end of its output, when it failed."""
    job, name = started.job, f"{started.job.arm.name} seed {started.job.seed}"
    if started.process.returncode != 0:
        tail = started.log.read_text(errors="replace").splitlines()[-_TAIL:]
        print(f"{name}: FAILED with status {started.process.returncode}\n  " + "\n  ".join(tail), flush=True)
        return False
    folder = job.folder(out)
    result = summarize(
        folder, job.config, arm=job.arm.name, recipe=job.recipe, dapo=job.dapo, commit=_commit()
    )
    if result.tokens[-1] < result.budget:
        print(f"{name}: FAILED, it ended after {result.tokens[-1]} of {result.budget} tokens", flush=True)
        return False
    result.write(results)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 1.6 GB that nothing needs any more
    accuracy = result.accuracy_at(result.budget)
    print(f"{name}: {accuracy:.1%} at {result.budget} tokens, {result.minutes:.1f} minutes", flush=True)
    return True


def _commit() -> str:
    """Of the working tree that this program lies in; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


@contextmanager
def _ending_in_order(running: list[_Started]) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM end the runs that are `running` and then this program."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException:
        print(
            "Ending: each run finishes its step and saves; the same command goes on from there.", flush=True
        )
        for started in running:
            started.process.terminate()
        for started in running:
            started.process.wait()
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
