"""`rlhf eval BENCHMARK` for real: in one process, killed in its midst, by two engines (on Ray too), by a
server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest

from rlhf.cli import main
from rlhf.evaluation import answers as store
from rlhf.evaluation.result import summarize

SHORT = [
    "protocol.max_new_tokens=8", "protocol.temperature=1.0", "protocol.samples=2", "rollout.dtype=float32",
    "rollout.eager=true", "rollout.threads=1", "protocol.graders.integer={kind: exact_integer}",
]  # fmt: skip
HERE = ["rollout.process=inprocess"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six problems, of a tiny random model that answers none of them but by chance."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"id": f"s{n}", "problem": f"{n} + 1 = ?", "answer": str(n + 1)} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(problems: Path, model: Path, folder: Path, *more: str) -> list[str]:
    """The words after `rlhf`."""
    given = [f"data.path={problems}", f"model.path={model}", f"run.dir={folder}", *SHORT, *more]
    return ["eval", "jsonl", *given]


@pytest.fixture(scope="module")
def whole(problems: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed, three rounds of four responses."""
    folder = tmp_path_factory.mktemp("whole") / "evaluation"
    assert main(command(problems, tiny_llama, folder, "run.round=4", *HERE)) == 0
    return folder


def test_numbers_and_responses_are_on_the_disk(whole: Path) -> None:
    responses = store.read(whole)
    assert [(r.id, r.sample) for r in responses] == [(f"sums:s{n}", i) for n in range(6) for i in range(2)]
    written = json.loads((whole / store.SCORE).read_text())
    assert written["score"] == summarize(responses, samples=2).plain()
    assert written["stamp"]["counts"]["truncated"] == sum(r.finish_reason == "length" for r in responses) / 12
    assert written["stamp"]["protocol"]["label"] == "greedy@1+changed"
    table = pyarrow.parquet.read_table(whole / "answers.parquet")
    assert table.column("response").to_pylist() == [r.response for r in responses]
    assert "| responses cut at the limit |" in (whole / "report.md").read_text()
    assert "data:image/png;base64," in (whole / "report.html").read_text()


def test_the_same_command_generates_nothing_again(
    whole: Path, problems: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / store.LINES).read_bytes()
    began = time.monotonic()
    assert main(command(problems, tiny_llama, whole, "run.round=4", *HERE)) == 0
    assert time.monotonic() - began < 5  # no engine was started
    assert (whole / store.LINES).read_bytes() == before
    assert "avg@2" in capsys.readouterr().out


def test_another_protocol_does_not_mix_in(
    whole: Path, problems: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(problems, tiny_llama, whole, "run.round=4", "protocol.top_p=0.9", *HERE)) == 2
    assert "holds another evaluation (protocol differs)" in capsys.readouterr().err


def test_killed_and_gone_on_with_it_is_the_same_evaluation(
    whole: Path, problems: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evaluation"
    words = command(problems, tiny_llama, folder, "run.round=4", *HERE)
    process = subprocess.Popen([sys.executable, "-m", "rlhf.cli", *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(store.read(folder)) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / store.SCORE).exists()
    assert main(words) == 0
    assert (folder / store.LINES).read_bytes() == (whole / store.LINES).read_bytes()


@pytest.mark.parametrize("pool", ["local", "ray"])
def test_two_engines_give_the_same_responses(
    pool: str, whole: Path, problems: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    if pool == "ray":
        pytest.importorskip("ray")
    folder = tmp_path / "evaluation"
    engines = [f"rollout.pool={pool}", "rollout.engines=2", "run.round=100"]
    assert main(command(problems, tiny_llama, folder, *engines)) == 0
    assert [r.response for r in store.read(folder)] == [r.response for r in store.read(whole)]


# ---------------------------------------------------------------- a server


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `vllm serve` starts, with the tiny model; its base URL. The command itself looks for a
    distribution named vllm, which the CPU build is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "server.log").open("wb")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_llama),
            "--port", str(port), "--host", "127.0.0.1", "--served-model-name", "tiny", "--enforce-eager",
            "--dtype", "float32", "--max-model-len", "256",
        ],
        stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, Path(log.name))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])


def test_a_server_answers(
    server: str, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.path={problems}", f"run.dir={tmp_path / 'e'}", f"endpoint.url={server}", *SHORT]
    assert main(["eval", "jsonl", *given]) == 0
    responses = store.read(tmp_path / "e")
    assert len(responses) == 12
    assert all(0 < r.length <= 8 for r in responses)
    assert len({r.response for r in responses}) > 6  # every request has a seed of its own
    stamp = json.loads((tmp_path / "e" / store.STAMP).read_text())
    assert stamp["model"] == {"description": f"tiny at {server}", "weights": "unknown"}
    capsys.readouterr()

    again = [word.replace(str(tmp_path / "e"), str(tmp_path / "f")) for word in given]
    assert main(["eval", "jsonl", *again, "run.round=1"]) == 0
    assert [r.response for r in store.read(tmp_path / "f")] == [r.response for r in responses]

    assert main(["eval", "jsonl", *given, "endpoint.model=other"]) == 2
    assert f"endpoint.url={server} has no model 'other': set endpoint.model to one of tiny." in (
        capsys.readouterr().err
    )


def test_a_server_that_is_not_there(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.path={problems}", f"run.dir={tmp_path / 'e'}", "endpoint.retries=0", *SHORT]
    assert main(["eval", "jsonl", *given, "endpoint.url=http://127.0.0.1:9/v1"]) == 2
    assert "endpoint.url=http://127.0.0.1:9/v1 cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
