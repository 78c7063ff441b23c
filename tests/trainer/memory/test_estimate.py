"""Counts against a real model; estimates move the way that they must."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.trainer.memory import measured
from trainer.memory.config import ActivationCheckpointing
from trainer.memory.estimate import (
    ModelShape,
    checkpoint_memory,
    engine_memory,
    learner_memory,
    rank_memory,
)

SMOLLM2 = ModelShape(
    hidden=576,
    layers=30,
    intermediate=1536,
    vocabulary=49152,
    heads=9,
    kv_heads=3,
    head_dim=64,
    tied=True,
)


def test_parameters_of_smollm2_are_exact() -> None:
    assert SMOLLM2.parameters == 134_515_008


def test_parameters_of_a_real_model_are_exact(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert ModelShape.read(tiny_llama).parameters == sum(p.numel() for p in model.parameters())


def test_cache_of_one_token() -> None:
    assert SMOLLM2.kv_bytes_per_token() == 2 * 30 * 3 * 64 * 2


def test_weights_masters_gradients_and_moments() -> None:
    parts = learner_memory(SMOLLM2, tokens=1000).parts
    size = SMOLLM2.parameters
    assert parts["weights"] == 2 * size
    assert parts["master weights (fp32)"] == 4 * size
    assert parts["optimizer states"] == 8 * size
    assert (
        "master weights (fp32)" not in learner_memory(SMOLLM2, tokens=1, compute_bytes=4, master=False).parts
    )


def test_what_is_frozen_is_left_out_of_the_share() -> None:
    embeddings, size = 49152 * 576, SMOLLM2.parameters
    assert SMOLLM2.trained_share([]) == 1
    assert SMOLLM2.trained_share(["*embed_tokens*"]) == pytest.approx(1 - embeddings / size)
    assert SMOLLM2.trained_share(["*embed_tokens*", "*embed*", "*layers.[0-9].*norm*"]) == pytest.approx(
        1 - (embeddings + 10 * 2 * 576) / size
    )


def test_what_saves_memory_saves_memory() -> None:
    full = learner_memory(SMOLLM2, tokens=4096).total
    selective, checkpointed = (
        learner_memory(SMOLLM2, tokens=4096, checkpointing=kind).total
        for kind in (ActivationCheckpointing.selective, ActivationCheckpointing.full)
    )
    assert checkpointed < selective < full
    assert learner_memory(SMOLLM2, tokens=4096, state_bytes=2.03125).total == pytest.approx(
        full - 5.96875 * SMOLLM2.parameters
    )
    assert learner_memory(SMOLLM2, tokens=4096, trained_share=0.02).total < full
    assert learner_memory(SMOLLM2, tokens=1024).total < full
    assert learner_memory(SMOLLM2, tokens=4096, reference=True).total == pytest.approx(
        full + 2 * SMOLLM2.parameters
    )


def test_engine_memory_counts_the_cache() -> None:
    parts = engine_memory(SMOLLM2, kv_cache_bytes=1e9).parts
    assert parts["kv cache"] == 1e9
    assert parts["weights"] == 2 * SMOLLM2.parameters


def test_ranks_hold_slices_and_gather_a_part() -> None:
    parts = rank_memory(SMOLLM2, tokens=1000, shards=4).parts
    size = SMOLLM2.parameters
    assert parts["slices of weights (fp32)"] == parts["slices of gradients (fp32)"] == size
    assert parts["slices of optimizer states"] == 2 * size
    outside = 49152 * 576 + 576
    assert parts["gathered weights"] == 2 * (outside + 2 * SMOLLM2.layer_parameters)
    assert parts["gradients on their way"] == 6 * (outside + SMOLLM2.layer_parameters)
    assert parts["activations"] == learner_memory(SMOLLM2, tokens=1000).parts["activations"]
    split = rank_memory(SMOLLM2, tokens=1000, shards=2, split=2).parts
    held = outside + 30 * SMOLLM2.layer_parameters / 2
    assert split["slices of weights (fp32)"] == 2 * held


def test_a_checkpoint_is_gathered_whole() -> None:
    size = SMOLLM2.parameters
    assert checkpoint_memory(SMOLLM2) == 12 * size
    assert checkpoint_memory(SMOLLM2, trained_share=0.01, compute_bytes=2) == 2 * size


def test_weights_and_optimizer_states_can_move() -> None:
    size = SMOLLM2.parameters
    assert learner_memory(SMOLLM2, tokens=1).state == (2 + 4 + 8) * size
    assert rank_memory(SMOLLM2, tokens=1, shards=2).state == (4 + 8) * size / 2


def test_an_estimate_is_within_a_fifth_of_the_measured_peak() -> None:
    """88 million parameters in bf16 with AdamW, in a process of its own."""
    expected = learner_memory(measured.SHAPE, tokens=measured.TOKENS)
    (alone,) = measured.measured({})
    assert expected.total == pytest.approx(alone.peak, rel=0.2)
