"""`torchrun` and the real command: a learner of two ranks with a real engine, how it goes on, how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.checkpoint import STATE, Checkpoints
from rlhf.state_file import read as read_state
from rlhf.tracking.jsonl import read
from tests.benchmarks import accounts
from tests.integration.commands import (
    ALONE,
    RLHF,
    TORCHRUN,
    finish,
    sentences,
    start,
    wait_for_rows,
    wait_until,
)
from tests.integration.test_resumed_runs import (
    RUN,
    STEPS,
    assert_equal,
    left_behind,
    outcome,
    shared_memory,
)

RESTARTING = [*TORCHRUN, "--max-restarts", "3"]
TRAIN = ["train", "dapo/tiny", "run.dir=run", "rollout.process=child", "evaluation.every=0"]


def test_a_run_goes_from_two_ranks_to_one_and_back(tmp_path: Path) -> None:
    """SIGTERM ends it after the step in progress, which is saved; one process goes on, then two again."""
    process = start(tmp_path, *TRAIN, "loop.steps=500")
    wait_for_rows(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    said = finish(process, succeeds=False)
    assert "interrupted after step" in "".join(sentences(said)), said
    checkpoints = Checkpoints(tmp_path / "run")
    (first,) = checkpoints.steps()
    assert checkpoints.problem(first) == ""
    replayed = finish(start(tmp_path, "replay", "run@1", launcher=ALONE), succeeds=False)
    finish(start(tmp_path, *TRAIN, f"loop.steps={first + 1}", "resume=auto", launcher=ALONE))
    said = finish(start(tmp_path, *TRAIN, f"loop.steps={first + 2}", "resume=auto"))
    assert said.count(f"{first + 2} steps: held-out accuracy") == 1
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(first + 3))
    assert [row["weights/version"] for row in rows] == list(range(1, first + 4))
    assert max(row["weights/probe_gap_mean"] for row in rows) < 1e-4
    assert rows[first + 2]["learner/optimizer_steps"] > rows[first]["learner/optimizer_steps"] > 0
    assert checkpoints.steps()[-2:] == [first + 1, first + 2]
    assert {checkpoints.problem(step) for step in checkpoints.steps()} == {""}
    state = read_state(checkpoints.path(first + 2) / STATE)["learner"]
    assert {type(moment) for moment in state["optimizer"]["0"]["state"][0]} == {str}
    (norms,) = (line.split()[1:3] for line in replayed.splitlines() if "learner/grad_norm " in line)
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-5), "learned again by one process"


def test_degrees_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    said = finish(start(tmp_path, *TRAIN, "learner.parallel.shard=3"), succeeds=False)
    assert sentences(said) == [
        "rlhf: learner.parallel.replicate=1 x learner.parallel.shard=3 = 3 ranks, but there are 2: start 3 "
        "(torchrun --nproc-per-node), or set degrees whose product is 2."
    ]
    assert "exitcode  : 2" in said
    assert not (tmp_path / "run").exists()


FAILING = """
import os, sys
from rlhf.cli import main
from trainer.learner import Learner

rank, what, *arguments = sys.argv[1:]
going_on = Learner._finish

def failing(learner, report):
    if os.environ["RANK"] == rank and learner.rollout_step == 1:
        exec(what)
    return going_on(learner, report)

Learner._finish = failing
sys.exit(main(arguments))
"""
"""A run of which one rank does something in its second step."""


MEMORY = "raise MemoryError('no more')"
KILL = "os.kill(os.getpid(), 9)"
STOPPED = "rlhf: the run stopped in step 2: "


@pytest.mark.parametrize(
    ("rank", "what", "said_at_last"),
    [
        ("1", MEMORY, f"{STOPPED}rank 1 of the learner failed: the learner ran out of memory"),
        ("1", KILL, f"{STOPPED}a rank of the learner has ended"),
        ("0", MEMORY, f"{STOPPED}the learner ran out of memory in the phase 'update'"),
        ("0", KILL, ""),
    ],
    ids=["error on a follower", "kill of a follower", "error on rank 0", "kill of rank 0"],
)
def test_no_rank_outlives_a_failure(rank: str, what: str, said_at_last: str, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    process = start(tmp_path, rank, what, *TRAIN, "loop.steps=3", program=["failing.py"])
    wait_for_rows(process, tmp_path, 2)
    said = finish(process, succeeds=False)
    if what is MEMORY:
        assert len(sentences(said)) == 1, said
    # After a kill torchrun gives rank 0 half a minute, which a busy machine may take to write the report.
    assert all(said_at_last and sentence.startswith(said_at_last) for sentence in sentences(said)), said


# ---------------------------------------------------------------- ranks that are killed


KILLED = """
import os, sys
from rlhf.cli import main
from trainer.learner import Learner

