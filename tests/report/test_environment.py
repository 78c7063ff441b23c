from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import numpy
import psutil
import pytest

from rlhf import environment


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_written_file_holds_the_machine_and_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_API_KEY", "top-secret-1")
    monkeypatch.setenv("HF_TOKEN", "top-secret-2")
    path = environment.write(tmp_path)
    assert path == tmp_path / "environment.json"
    assert "top-secret" not in path.read_text()
    found = json.loads(path.read_text())
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == numpy.__version__
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["logical_cores"]
    assert found["cpu"]["model"]
    assert found["variables"]["OMP_NUM_THREADS"] == "1"


def test_git_state_of_a_real_checkout(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("a = 1\n")
    assert environment.git_state(file) is None
    _git(tmp_path, "init", "-q")
    assert environment.git_state(file) is None  # not tracked: some other project's checkout
    _git(tmp_path, "add", "module.py")
    assert environment.git_state(file) == {"commit": None, "modified": True}
    _git(tmp_path, "commit", "-q", "-m", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert environment.git_state(file) == {"commit": commit, "modified": False}
    (tmp_path / "untracked.txt").write_text("x")
    assert environment.git_state(file) == {"commit": commit, "modified": False}
    file.write_text("a = 2\n")
    assert environment.git_state(file) == {"commit": commit, "modified": True}


def test_torch_is_described_once_it_is_loaded() -> None:
    import torch

    assert environment.threads()["intraop"] == torch.get_num_threads()
    assert environment.device() == "cpu" or torch.cuda.is_available()
