"""Optimizers by name: closed forms of the first step, decay on matrices only, state that goes round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.config import OptimizerConfig, OptimizerName
from trainer.optimizers import OptimizerSet, build_optimizer

LR = 0.01


def parameters(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(seed)
    return [
        ("model.embed_tokens.weight", nn.Parameter(torch.randn(6, 4))),
        ("model.layers.0.mlp.up_proj.weight", nn.Parameter(torch.randn(8, 4))),
        ("model.norm.weight", nn.Parameter(torch.randn(4))),
    ]


def give_gradients(named: list[tuple[str, nn.Parameter]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def first_update(
    name: OptimizerName, weight_decay: float = 0.0
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Weights before, gradients and change of each parameter in one step."""
    named = parameters()
    before = [p.detach().clone() for _, p in named]
    give_gradients(named, 1)
    gradients = [p.grad.clone() for _, p in named if p.grad is not None]
    build_optimizer(OptimizerConfig(name=name, lr=LR, weight_decay=weight_decay), named).step()
    return before, gradients, [p.detach() - b for (_, p), b in zip(named, before)]


@pytest.mark.parametrize("name", [OptimizerName.adamw, OptimizerName.lion])
def test_first_step_is_the_sign_of_the_gradient(name: OptimizerName) -> None:
    _, gradients, change = first_update(name)
    for grad, moved in zip(gradients, change):
        torch.testing.assert_close(moved, -LR * grad.sign(), atol=1e-6, rtol=1e-4)


def test_sgd_follows_the_gradient_with_momentum() -> None:
    named = parameters()
    before = named[1][1].detach().clone()
    optimizer = build_optimizer(OptimizerConfig(name=OptimizerName.sgd, lr=LR, betas=[0.5, 0.0]), named)
    total = torch.zeros_like(before)
    momentum = torch.zeros_like(before)
    for seed in range(3):
        give_gradients(named, seed)
        grad = named[1][1].grad
        assert grad is not None
        momentum = 0.5 * momentum + grad
        total -= LR * momentum
        optimizer.step()
    torch.testing.assert_close(named[1][1].detach(), before + total)


def test_sgd_decays_apart_from_its_momentum() -> None:
    """Two steps by hand: `w <- (1 - lr * decay) * w - lr * m`, and `m` holds gradients only."""
    named = parameters()
    config = OptimizerConfig(name=OptimizerName.sgd, lr=LR, betas=[0.5, 0.0], weight_decay=0.8)
    optimizer = build_optimizer(config, named)
    expected = [parameter.detach().clone() for _, parameter in named]
    momenta = [torch.zeros_like(weight) for weight in expected]
    for seed, rate in enumerate((LR, 3 * LR)):
        give_gradients(named, seed)
        for index, (_, parameter) in enumerate(named):
            assert parameter.grad is not None
            momenta[index] = 0.5 * momenta[index] + parameter.grad
            kept = 1 - rate * 0.8 if parameter.ndim == 2 else 1.0
            expected[index] = kept * expected[index] - rate * momenta[index]
        optimizer.set_lr(rate)
        optimizer.step()
    for (_, parameter), weight in zip(named, expected):
        torch.testing.assert_close(parameter.detach(), weight, atol=1e-6, rtol=1e-6)


def test_muon_makes_hidden_matrices_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    _, gradients, change = first_update(OptimizerName.muon)
    for index in (0, 2):
        torch.testing.assert_close(change[index], -LR * gradients[index].sign(), atol=1e-6, rtol=1e-4)
    singular = torch.linalg.svdvals(change[1] / (LR * 0.2 * 8**0.5))
    assert ((singular > 0.6) & (singular < 1.3)).all()


@pytest.mark.parametrize("name", [n for n in OptimizerName if n is not OptimizerName.adafactor])
def test_decay_shrinks_matrices_only(name: OptimizerName) -> None:
    before, _, plain = first_update(name)
    _, _, decayed = first_update(name, weight_decay=0.5)
    difference = [d - p for d, p in zip(decayed, plain)]
    for index in (0, 1):
        torch.testing.assert_close(difference[index], -LR * 0.5 * before[index], atol=2e-5, rtol=0)
    assert torch.equal(decayed[2], plain[2])


@pytest.mark.parametrize("name", list(OptimizerName))
def test_state_goes_round(name: OptimizerName) -> None:
    def run(optimizer: OptimizerSet, named: list[tuple[str, nn.Parameter]], seeds: range) -> None:
        for seed in seeds:
            give_gradients(named, seed)
            optimizer.step()

    config = OptimizerConfig(name=name, lr=LR, weight_decay=0.1)
    whole, half = parameters(), parameters()
    run(build_optimizer(config, whole), whole, range(4))
    first = build_optimizer(config, half)
    run(first, half, range(2))
    resumed = [(n, nn.Parameter(p.detach().clone())) for n, p in half]
    second = build_optimizer(config, resumed)
    second.load_state_dict(first.state_dict())
    run(second, resumed, range(2, 4))
    for (_, mine), (_, theirs) in zip(resumed, whole):
        assert torch.equal(mine, theirs)


def test_rate_reaches_every_group() -> None:
    named = parameters()
    before = [p.detach().clone() for _, p in named]
    optimizer = build_optimizer(OptimizerConfig(name=OptimizerName.muon, lr=1.0), named)
    optimizer.set_lr(0.0)
    give_gradients(named, 0)
    optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(named, before))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Nothing is left to train"):
        build_optimizer(OptimizerConfig(), [])
