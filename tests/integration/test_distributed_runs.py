"""`torchrun` and the real command: a learner of two ranks with a real engine, how it goes on, how it ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rlhf.checkpoint import STATE, Checkpoints
from rlhf.state_file import read as read_state
from rlhf.tracking.jsonl import read
from tests.integration.commands import ALONE, finish, sentences, start, wait_for_rows

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
