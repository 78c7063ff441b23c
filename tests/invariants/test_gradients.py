"""What the gradient may not depend on: micro-batches, packing, order, sharing. float32, 1e-5."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.samples import Reinforce, random_rows, reference_gradients, tiny_model
from trainer.batch import Row
from trainer.config import Device, LearnerConfig, Precision
from trainer.learner import Learner
from trainer.memory.config import ActivationCheckpointing, MemoryConfig
from trainer.packing import pack

KINDS = ["llama", "qwen2", "qwen3"]
TEMPERATURE = 0.8


def gradients(kind: str, rows: list[Row], entropy: float = 0.0, **changes: Any) -> dict[str, Tensor]:
    """Gradients that a learner adds up over its micro-batches, before clipping."""
    config = LearnerConfig(dtype=Precision.float32, device=Device.cpu, **changes)
    learner = Learner(
        config, tiny_model(kind), loss=Reinforce(entropy), temperature=TEMPERATURE, total_steps=1, seed=0
    )
    for batch in pack(rows, config.token_budget, learner.policy.shares_prompts):
        learner._backward(batch)
    return {name.removeprefix("model."): p.grad for name, p in learner.master.named if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to 1e-5 of each tensor's own largest entry."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, tensor.abs().max().item())
        difference = (got[name] - tensor).abs().max().item() / scale
        assert difference < 1e-5, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_at_the_old_policy(kind: str) -> None:
    """At theta_old the surrogate's gradient is REINFORCE's: -sum w A grad log pi, one sequence at a time."""
    rows = random_rows()
    assert_same(gradients(kind, rows), reference_gradients(tiny_model(kind), rows, TEMPERATURE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_budget", [24, 40, 77])
def test_micro_batch_size(kind: str, token_budget: int) -> None:
    rows = random_rows(groups=5, samples=4)
    assert len(pack(rows, token_budget, True)) > 1
    assert_same(gradients(kind, rows, 0.01, token_budget=token_budget), gradients(kind, rows, 0.01))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_rows(kind: str) -> None:
    rows = random_rows(groups=5, samples=4)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert_same(
        gradients(kind, shuffled, 0.01, token_budget=60), gradients(kind, rows, 0.01, token_budget=60)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_sharing(kind: str) -> None:
    rows = random_rows(groups=5, samples=4)
    assert_same(gradients(kind, rows, 0.01, share_prompts=False), gradients(kind, rows, 0.01))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [ActivationCheckpointing.full, ActivationCheckpointing.selective])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_activation_checkpointing(
    kind: str, checkpointing: ActivationCheckpointing, share_prompts: bool
) -> None:
    """What is computed again is what it was: the same gradient, bit for bit."""
    rows = random_rows(groups=3)
    plain = gradients(kind, rows, share_prompts=share_prompts)
    again = gradients(kind, rows, share_prompts=share_prompts, memory=MemoryConfig(checkpointing))
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


def test_empty_responses_change_nothing() -> None:
    rows = random_rows(groups=3)
    empty = random_rows(groups=3, samples=1, longest=0, shortest=0)
    assert_same(gradients("llama", [*empty, *rows]), gradients("llama", rows))
