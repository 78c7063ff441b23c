"""The memory estimate of a configuration: the engine's own arithmetic, and what is said without one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf.compose import load
from rlhf.memory_plan import KNOWN, plan_memory
from rlhf.models import SMOLLM2
from rollout.engine_spec import EngineSpec, kv_cache_bytes
from trainer.memory.estimate import KEPT_BYTES

SIZES = {
    "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def folder_of(folder: Path, config: Mapping[str, object]) -> Path:
    """A model folder without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return folder


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ([], 128 + 16),
        (["evaluation.max_new_tokens=600"], 128 + 600),
        (["rollout.max_model_len=333", "evaluation.max_new_tokens=100"], 333),
    ],
)
def test_cache_is_what_the_engine_takes(tmp_path: Path, overrides: list[str], length: int) -> None:
    config = load("dapo/arithmetic", ["data.max_prompt_tokens=128", "rollout.max_num_seqs=8", *overrides])
    spec = EngineSpec(model=str(folder_of(tmp_path / "m", SIZES)), max_model_len=length, max_num_seqs=8)
    assert plan_memory(config).engine.parts["kv cache"] == kv_cache_bytes(spec)


def test_layercast_keeps_narrow_weights_and_a_wide_cache() -> None:
    narrow, wide, cast = (
        plan_memory(load("dapo/arithmetic", overrides))
        for overrides in (
            [],
            ["rollout.dtype=float32", "learner.dtype=float32"],
            ["rollout.numerics=layercast"],
        )
    )
    assert cast.engine.parts["weights"] == narrow.engine.parts["weights"]
    assert cast.engine.parts["kv cache"] == wide.engine.parts["kv cache"] > narrow.engine.parts["kv cache"]
    assert cast.learner.parts["weights"] == narrow.learner.parts["weights"]
    assert cast.learner.parts["activations"] == wide.learner.parts["activations"]
    assert cast.learner.parts["master weights (fp32)"] == narrow.learner.parts["master weights (fp32)"]


def test_an_engine_in_process_shares_what_is_the_process() -> None:
    child, inside = (
        plan_memory(load("dapo/arithmetic", [f"rollout.process={process}"])).engine.parts
        for process in ("child", "inprocess")
    )
    assert child["kept by malloc"] == KEPT_BYTES
    assert set(child) - set(inside) == {"process", "kept by malloc"}


def test_a_checkpoint_is_found_by_run_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "runs" / "demo" / "checkpoints" / "step-100", SIZES)
    known = plan_memory(load("dapo/arithmetic", []))
    assert KNOWN[SMOLLM2].head_dim == 64
    for path in ("runs/demo@last", "demo@100", str(tmp_path / "runs" / "demo@last")):
        assert plan_memory(load("dapo/arithmetic", [f"model.path={path}"])) == known
    assert (
        "runs/demo@7 has no config.json"
        in plan_memory(load("dapo/arithmetic", ["model.path=runs/demo@7"])).unknown
    )


def test_dimensions_that_are_nested_are_unknown(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "vision", {"text_config": SIZES})
    plan = plan_memory(load("dapo/arithmetic", [f"model.path={folder}"]))
    assert plan.unknown == (
        f"{folder}/config.json has no 'num_attention_heads', so the dimensions are unknown: no estimate."
    )


def test_each_rank_of_a_learner_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, wanted = (
        plan_memory(load("dapo/arithmetic", [f"learner.parallel.shard={shard}"])) for shard in (0, 4)
    )
    assert (alone.ranks, wanted.ranks) == (1, 4)
    assert wanted.total == 4 * wanted.learner.total + wanted.engine.total
    assert wanted.learner.parts["slices of weights (fp32)"] == alone.learner.parts["weights"] / 2
    copies = plan_memory(
        load("dapo/arithmetic", ["learner.parallel.shard=2", "learner.parallel.replicate=2"])
    )
    assert copies.ranks == 4
    assert copies.learner.parts["slices of weights (fp32)"] == alone.learner.parts["weights"]
    size = KNOWN[SMOLLM2].parameters * KNOWN[SMOLLM2].trained_share(["*embed_tokens*"])
    assert (alone.checkpoint, wanted.checkpoint) == (0, 12 * size)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert plan_memory(load("dapo/arithmetic")) == wanted