moments = {"0": ("1", 1), "1": ("0", 4)}
doomed, steps = moments.get(os.environ["TORCHELASTIC_RESTART_COUNT"], ("", 0))
going_on = Learner._finish

def dying(learner, report):
    if os.environ["RANK"] == doomed and learner.rollout_step == steps:
        os.kill(os.getpid(), 9)
    return going_on(learner, report)

Learner._finish = dying
sys.exit(main(sys.argv[1:]))
"""
"""First rank 1 is killed in step 2, when nothing is saved, then rank 0 in step 5, when step 4 is."""


def test_killed_ranks_are_started_again_and_the_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit, with every sample accounted for, and no process and no shared memory left."""
    (tmp_path / "killed.py").write_text(KILLED)
    settings = [*RUN, "rollout.process=child", "resume=auto"]
    finish(start(tmp_path, *settings, "run.dir=undisturbed"))
    before = shared_memory()
    process = start(tmp_path, *settings, "run.dir=run", launcher=RESTARTING, program=["killed.py"])
    said = finish(process)
    assert left_behind(before, []) == []
    assert "ended before its first checkpoint: the run begins anew" in said
    assert "run goes on after step 4." in said
    assert_equal(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))
    found = accounts.read(tmp_path / "run")
    assert (found.problems, found.steps, found.begins) == ([], STEPS, 3)
    assert found.samples["lost"] > 0


def test_restarts_without_resuming_are_refused(tmp_path: Path) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "3"}
    done = subprocess.run(
        [sys.executable, *RLHF, *TRAIN, "--dry-run"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "rlhf: torchrun --max-restarts=3 starts the run again after a failure, and resume=never would begin "
        "anew: set resume=auto.\n",
    )


# ---------------------------------------------------------------- ranks that hang


HANGING = """
import os, signal, sys, time
from pathlib import Path
from rlhf import distributed
from rlhf.cli import main

calls = 0

class HangingLoss:
    needs_entropy_gradient = False

    def __init__(self, config):
        self.sound = build_loss(config)

    def __call__(self, inputs):
        global calls
        calls += os.environ["RANK"] == "1"
        if calls == 1:
            said = Path("run/stacks.txt")
            while not (said.exists() and "rank 1 has not arrived" in said.read_text()):
                time.sleep(0.1)
        if calls == 3:
            time.sleep(2)  # long enough for both ranks to be seen at work again, too short to be late
            Path("stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.sound(inputs)

build_loss, distributed.build_loss = distributed.build_loss, HangingLoss
sys.exit(main(sys.argv[1:]))
"""
"""Rank 1 sleeps in its first loss until that is noticed, and stops itself in the third."""


def test_a_rank_that_hangs_is_named_with_its_phase_and_its_stacks(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    process = start(tmp_path, *TRAIN, "loop.steps=2", "run.watchdog_minutes=0.05", program=["hanging.py"])
    stopped, stacks = tmp_path / "stopped", tmp_path / "run" / "stacks.txt"
    wait_until(process, stopped.exists)
    wait_until(process, lambda: "rank 1 has not arrived: it does not answer" in stacks.read_text())
    os.kill(int(stopped.read_text()), signal.SIGCONT)
    said = [line for line in finish(process).splitlines() if line.startswith("run.watchdog_minutes=0.05: ")]
    phase = r"the phase 'update' of step \d has not ended for 0\.0\d+ minutes; rank 1 has not arrived: "
    sleeping = phase + r"at 'update' it is in __call__ \(hanging\.py:\d+\); where"
    silent = phase + r"it does not answer, its last word was 'update'; where"
    assert any(re.search(sleeping, line) for line in said), said
    assert any(re.search(silent, line) for line in said), said
    written = stacks.read_text()
    assert "in __call__\n    time.sleep(0.1)\n" in written
    assert "rank 1:\ndoes not answer\n" in written
