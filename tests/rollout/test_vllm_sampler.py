"""The engine's sampler: exact inversion on hand-made tables, the right distribution on random ones."""

from __future__ import annotations

import pytest
import torch

from rollout.vllm_sampler import BLOCK, draw, uniforms


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_it_inverts_the_cumulative_sum() -> None:
    """0.25, 0, 0.5, 0.25: cut points 0.25 and 0.75; the token of probability 0 is never drawn."""
    table = torch.tensor([0.25, 0.0, 0.5, 0.25]).repeat(6, 1)
    tokens, logprobs = draw(table, column(0.0, 0.249, 0.25, 0.749, 0.75, 1 - 2**-53))
    assert tokens[:, 0].tolist() == [0, 0, 2, 2, 3, 3]
    assert logprobs[:, 0].exp() == pytest.approx(torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]), abs=1e-12)


def test_it_inverts_across_blocks() -> None:
    """Only three tokens of 1000 have mass, in the first, a middle and the last (partial) block."""
    table = torch.zeros(4, 1000)
    table[:, [5, 3 * BLOCK + 7, 999]] = torch.tensor([0.5, 0.3, 0.2])
    tokens, _ = draw(table, column(0.1, 0.51, 0.79, 0.81))
    assert tokens[:, 0].tolist() == [5, 3 * BLOCK + 7, 3 * BLOCK + 7, 999]


def test_even_uniforms_give_every_token_its_share() -> None:
    """With n evenly spaced uniforms each token comes n * p times, give or take one."""
    n = 20_000
    probabilities = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2).softmax(-1)
    grid = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    tokens, logprobs = draw(probabilities.expand(n, -1), grid)
    counts = torch.bincount(tokens[:, 0], minlength=300)
    assert (counts - n * probabilities.double()).abs().max() <= 1.01
    assert logprobs == pytest.approx(probabilities[tokens].log().double(), abs=1e-6)


def test_logprobs_are_those_of_log_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 49_152, generator=generator) * 5
    tokens, logprobs = draw(logits.softmax(-1), torch.rand(64, 1, generator=generator, dtype=torch.float64))
    assert logprobs == pytest.approx(logits.double().log_softmax(-1).gather(1, tokens), abs=2e-6)


def test_broken_weights_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.tensor([[float("nan"), 0.5]]), column(0.5))


def test_a_request_draws_from_its_own_generator() -> None:
    generators = {1: torch.Generator().manual_seed(7), 3: torch.Generator().manual_seed(8)}
    first = uniforms(4, generators)
    again = uniforms(9, {0: torch.Generator().manual_seed(7), 8: torch.Generator().manual_seed(8)})
    assert first[1] == again[0]
    assert first[3] == again[8]
    assert ((first >= 0) & (first < 1)).all()
