"""Learning smoke test: DAPO on a bandit, end to end through selection, advantages, weights and loss."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
import torch

from rlhf.algorithms.advantages import compute_advantages
from rlhf.algorithms.aggregation import token_weights
from rlhf.algorithms.config import Aggregation, ClipConfig, DynamicSamplingConfig
from rlhf.algorithms.dynamic_sampling import Selector
from rlhf.algorithms.losses import build_loss
from tests.algorithms.toy import group, grpo, micro_batch

ANSWERS, WORDINGS, GROUPS, SAMPLES = 10, 4, 4, 8


def start_logits() -> torch.Tensor:
    """Ten answers, equally likely; each has four wordings, each next one e^1.5 times rarer."""
    return (-1.5 * torch.arange(WORDINGS).float()).repeat(ANSWERS)


def train(
    high: float, seed: int, until: float, updates: int = 16, lr: float = 2.0
) -> list[tuple[float, float]]:
    """(accuracy, entropy) before each step and at the end; answer 0 is the right one."""
    chance = torch.Generator().manual_seed(seed)
    logits = start_logits().requires_grad_()
    config = grpo(clip=ClipConfig(0.2, high, 10.0), aggregation=Aggregation.token_mean)
    loss, optimizer = build_loss(config), torch.optim.SGD([logits], lr=lr)
    selector = Selector(DynamicSamplingConfig(enabled=True, max_rounds=3), GROUPS)
    trace: list[tuple[float, float]] = []
    for step in range(60):
        logprobs = torch.log_softmax(logits.detach(), 0)
        accuracy = float(logprobs[:WORDINGS].exp().sum())
        trace.append((accuracy, float(-(logprobs.exp() * logprobs).sum())))
        if accuracy > until:
            break
        tokens, rewards, groups = rollout(selector, step, logprobs, chance)
        if not len(tokens):
            continue
        advantages = compute_advantages(config.advantage, rewards, groups)
        weights = token_weights([[True]] * len(tokens), groups.tolist(), config.aggregation).weights
        for _ in range(updates):
            inputs = micro_batch(
                torch.log_softmax(logits, 0)[tokens],
                old=logprobs[tokens],
                advantages=advantages,
                weights=torch.tensor(weights).flatten(),
            )
            optimizer.zero_grad()
            loss(inputs).loss.backward()
            optimizer.step()
    return trace


def rollout(
    selector: Selector, step: int, logprobs: torch.Tensor, chance: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample groups until enough are useful: tokens `[B]`, rewards `[B]`, groups `[B]`."""
    drawn: dict[str, list[int]] = {}
    selector.start(step)
    while selector.missing():
        offered = []
        for _ in range(selector.draws()):
            sample = torch.multinomial(logprobs.exp(), SAMPLES, replacement=True, generator=chance).tolist()
            name = f"{step}.{len(drawn)}"
            drawn[name] = sample
            right = [float(token < WORDINGS) for token in sample]
            offered.append(group(name, right, rewards=[2 * r - 1 for r in right], lengths=[1] * SAMPLES))
        selector.offer(offered)
    kept = selector.finish().groups
    tokens = torch.tensor([token for item in kept for token in drawn[item.id]], dtype=torch.long)
    rewards = torch.tensor([t.reward for item in kept for t in item.trajectories])
    return tokens, rewards, torch.arange(len(kept)).repeat_interleave(SAMPLES)


def entropy_at(trace: list[tuple[float, float]], accuracy: float) -> float:
    """Entropy when the accuracy passes a value, interpolated."""
    for (a, low), (b, high) in pairwise(trace):
        if a <= accuracy < b:
            return low + (high - low) * (accuracy - a) / (b - a)
    raise AssertionError(f"the run never passed an accuracy of {accuracy}")


@pytest.mark.parametrize("seed", range(3))
def test_dapo_learns_the_bandit(seed: int) -> None:
    trace = train(high=0.28, seed=seed, until=0.9)
    assert trace[0][0] == pytest.approx(0.1)
    assert trace[-1][0] > 0.9


def test_clip_higher_keeps_more_entropy_at_the_same_accuracy() -> None:
    """Paired over 48 seeds, where accuracy passes one half: the answer's rare wordings survive longer."""
    gains = []
    for seed in range(48):
        symmetric, higher = (entropy_at(train(high, seed, until=0.5), 0.5) for high in (0.2, 0.28))
        gains.append(higher - symmetric)
    error = statistics.stdev(gains) / len(gains) ** 0.5
    assert statistics.mean(gains) > 3 * error > 0
