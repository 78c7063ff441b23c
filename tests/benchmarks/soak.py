"""A run of 1500 steps whose processes are killed at random, and what is left of it; table: `docs/faults.md`.

`python -m tests.benchmarks.soak` trains a tiny model on two ranks, and SIGKILLs engines, learner ranks,
graders, the driver (rank 0) and torchrun itself, at random moments. Their mean distance is twice the time
that the job takes from the death of a rank to its next step, which is measured first. Three things start
again what was killed: the run its engines and graders, torchrun the ranks, and a supervisor (this program)
torchrun, each time with the same command. Prints a table, and ends with status 1 when a step or a sample
is not accounted for (`tests.benchmarks.accounts`) or something outlives the run.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rlhf.tracking import jsonl
from tests.benchmarks import accounts
from tests.benchmarks.measuring import markdown

KINDS = ("engine", "learner rank", "grader", "driver", "torchrun")
"""What is killed. The driver is rank 0; a learner rank is any other."""

MARK = "WHETSTONE_SOAK"
"""Variable by which every process of a run is known, whoever started it."""

SHARED_MEMORY = Path("/dev/shm")

TRAIN = [
    "-m", "rlhf.cli", "train", "dapo/tiny", "resume=auto", "rollout.process=child", "rollout.restarts=100000",
    "reward.parts.style.kind=format", "reward.parts.style.args.pattern='.+'", "reward.accuracy_from=exact",
    "reward.workers=2", "algorithm.dynamic_sampling.oversample=2",
    "algorithm.dynamic_sampling.surplus=carry", "evaluation.every=0", "evaluation.at_start=false",
    "evaluation.at_end=false", "learner.optimizer.lr=1.0e-7",
]  # fmt: skip
"""Two parts of the reward, one of them graded in processes of its own; surplus groups are carried. So low a
rate leaves the model as it is: one that has learned to be always wrong has no group to be trained on."""

GONE_SECONDS = 60.0
"""How long ranks may outlive a killed torchrun: they finish their step and save."""


@dataclass(kw_only=True)
class Job:
    """A run under a supervisor: whatever ends it, it is started again."""

    folder: Path
    steps: int
    every: int
    """Steps between checkpoints."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    seen: set[int] = field(default_factory=set)
    """Every process id that the job ever had, as far as anybody looked."""

    def start(self) -> None:
        """Start torchrun; its output goes to `torchrun.log` beside the run's folder."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        settings = [f"run.dir={self.folder}", f"loop.steps={self.steps}", f"checkpoint.every={self.every}"]
        self.starts += 1
        with self.folder.with_name("torchrun.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*launcher, "--max-restarts", "100000", *TRAIN, *settings],
                env={**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def revive(self) -> bool:
        """Start torchrun again if it ended before its time. Returns whether the job is done."""
        assert self.process is not None
        status = self.process.poll()
        self.alive()
        if status is None:
            return False
        if status == 0:
            return True
        wait_until(lambda: not self.alive(), GONE_SECONDS)
        self.start()
        return False

    def alive(self) -> list[psutil.Process]:
        """Every process of the job, also one that its parent has left behind."""
        found = [process for process in psutil.process_iter() if _marked(process, self.mark)]
        self.seen |= {process.pid for process in found}
        return found

    def victims(self, kind: str) -> list[psutil.Process]:
        """Processes of a kind."""
        return [process for process in self.alive() if _kind(process) == kind]

    def step(self, since: float = 0.0) -> int:
        """The last step logged after a moment (Unix seconds); -1 when none was."""
        path = self.folder / jsonl.METRICS
        rows = jsonl.read(path) if path.exists() else []
        return int(rows[-1]["step"]) if rows and rows[-1]["timestamp"] > since else -1

    def end(self) -> None:
        """Kill what is left, when the benchmark itself is ended."""
        for process in self.alive():
            process.kill()


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _kind(process: psutil.Process) -> str:
    try:
        command, rank = " ".join(process.cmdline()), process.environ().get("RANK", "")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
    if "rollout.engine_server" in command:
        return "engine"
    if "rlhf.rewards.sandbox" in command:
        return "grader"
    if "torch.distributed.run" in command:
        return "torchrun"
    if "rlhf.cli" in command:
        return "driver" if rank == "0" else "learner rank"
    return ""


def wait_until(holds: object, seconds: float) -> bool:
    """Wait for a condition; whether it came true in time."""
    assert callable(holds)
    limit = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def left_in_shared_memory(before: set[str], pids: set[int]) -> list[str]:
    """What is new in `/dev/shm`, but what OpenMP of other processes than ours registered there."""
    ours = "|".join(map(str, pids))
    foreign = re.compile(rf"__KMP_REGISTERED_LIB_(?!({ours})_)")
    return sorted(name for name in shared_memory() - before if not foreign.match(name))


def shared_memory() -> set[str]:
    """Names in `/dev/shm`."""
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


# ---------------------------------------------------------------- the soak


@dataclass(kw_only=True)
class Outcome:
    """What a soak came to."""

    job: Job
    seconds: float
    restart_seconds: float
    """From the SIGKILL of a rank to the next step's row; 0 when it was not measured."""
    kills: Counter[str]
    orphans: list[str]
    shared: list[str]
    accounts: accounts.Accounts

    @property
    def problems(self) -> list[str]:
        """Sentences about what is not as it must be."""
        found = list(self.accounts.problems)
        if self.accounts.steps != self.job.steps:
            found.append(f"{self.accounts.steps} of {self.job.steps} steps were trained")
        if self.orphans:
            found.append(f"processes are left: {', '.join(self.orphans)}")
        if self.shared:
            found.append(f"shared memory is left: {', '.join(self.shared)}")
        return found

    def table(self) -> str:
        """All of it in Markdown."""
        found, samples = self.accounts, self.accounts.samples
        kills = ", ".join(f"{self.kills[kind]} {kind}" for kind in KINDS if self.kills[kind])
        rows = [
            ("steps trained", f"{found.steps} of {self.job.steps}"),
            ("kills", f"{self.kills.total()}: {kills}"),
            ("from a rank's death to the next step, s", f"{self.restart_seconds:.1f}"),
            ("starts of the run / of torchrun", f"{found.begins} / {self.job.starts}"),
            ("steps trained again", str(found.redone)),
            ("samples drawn", str(samples["drawn"])),
            ("of these trained / dropped", f"{samples['trained']} / {samples['dropped']}"),
            ("of these carried into the next step", str(samples["carried"])),
            ("not accounted for", str(len(found.problems))),
            ("generated again: their engine died", str(samples["again"])),
            ("drawn and lost with a step that was cut off", str(samples["lost"])),
            ("processes / shared memory left", f"{len(self.orphans)} / {len(self.shared)}"),
            ("wall time, s", f"{self.seconds:.0f}"),
        ]
        return markdown(["what", "measured"], rows)


