"""Old log-probs left to the update where the policy has not moved are the ones a full pass gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.config import AlgorithmConfig
from rlhf.algorithms.losses import build_loss
from rlhf.batching import MiniBatches
from rlhf.config import Config
from rlhf.loop import fill_logprobs
from tests.trainer.samples import random_rows, tiny_model
from trainer.batch import Row
from trainer.config import Device, LearnerConfig, OptimizerConfig, Precision
from trainer.learner import Learner

EPS = 1e-4
"""Adam's, large enough that gradients of 1e-7 do not decide a step's sign."""


def batches(epochs: int) -> MiniBatches:
    rows = random_rows(groups=6)
    split = [rows[i : i + 6] for i in range(0, len(rows), 6)]
    return MiniBatches(batches=split * epochs, rows=rows, empty_responses=0)


def trained(built: MiniBatches, asked: list[Row]) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after the rollout, and the largest ratio of each optimizer step."""
    optimizer = OptimizerConfig(lr=1e-2, eps=EPS)
    config = LearnerConfig(dtype=Precision.float32, device=Device.cpu, optimizer=optimizer, token_budget=40)
    learner = Learner(
        config, tiny_model(), loss=build_loss(AlgorithmConfig()), temperature=1.0, total_steps=1, seed=0
    )
    for row, values in zip(asked, learner.logprobs(asked), strict=True):
        row.old_logprobs = values
    ratios = [metrics["policy/ratio_max"] for metrics in learner.update(built.batches)]
    return learner.state_dict()["weights"], ratios


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_update_is_that_of_a_pass_over_all_rows(epochs: int) -> None:
    whole, few = batches(epochs), batches(epochs)
    expected, _ = trained(whole, whole.rows)
    got, ratios = trained(few, few.moved)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert max(ratios[1:]) > 1.01


def test_a_first_mini_batch_that_is_not_asked_has_a_ratio_of_exactly_one() -> None:
    built = copy.deepcopy(batches(1))
    _, ratios = trained(built, built.moved)
    assert ratios[0] == 1.0


class Lesson:
    """What filling in log-probs needs of a run with a KL term in its loss."""

    def __init__(self) -> None:
        self.config = Config()
        self.config.algorithm.kl.coefficient = 0.1
        learner = LearnerConfig(dtype=Precision.float32, device=Device.cpu)
        loss = build_loss(self.config.algorithm)
        self.learner = Learner(
            learner, tiny_model(), loss=loss, temperature=1.0, total_steps=1, seed=0, needs_reference=True
        )


def test_the_reference_is_asked_about_all_rows_where_only_some_have_old_logprobs() -> None:
    built = batches(1)
    fill_logprobs(Lesson(), built)  # type: ignore[arg-type]
    assert [row.old_logprobs is None for row in built.rows] == [True] * 6 + [False] * (len(built.rows) - 6)
    for row in built.moved:  # nothing has moved yet, so the reference is the policy
        assert row.reference_logprobs == pytest.approx(row.old_logprobs, abs=1e-5)
