"""`ChildEngine`: the same answers as in process, and what happens when either side dies."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from rollout.child_engine import Answers, ChildEngine, _environment, kernel_kills, sender
from rollout.engine import Request, Sampling
from rollout.engine_server import portable
from rollout.engine_spec import EngineSpec
from rollout.errors import EngineDied, EngineError, EngineOutOfMemory

if TYPE_CHECKING:
    from rollout.vllm_engine import VllmEngine

DRIVER = """
import sys, time
from rollout.child_engine import ChildEngine
from rollout.engine_spec import EngineSpec
engine = ChildEngine(EngineSpec(model=sys.argv[1], dtype="float32", max_model_len=64, eager=True, threads=1))
print(engine.pid, flush=True)
time.sleep(600)
"""


def spec(model: Path | str, log_path: Path | str = "") -> EngineSpec:
    return EngineSpec(
        model=str(model),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=32,
        threads=1,
        eager=True,
        log_path=str(log_path),
    )


@pytest.fixture(scope="module")
def child(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildEngine]:
    log = tmp_path_factory.mktemp("child") / "logs" / "engine.log"
    os.environ["RANK"] = "3"  # as under torchrun: the child must not believe that it is a rank
    try:
        engine = ChildEngine(spec(tiny_llama, log_path=log))
    finally:
        del os.environ["RANK"]
    engine.wait()
    yield engine
    engine.close()


def requests(count: int) -> list[Request]:
    return [Request(prompt_ids=[1, 70, 80, 90], seed=index) for index in range(count)]


def test_it_answers_as_the_engine_in_process(child: ChildEngine, engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=16, stop_token_ids=(2,), temperature=0.9)
    made, expected = child.generate(requests(8), sampling), engine.generate(requests(8), sampling)
    assert [one.token_ids for one in made] == [one.token_ids for one in expected]
    for one, other in zip(made, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert child.score([[1, 70, 80]])[0] == pytest.approx(engine.score([[1, 70, 80]])[0], abs=1e-5)
    assert child.effective_sampling(sampling) == engine.effective_sampling(sampling)
    assert child.memory()["peak"] > 1 << 20
    assert child.weight_version == 0


def test_it_has_a_session_threads_and_variables_of_its_own(child: ChildEngine) -> None:
    assert os.getsid(child.pid) == child.pid
    environment = Path(f"/proc/{child.pid}/environ").read_text().split("\0")
    names = {entry.split("=")[0] for entry in environment}
    assert "RANK" not in names
    assert "OMP_NUM_THREADS=1" in environment


def test_errors_cross_the_pipe_with_their_type(child: ChildEngine) -> None:
    with pytest.raises(ValueError, match="does not fit max_model_len=256") as caught:
        child.generate(requests(1), Sampling(max_tokens=1000))
    assert "engine_server" in caught.value.__notes__[0]
    with pytest.raises(EngineError, match="VLLMValidationError"):
        child.generate(requests(1), Sampling(max_tokens=4, top_p=2.0))
    assert len(child.generate(requests(2), Sampling(max_tokens=2))) == 2


def test_an_interrupted_call_does_not_confuse_the_next(child: ChildEngine) -> None:
    """The answer to a call that Ctrl-C gave up arrives later and is passed over."""
    child._connection.send((next(child._numbers), "score", ([[1, 2, 3, 4]], 1.0)))
    assert child.memory()["kv_cache"] > 0


def test_an_answer_that_comes_before_its_taker_is_kept_and_others_are_not() -> None:
    """A thread that waits for a round reads the answers to shorter calls too."""
    ours, theirs = Pipe()
    answers = Answers()
    for number in (1, 2):
        answers.expect(number)
    for number in (7, 2, 1):
        theirs.send((number, True, f"answer {number}"))
    assert answers.take(1, ours) == (True, "answer 1")
    assert answers.take(2, ours) == (True, "answer 2")
    assert not answers._arrived
    assert not answers._awaited
    theirs.close()
    with pytest.raises(EOFError):
        answers.take(3, ours)


def test_an_exception_that_pickle_cannot_rebuild_travels_as_text() -> None:
    class Stubborn(ValueError):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(first)

    Stubborn.__module__ = "rollout.nowhere"
    assert portable(Stubborn("one", "two"))[0] == "Stubborn: one"
    assert isinstance(portable(KeyError("x"))[0], KeyError)


def test_a_failure_inside_the_engine_is_one_sentence() -> None:
    engine: Any = ChildEngine.__new__(ChildEngine)
    engine._process, engine.log_path, engine._answers = SimpleNamespace(pid=7), Path("e.log"), Answers()
    for error in (RuntimeError("CUDA error: unspecified.\nCompile with"), "NotImplementedError: no"):
        engine._connection = SimpleNamespace(recv=lambda error=error: (0, False, (error, "its traceback")))
        with pytest.raises(EngineError) as caught:
            engine._receive(0, "generating")
        said = "RuntimeError: CUDA error: unspecified" if isinstance(error, RuntimeError) else error
        assert str(caught.value) == f"the engine failed while generating: {said} (its log is e.log)."


def test_idle_threads_of_a_child_sleep_soon_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KMP_BLOCKTIME", raising=False)
    assert _environment(spec("m"))["KMP_BLOCKTIME"] == "3"
    monkeypatch.setenv("KMP_BLOCKTIME", "50")
    assert _environment(spec("m"))["KMP_BLOCKTIME"] == "50"


def test_a_child_sees_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in _environment(spec("m"))
    assert _environment(spec("m"), (1, 2))["CUDA_VISIBLE_DEVICES"] == "1,2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    assert _environment(spec("m"), (1, 2))["CUDA_VISIBLE_DEVICES"] == "GPU-5,6"
    assert _environment(spec("m"))["CUDA_VISIBLE_DEVICES"] == "4,GPU-5,6"


def test_loading_errors_are_raised_on_waiting(tmp_path: Path) -> None:
    engine = ChildEngine(spec(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"missing has no config\.json"):
        engine.wait()
    with pytest.raises(EngineDied, match="ended with exit status 0 while loading its model"):
        engine.wait()
    engine.close()


def test_a_killed_child_is_one_sentence_with_the_path_of_its_log(tiny_llama: Path, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    engine = ChildEngine(spec(tiny_llama, log_path=log))
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDied) as caught:
        engine.generate(requests(1), Sampling(max_tokens=1))
    assert str(caught.value) == (
        f"the engine's process {engine.pid} ended by SIGKILL while loading its model, which the kernel did "
        f"not send for want of memory (its log is {log})."
    )
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.memory()


def test_a_child_that_dies_before_it_reads_its_spec_is_reported(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sending to it fails with a BrokenPipeError, which the command line takes for a closed `| head`."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(Connection, "send", late(Connection.send))
    engine = ChildEngine(spec(tiny_llama))
    with pytest.raises(EngineDied, match="ended with exit status 1 while loading its model"):
        engine.wait()
    engine.close()
    assert engine.log_path.exists(), "the sentence names it"
    engine.log_path.unlink()


def late(send: Any) -> Any:
    """`Connection.send` that comes when the child has ended."""

    def waiting(self: Connection, message: Any) -> None:
        time.sleep(0.3)
        send(self, message)

    return waiting


def test_an_allocation_that_fails_in_a_child_names_the_keys_that_need_less(
    tiny_llama: Path, tmp_path: Path
) -> None:
    huge = dataclasses.replace(spec(tiny_llama, log_path=tmp_path / "e.log"), kv_cache_bytes=1 << 50)
    engine = ChildEngine(huge)
    with pytest.raises(EngineOutOfMemory) as caught:
        engine.wait()
    engine.close()
    assert re.fullmatch(
        r"the engine ran out of memory while loading its model \(Available memory on node 0 .* on kv cache "
        r"allocation is less than requested memory for kv \(1048576.0 GiB\)\): lower rollout.kv_cache_gib "
        r"\(on a GPU rollout.gpu_memory\) or rollout.max_num_seqs, or free memory that other processes hold "
        rf"\(its log is {tmp_path}/e.log\).",
        str(caught.value),
    )


def test_who_sent_a_sigkill_is_inferred_from_the_kernels_count() -> None:
    counted = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    assert kernel_kills() == (int(counted["oom_kill"]) if "oom_kill" in counted else None)
    assert sender(2, 2) == ", which the kernel did not send for want of memory"
    assert sender(2, 3).startswith(", most likely sent by the kernel for want of memory: lower rollout.kv_ca")
    assert sender(None, 3) == ", sent by somebody or, for want of memory, by the kernel"


def test_the_stacks_of_a_child_can_be_asked_for(child: ChildEngine) -> None:
    stacks = child.stacks()
    assert 'engine_server.py", line' in stacks
    assert "in serve" in stacks
    assert child.memory()["peak"] > 0, "it goes on as before"


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_it_dies_with_a_killed_driver(tiny_llama: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tiny_llama)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    time.sleep(1.0)  # the child is importing torch and vLLM
    assert alive(pid)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether the process runs: a zombie, which its next parent has yet to collect, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
