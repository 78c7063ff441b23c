"""Faults of a whole run: one sentence, the right exit status, the last checkpoint whole, and the way on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf
from rlhf import pipeline
from rlhf.checkpoint import Checkpoints
from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.tracking.jsonl import read
from rollout import child_engine
from rollout.child_engine import ChildEngine
from trainer.learner import Learner

TINY = "dapo/tiny"
FOLDER = Path("runs/dapo-tiny")
RUN = ["train", TINY, "loop.steps=3", "checkpoint.every=1", "evaluation.every=0", "evaluation.at_end=false"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def fails_in_step(step: int, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """Have `fault()` happen at the start of the update of rollout step `step`."""
    update = Learner.update

    def faulty(self: Learner, batches: Any) -> Any:
        if self.rollout_step == step - 1:
            fault()
        return update(self, batches)

    monkeypatch.setattr(Learner, "update", faulty)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last thing said on standard error."""
    return capsys.readouterr().err.splitlines()[-1]


def goes_on(step: int) -> str:
    """What a run says that was stopped with `step` saved."""
    return f"Then the same command with run.dir={FOLDER} resume=auto goes on after step {step}."


# ---------------------------------------------------------------- the learner


def test_a_learner_out_of_memory_names_what_needs_less(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails_in_step(2, monkeypatch, lambda: torch.empty(1 << 50))
    assert main(RUN) == 1
    assert last_line(capsys) == (
        "rlhf: the run stopped in step 2: the learner ran out of memory in the phase 'update', asking for "
        "4194304.00 GiB more: lower learner.token_budget=4096, or set "
        "learner.memory.activation_checkpointing=full, or start anew with an adapter only "
        f"(learner.lora.rank=16). {goes_on(1)}"
    )
    assert (Checkpoints(FOLDER).steps(), Checkpoints(FOLDER).problem(1)) == ([1], "")


def test_gradients_that_are_not_finite_stop_or_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = pipeline.build_learner

    def sick(*arguments: Any) -> Learner:
        learner = build(*arguments)
        weight = learner.policy.model.model.layers[0].mlp.up_proj.weight
        weight.register_hook(lambda grad: grad * float("nan") if learner.rollout_step == 1 else grad)
        return learner

    monkeypatch.setattr(pipeline, "build_learner", sick)
    assert main(RUN) == 1
    said = last_line(capsys)
    assert re.fullmatch(
        r"rlhf: the run stopped in step 2: The gradient norm is nan in optimizer step 3, first in "
        r"model\.model\.layers\.0\.mlp\.up_proj\.weight: start anew with a lower learner\.optimizer\.lr or "
        rf"learner\.dtype=float32, or set learner\.on_nonfinite=skip\. {re.escape(goes_on(1))}",
        said,
    )
    assert main([*RUN, "resume=auto", "learner.on_nonfinite=skip"]) == 0
    rows = read(FOLDER / "metrics.jsonl")
    assert [row.get("learner/skipped_steps") for row in rows] == [None, None, 2.0, 2.0]
    assert "policy/loss" not in rows[2]
    assert rows[2]["weights/probe_gap_mean"] == pytest.approx(rows[1]["weights/probe_gap_mean"])
    assert rows[3]["learner/optimizer_steps"] == rows[1]["learner/optimizer_steps"] + 2


# ---------------------------------------------------------------- engines


def test_an_engine_that_hangs_is_named_and_one_that_is_killed_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In step 2 the engine is stopped while it generates; once the watchdog has said so, it is killed."""
    receive = ChildEngine._receive

    def hung(self: ChildEngine, number: int, doing: str) -> Any:
        if doing == "generating" and self.weight_version == 2:
            os.kill(self.pid, signal.SIGSTOP)
            threading.Thread(target=kill_when_said, args=(self.pid,)).start()
        return receive(self, number, doing)

    def kill_when_said(pid: int) -> None:
        limit = time.monotonic() + 60
        while not (FOLDER / "stacks.txt").exists() and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(child_engine.STACKS_SECONDS + 1)
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(ChildEngine, "_receive", hung)
    assert main([*RUN, "rollout.process=child", "run.watchdog_minutes=0.02"]) == 1
    assert re.fullmatch(
        r"rlhf: the run stopped in step 2: the engine's process \d+ ended by SIGKILL while generating, which "
        rf"the kernel did not send for want of memory \(its log is {FOLDER}/logs/engine-0\.log\)\. "
        rf"{re.escape(goes_on(1))}",
        last_line(capsys),
    )
    (hang,) = [line for line in caplog.messages if line.startswith("run.watchdog_minutes=0.02: ")]
    assert "the phase 'rollout' of step 2 has not ended for 0.0" in hang
    written = (FOLDER / "stacks.txt").read_text()
    assert "child_engine.py" in written
    assert re.search(r"engine process \d+:\ndoes not answer", written)
    assert Checkpoints(FOLDER).problem(1) == ""


def test_an_engine_killed_while_weights_are_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ChildEngine._call

    def killed(self: ChildEngine, name: str, *arguments: Any) -> Any:
        if name == "receive_weights" and arguments[1] == 2:
            os.kill(self.pid, signal.SIGKILL)
        return call(self, name, *arguments)

    monkeypatch.setattr(ChildEngine, "_call", killed)
    assert main([*RUN, "rollout.process=child"]) == 1
    assert re.fullmatch(
        r"rlhf: the run stopped in step 1: the engine's process \d+ ended by SIGKILL (while|before) "
        r"installing weights, which .* Then the same command with .* resume=auto goes on from the "
        r"beginning, nothing is saved yet\.",
        last_line(capsys),
    )


def test_an_engine_killed_before_it_reads_what_to_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rlhf train` once took the broken pipe for a closed `| head` and ended in silence with status 0."""
    monkeypatch.setattr(child_engine.sys, "executable", "/bin/false")
    assert main([*RUN, "rollout.process=child"]) == 1
    assert re.fullmatch(
        r"rlhf: the run could not start: the engine's process \d+ ended with exit status 1 while loading its "
        rf"model \(its log is {FOLDER}/logs/engine-0\.log\)\.",
        last_line(capsys),
    )


SECOND_TRY = f"""
import sys, torch
from rlhf.cli import main
run = {RUN}
first = main([*run, "rollout.kv_cache_gib=1048576", "loop.steps=1"])
print("left behind" if torch.distributed.is_initialized() else "closed", flush=True)
sys.exit(10 * first + main([*run, "loop.steps=1"]))
"""


def test_a_cache_that_no_memory_holds_and_a_second_try_in_the_same_process() -> None:
    """The failed load's process group is closed: the next engine is not refused. In a process without any
    other engine, for vLLM's failing load closes the groups of all."""
    command = [sys.executable, "-c", SECOND_TRY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 10, done.stderr
    assert "closed" in done.stdout.splitlines()
    assert re.search(
        r"rlhf: the run could not start: the engine ran out of memory while loading its model \(Available "
        r"memory on node 0 .*\): lower rollout.kv_cache_gib \(on a GPU rollout.gpu_memory\) or "
        r"rollout.max_num_seqs, or free memory that other processes hold\.",
        done.stderr,
    )


# ---------------------------------------------------------------- rewards


def picky(prompts: Any, responses: Any, answers: Any, rows: Any) -> list[float]:
    """A reward that stumbles."""
    return [float({"1": 1}[row["nothing"]]) for row in rows]


def test_a_reward_that_raises_leaves_its_traceback() -> None:
    with pytest.raises(UserError) as caught:
        rlhf.train(TINY, {"evaluation.every": 0, "evaluation.at_end": False}, reward=picky)
    assert re.fullmatch(
        r"reward\.parts\.reward: picky raised KeyError: 'nothing' \(on response 1 of \d+ to sums:\d+\)\. Its "
        rf"traceback is in {FOLDER}/error\.txt\.",
        str(caught.value),
    )
    assert 'in picky\n    return [float({"1": 1}[row["nothing"]])' in (FOLDER / "error.txt").read_text()
