"""Fixtures that all tests share, and the process settings that hold before torch is imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rollout.vllm_engine import VllmEngine

ROOT = Path(__file__).resolve().parents[1]

LONGEST = (
    "integration/test_distributed_runs.py",
    "integration/test_resumed_runs.py",
    "integration/test_engine_restarts.py",
    "rollout/test_ray_engine.py",
    "integration/test_ray_ranks.py",
    "integration/test_ahead_runs.py",
    "rollout/test_ray_nodes.py",
    "integration/test_full_disk.py",
    "benchmarks/test_scaling.py",
    "benchmarks/test_pool_overhead.py",
    "rollout/test_compiled_engine.py",
)
"""Files that take more than a minute, the longest first: begun last, one would keep a lone worker busy."""


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist hand files out in our order, instead of those with most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files first; `slow` tests only where `-m` is given, `gpu` tests where there is a GPU."""
    place = {ROOT / "tests" / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
    if not config.option.markexpr:
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
    gpu = [item for item in items if "gpu" in item.keywords]
    if gpu and not _has_gpu():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared data sets: `WHETSTONE_DATA`, by default `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("WHETSTONE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("shared data not found")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama (tied head) and its byte tokenizer."""
    return _tiny("llama", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen3 (head of its own) and its byte tokenizer."""
    return _tiny("qwen", tmp_path_factory)


def _tiny(kind: str, factory: pytest.TempPathFactory) -> Path:
    from rlhf.tiny_models import build_tiny

    return build_tiny(kind, factory.mktemp("tiny") / kind)


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[VllmEngine]:
    """One in-process vLLM engine on `tiny_llama` in float32, shared by the module (a start takes seconds).

    Not by the session: tests of other modules build engines in the same process, and vLLM's process groups
    do not survive the end of one of them. A test that publishes weights into it must put the first ones back.
    """
    yield from _engine(tiny_llama, "float32")


@pytest.fixture(scope="module")
def bfloat16_engine(tiny_qwen: Path) -> Iterator[VllmEngine]:
    """The same on `tiny_qwen` in bfloat16."""
    yield from _engine(tiny_qwen, "bfloat16")


def _engine(model: Path, dtype: str) -> Iterator[VllmEngine]:
    from rollout.engine_spec import EngineSpec
    from rollout.vllm_engine import VllmEngine

    spec = EngineSpec(
        model=str(model),
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=32,
        kv_cache_bytes=64 << 20,
        threads=1,
        eager=True,
        transport="shm",
    )
    started = VllmEngine(spec)
    yield started
    started.close()
