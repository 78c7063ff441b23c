"""Faults to sentences: real errors of the disk and of allocators, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf import cli, faults
from rlhf.config import Config
from rlhf.errors import RewardRaisedError, RunStoppedError, UserError
from rlhf.files import replace_text
from rollout.errors import EngineError, EngineOutOfMemory, engine_failures
from trainer.errors import asked_for, described, out_of_memory
from trainer.memory.config import ActivationCheckpointing


def write_text(path: Path) -> None:
    with path.open("a") as file:
        file.write("x")
        file.flush()


def write_table(path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(1000))}), path)


@pytest.mark.parametrize("write", [write_text, write_table])
def test_a_full_device_is_known_whoever_writes(write: object, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # pyarrow removes what it could not write: the link, not the device
    with pytest.raises(Exception) as caught:  # noqa: PT011 - libraries have types of their own for it
        write(full)  # type: ignore[operator]
    assert faults.sentence(caught.value, Config(), "record", tmp_path) == (
        f"the disk of {tmp_path} is full, rollouts could not be written: free some space."
    )


def test_disks_that_fail_otherwise() -> None:
    broken = OSError(5, "Input/output error")
    assert faults.sentence(broken, Config(), "checkpoint") == (
        "the disk fails with input/output errors, the checkpoint could not be written: choose another "
        "run.dir."
    )
    assert faults.sentence(Exception("I/O error: No space left (os error 28)"), Config(), "checkpoint")
    assert faults.sentence(FileNotFoundError(2, "No such file"), Config(), "checkpoint") == ""


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    (tmp_path / ".a.txt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_allocations_that_fail() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert out_of_memory(caught.value)
    assert asked_for(caught.value) == "4194304.00 GiB"
    device = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of")
    assert (out_of_memory(device), asked_for(device)) == (True, "20.00 GiB")
    config = Config()
    config.learner.memory.activation_checkpointing = ActivationCheckpointing.full
    config.learner.lora.rank = 8
    assert faults.sentence(device, config, "update") == (
        "the learner ran out of memory in the phase 'update', asking for 20.00 GiB more: lower "
        "learner.token_budget=4096."
    )
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shape mismatch"))


def test_engine_failures_are_one_sentence_and_mistakes_pass() -> None:
    with pytest.raises(EngineOutOfMemory, match=r"\(it asked for 4194304.00 GiB more\): lower"):
        fail_in_engine(RuntimeError("can't allocate memory: you tried to allocate 4503599627370496 bytes."))
    small = "To serve at least one request with the model's max seq len, (2.0 GiB KV cache is needed, …). Try"
    with pytest.raises(EngineOutOfMemory, match=r"is needed, …\)\): raise rollout\.kv_cache_gib"):
        fail_in_engine(ValueError(small))
    with pytest.raises(EngineError, match=r"^the engine failed while generating: RuntimeError: odd\.$"):
        fail_in_engine(RuntimeError("odd.\nstack"))
    with pytest.raises(ValueError, match="too long"):
        fail_in_engine(ValueError("too long"))


def fail_in_engine(error: Exception) -> None:
    with engine_failures("generating"):
        raise error


def test_what_passes_and_what_becomes_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError("ours"), UserError("yours")):
        with pytest.raises(type(error)) as passed, faults.stopping(Config(), lambda: "stopped"):
            raise error
        assert passed.value is error
    with pytest.raises(RunStoppedError) as stopped:
        stop(EngineError("gone."), tmp_path)
    assert str(stopped.value) == "stopped: gone. Then go on."
    monkeypatch.setenv("WHETSTONE_TRACEBACK", "1")
    with pytest.raises(EngineError):
        stop(EngineError("gone."), tmp_path)


def stop(error: Exception, folder: Path) -> None:
    with faults.stopping(Config(), lambda: "stopped", folder=lambda: folder, then=lambda: "Then go on."):
        raise error


def test_the_traceback_of_a_reward_is_saved_where_there_is_room(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^fn raised\. Its traceback is in {tmp_path}/error\.txt\.$"):
        stop(raised(), tmp_path)
    assert (tmp_path / "error.txt").read_text().endswith("KeyError: 'gold'\n")
    with pytest.raises(UserError, match=r"^fn raised\.$"):
        stop(raised(), tmp_path / "gone")


def raised() -> RewardRaisedError:
    error = RewardRaisedError("fn raised.")
    error.__cause__ = KeyError("gold")
    return error


def test_sentences_about_exceptions() -> None:
    assert described(ValueError("one.\ntwo")) == "ValueError: one"
    assert described(ValueError()) == "ValueError"


def test_only_a_reader_that_left_ends_a_command_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: object) -> int:
        raise BrokenPipeError("an engine's")

    monkeypatch.setattr(cli, "_recipes", broken)
    with pytest.raises(BrokenPipeError, match="an engine's"):
        cli.main(["recipes"])
    monkeypatch.setattr(cli, "_reader_is_gone", lambda: True)
    assert cli.main(["recipes"]) == 0