def soak(folder: Path, *, steps: int, every: int, seed: int, kinds: Sequence[str] = ()) -> Outcome:
    """Run and kill. `kinds`: these one after another, each when a step more is logged; else at random."""
    before, began = shared_memory(), time.monotonic()
    job = Job(folder=folder / "run", steps=steps, every=every)
    kills: Counter[str] = Counter()
    job.start()
    try:
        if kinds:
            restart_seconds = 0.0
            moments = _after_each_step(job, kinds)
        else:
            restart_seconds = measure_restart(job)
            kills["learner rank"] += 1
            moments = _at_random(random.Random(seed), 2 * restart_seconds)
        for kind in moments:
            if job.revive():
                break
            kills += Counter(kill_one(job, kind))
        seconds = time.monotonic() - began
        wait_until(lambda: not job.alive(), 20)
        return Outcome(
            job=job,
            seconds=seconds,
            restart_seconds=restart_seconds,
            kills=kills,
            orphans=[f"{process.pid} ({_kind(process)})" for process in job.alive()],
            shared=left_in_shared_memory(before, job.seen),
            accounts=accounts.read(job.folder),
        )
    finally:
        job.end()


def measure_restart(job: Job) -> float:
    """Seconds from the SIGKILL of a learner rank to the row of a step that was made after it."""
    _expect(job, lambda: job.step() >= job.every)
    (rank,) = job.victims("learner rank")
    killed = time.time()
    rank.kill()
    _expect(job, lambda: job.step(since=killed + 1.0) > 0)
    return time.time() - killed


def _expect(job: Job, holds: object) -> None:
    if not wait_until(holds, 600):
        raise RuntimeError(f"the job does not move: see {job.folder.with_name('torchrun.log')}.")


def _at_random(random_: random.Random, mean: float) -> Iterator[str]:
    """When to kill what: kinds in random order, distances exponential. Empty: only look after the job."""
    order: list[str] = []
    moment = time.monotonic() + random_.expovariate(1 / mean)
    while True:
        time.sleep(0.5)
        if time.monotonic() < moment:
            yield ""
            continue
        order = order or random_.sample(KINDS, len(KINDS))
        yield order.pop()
        moment = time.monotonic() + random_.expovariate(1 / mean)


def _after_each_step(job: Job, kinds: Sequence[str]) -> Iterator[str]:
    """One kind after the other, each when the job has come a step further than the last."""
    reached = 0
    for kind in kinds:
        while job.step() <= reached or not job.victims(kind):
            time.sleep(0.05)
            yield ""
        reached = job.step()
        yield kind
    while True:
        time.sleep(0.5)
        yield ""


def kill_one(job: Job, kind: str) -> list[str]:
    """SIGKILL one process of a kind, or of another where there is none just now; the kind it was of."""
    others = [other for other in KINDS if other != kind] if kind else []
    for wanted in [kind, *others] if kind else []:
        for process in job.victims(wanted)[:1]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            return [wanted]
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print the table, and say what is wrong."""
    parser = argparse.ArgumentParser(description="Kill a run's processes at random and account for it.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="6 steps; an engine and the driver are killed")
    parser.add_argument("--folder", type=Path, help="where the run goes; a temporary folder without it")
    options = parser.parse_args(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    quick = {"steps": 6, "every": 2, "kinds": ("engine", "driver")} if options.quick else {}
    chosen = {"steps": options.steps, "every": options.every, "seed": options.seed} | quick
    outcome = soak(folder.absolute(), **chosen)
    print(outcome.table())
    for problem in outcome.problems:
        print(f"soak: {problem}.", file=sys.stderr)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
