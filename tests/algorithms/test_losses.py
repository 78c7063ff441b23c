"""The loss: GRPO and REINFORCE limits, the gradient table, GSPO, CISPO, KL, entropy, metrics."""

from __future__ import annotations

import math
import pickle
import statistics

import pytest
import torch

from rlhf.algorithms.advantages import compute_advantages
from rlhf.algorithms.aggregation import token_weights
from rlhf.algorithms.config import (
    Aggregation,
    AlgorithmConfig,
    ClipConfig,
    CorrectionConfig,
    KlConfig,
    KlEstimator,
    KlPlace,
    Objective,
    Ratio,
)
from rlhf.algorithms.losses import add_derived, build_loss
from tests.algorithms.toy import Bigram, grpo, micro_batch
from trainer.loss import LossInputs

LENGTHS = [3, 1, 7, 4, 2, 9, 5, 5]
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 3.0, 0.5]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]


def perturbed(policy: Bigram, responses: list[list[int]], size: float = 0.4) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(9)
    return [
        policy.logprobs(r).detach() + size * torch.randn(len(r), generator=noise, dtype=torch.float64)
        for r in responses
    ]


def whole_batch(
    config: AlgorithmConfig,
    policy: Bigram,
    responses: list[list[int]],
    old: list[torch.Tensor],
    rollout: list[torch.Tensor] | None = None,
) -> LossInputs:
    """What batching and learner would hand to the loss for all responses at once."""
    sizes = torch.tensor([len(r) for r in responses])
    advantages = compute_advantages(config.advantage, torch.tensor(REWARDS), torch.tensor(GROUPS)).double()
    weights = token_weights([[True] * len(r) for r in responses], GROUPS, config.aggregation, 10).weights
    return micro_batch(
        torch.cat([policy.logprobs(r) for r in responses]),
        old=torch.cat(old),
        rollout=None if rollout is None else torch.cat(rollout),
        advantages=advantages.repeat_interleave(sizes),
        weights=torch.tensor([w for row in weights for w in row], dtype=torch.float64),
        row_ids=torch.arange(len(sizes)).repeat_interleave(sizes),
    )


def independent_grpo(
    policy: Bigram, responses: list[list[int]], old: list[torch.Tensor], eps: float
) -> torch.Tensor:
    """GRPO written down from its paper (2402.03300, eq. 3 without KL), token by token."""
    objective = torch.zeros((), dtype=torch.float64)
    for name in (0, 1):
        members = [i for i, g in enumerate(GROUPS) if g == name]
        mean = statistics.mean(REWARDS[i] for i in members)
        std = statistics.stdev(REWARDS[i] for i in members)
        group_objective = torch.zeros((), dtype=torch.float64)
        for i in members:
            advantage = (REWARDS[i] - mean) / (std + 1e-6)
            tokens = torch.zeros((), dtype=torch.float64)
            for now, before in zip(policy.logprobs(responses[i]), old[i]):
                ratio = torch.exp(now) / math.exp(before)
                bounded = min(max(float(ratio.detach()), 1 - eps), 1 + eps)
                plain, limited = ratio * advantage, bounded * advantage
                tokens = tokens + (plain if float(plain.detach()) <= limited else torch.tensor(limited))
            group_objective = group_objective + tokens / len(responses[i])
        objective = objective + group_objective / len(members)
    return -objective / 2


def test_all_switches_off_is_grpo() -> None:
    policy = Bigram()
    responses = policy.rows(LENGTHS)
    old = perturbed(policy, responses)
    got = build_loss(grpo())(whole_batch(grpo(), policy, responses, old))
    assert float(got.sums["policy/clip_high"]) > 0
    assert float(got.sums["policy/clip_low"]) > 0
    got.loss.backward()
    gradient = policy.gradient()
    expected = independent_grpo(policy, responses, old, eps=0.2)
    expected.backward()
    assert float(got.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert torch.allclose(gradient, policy.gradient(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [ClipConfig(0.2, 0.28, 10.0), ClipConfig(0.0, 0.0), ClipConfig(0.5, 3.0)])
@pytest.mark.parametrize("objective", list(Objective))
def test_on_policy_gradient_is_reinforce(clip: ClipConfig, objective: Objective) -> None:
    """At the old policy: minus the mean over all tokens of `A grad log pi`, for any bounds."""
    policy = Bigram()
    responses = policy.rows(LENGTHS)
    config = grpo(clip=clip, objective=objective, aggregation=Aggregation.token_mean)
    inputs = whole_batch(config, policy, responses, perturbed(policy, responses, 0.0))
    build_loss(config)(inputs).loss.backward()
    gradient = policy.gradient()
    (
        -(inputs.advantages * torch.cat([policy.logprobs(r) for r in responses])).sum() / sum(LENGTHS)
    ).backward()
    assert torch.allclose(gradient, policy.gradient(), atol=1e-12)


RATIOS = [0.5, 0.81, 1.0, 1.27, 1.29, 5.0, 9.9, 10.1]
MOVES = {1.0: [1, 1, 1, 1, 0, 0, 0, 0], -1.0: [0, 1, 1, 1, 1, 1, 1, 0]}


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("index", range(len(RATIOS)))
def test_gradient_table_by_finite_differences(index: int, advantage: float) -> None:
    """DAPO's bounds with dual clip 10: the gradient is `-r A` where the table says so, else zero."""
    ratio, step = RATIOS[index], 1e-6
    loss = build_loss(grpo(clip=ClipConfig(low=0.2, high=0.28, dual=10.0)))
    old = torch.tensor([-3.0], dtype=torch.float64)
    at = old + math.log(ratio)

    def value(logprobs: torch.Tensor) -> torch.Tensor:
        return loss(micro_batch(logprobs, old=old, advantages=advantage)).loss

    logprobs = at.clone().requires_grad_()
    value(logprobs).backward()
    assert logprobs.grad is not None
    expected = -ratio * advantage * MOVES[advantage][index]
    assert float(logprobs.grad) == pytest.approx(expected, abs=1e-12)
    assert float(value(at + step) - value(at - step)) / (2 * step) == pytest.approx(expected, abs=1e-5)


def test_without_dual_clip_the_gradient_grows_with_the_ratio() -> None:
    old = torch.tensor([-9.0], dtype=torch.float64)
    logprobs = (old + math.log(1000.0)).requires_grad_()
    build_loss(grpo())(micro_batch(logprobs, old=old, advantages=-1.0)).loss.backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad) == pytest.approx(1000.0)


def test_log_ratio_is_clamped() -> None:
    old = torch.tensor([-100.0, 0.0])
    out = build_loss(grpo())(micro_batch(torch.tensor([0.0, -100.0]), old=old, advantages=-1.0))
    assert math.isfinite(float(out.loss))
    assert float(out.maxima["policy/ratio_max"]) == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize("clip", [ClipConfig(0.2, 0.28, 10.0), ClipConfig(0.003, 0.004)])
def test_gspo_is_grpo_for_one_token_responses(clip: ClipConfig) -> None:
    logprobs = torch.tensor([-1.0, -0.3, -2.0, -0.9], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() + torch.tensor([0.4, -0.4, 0.01, -5.0])
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)
    results = []
    for ratio in Ratio:
        out = build_loss(grpo(ratio=ratio, clip=clip))(micro_batch(logprobs, old=old, advantages=advantages))
        results.append((float(out.loss.detach()), torch.autograd.grad(out.loss, logprobs)[0]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12)


def test_gspo_without_clipping() -> None:
    """The gradient is `-1/|B| sum_i s_i A_i 1/|o_i| sum_t grad log pi`."""
    policy = Bigram()
    responses = policy.rows(LENGTHS)
    old = perturbed(policy, responses)
    config = grpo(ratio=Ratio.sequence, clip=ClipConfig(low=1.0, high=1e9))
    inputs = whole_batch(config, policy, responses, old)
    build_loss(config)(inputs).loss.backward()
    gradient = policy.gradient()
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    total = torch.zeros((), dtype=torch.float64)
    for i, response in enumerate(responses):
        now = policy.logprobs(response)
        s = math.exp(float((now.detach() - old[i]).mean()))
        total = total - s * float(inputs.advantages[starts[i]]) * now.mean() / len(responses)
    total.backward()
    assert torch.allclose(gradient, policy.gradient(), atol=1e-12)


def test_gspo_ratio_leaves_masked_tokens_out() -> None:
    """A tool's token (weight 0) in the middle of a response is not part of its mean ratio."""
    logprobs, old = torch.tensor([-1.0, -7.0, -2.0]), torch.tensor([-1.1, -1.0, -2.3])
    weights, rows = torch.tensor([0.5, 0.0, 0.5]), torch.zeros(3, dtype=torch.long)
    out = build_loss(grpo(ratio=Ratio.sequence))(
        micro_batch(logprobs, old=old, weights=weights, row_ids=rows)
    )
    assert float(out.maxima["policy/ratio_max"]) == pytest.approx(math.exp(0.2), rel=1e-6)


def test_cispo_never_loses_a_gradient() -> None:
    """Every token's gradient is `-clip(r) A`: bounded, but never zero."""
    old = torch.full((len(RATIOS),), -3.0, dtype=torch.float64)
    for advantage in (1.0, -1.0):
        logprobs = (old + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
        config = grpo(objective=Objective.cispo, clip=ClipConfig(low=0.2, high=0.28))
        build_loss(config)(micro_batch(logprobs, old=old, advantages=advantage)).loss.backward()
        assert logprobs.grad is not None
        bounded = [min(max(r, 0.8), 1.28) for r in RATIOS]
        assert (logprobs.grad * len(RATIOS)).tolist() == pytest.approx([-b * advantage for b in bounded])


def test_cispo_without_bounds_is_importance_weighted_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -0.3, -2.0], dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() + torch.tensor([1.0, -2.0, 0.1])
    config = grpo(objective=Objective.cispo, clip=ClipConfig(low=10.0, high=math.inf))
    build_loss(config)(micro_batch(logprobs, old=old, advantages=-1.5)).loss.backward()
    expected = 1.5 * (logprobs.detach() - old).exp() / 3
    assert torch.allclose(logprobs.grad, expected, atol=1e-12)  # type: ignore[arg-type]


def test_clip_higher_lets_a_rare_token_grow_further() -> None:
    """The paper's example: ascending a token of probability 0.01 ends at 0.012; with 0.28 at 0.0128."""
    reached = []
    for high in (0.2, 0.28):
        logits = torch.tensor([math.log(0.01), math.log(0.99)], dtype=torch.float64, requires_grad=True)
        old = torch.log_softmax(logits, 0)[:1].detach()
        for _ in range(400):
            out = build_loss(grpo(clip=ClipConfig(0.2, high)))(
                micro_batch(torch.log_softmax(logits, 0)[:1], old=old)
            )
            (gradient,) = torch.autograd.grad(out.loss, logits)
            with torch.no_grad():
                logits -= 0.001 * gradient
        reached.append(float(torch.softmax(logits, 0)[0].detach()))
    assert reached == pytest.approx([0.012, 0.0128], rel=5e-3)


@pytest.mark.parametrize(
    ("estimator", "slope"), [("k1", 1.0), ("k2", 0.5), ("k3", 1 - math.exp(-0.5))], ids=["k1", "k2", "k3"]
)
def test_kl_in_the_loss(estimator: str, slope: float) -> None:
    """One token with `d = 0.5`: the gradient adds coefficient * dk/dd to that of the policy term."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    config = grpo(kl=KlConfig(coefficient=0.1, estimator=KlEstimator(estimator)))
    build_loss(config)(micro_batch(logprobs, reference=logprobs.detach() - 0.5)).loss.backward()
    assert float(logprobs.grad) == pytest.approx(-1.0 + 0.1 * slope)  # type: ignore[arg-type]


def test_kl_in_the_reward_leaves_the_loss_alone_and_a_missing_reference_is_an_error() -> None:
    inputs = micro_batch(torch.tensor([-1.0]))
    in_reward = grpo(kl=KlConfig(coefficient=0.1, place=KlPlace.reward))
    assert float(build_loss(in_reward)(inputs).loss) == -1.0
    with pytest.raises(ValueError, match="needs reference log-probs"):
        build_loss(grpo(kl=KlConfig(coefficient=0.1)))(inputs)


def test_entropy_bonus() -> None:
    """A coefficient of 0.01 on two tokens of entropy 2 and 4 takes 0.03 off the loss; its gradient flows."""
    entropy = torch.tensor([2.0, 4.0], requires_grad=True)
    loss = build_loss(grpo(entropy_coefficient=0.01))
    assert loss.needs_entropy_gradient  # type: ignore[attr-defined]
    assert not build_loss(grpo()).needs_entropy_gradient  # type: ignore[attr-defined]
    out = loss(micro_batch(torch.tensor([-1.0, -2.0]), advantages=0.0, entropy=entropy))
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(-0.03)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.005, -0.005])


def test_masked_tokens_never_leak() -> None:
    """A masked token may be NaN: neither loss, gradient nor metrics see it."""
    logprobs = torch.tensor([-1.0, math.nan, -2.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 0.5])
    out = build_loss(AlgorithmConfig())(micro_batch(logprobs, weights=weights))
    out.loss.backward()
    assert float(out.loss.detach()) == -1.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-0.5, 0.0, -0.5]
    assert float(out.counts["policy/entropy"]) == 2.0
    assert all(math.isfinite(float(value)) for value in out.sums.values())


def test_fully_masked_micro_batch_has_a_zero_loss_with_a_graph() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    out = build_loss(AlgorithmConfig(ratio=Ratio.sequence))(micro_batch(logprobs, weights=torch.zeros(2)))
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 0.0]
    assert all(float(count) == 0.0 for count in out.counts.values())
    assert out.maxima == {}


def test_metrics() -> None:
    """Six tokens: clipped low, clipped high (twice), dual, spared by clip-higher, and inside the bounds."""
    ratios = torch.tensor([0.5, 1.5, 2.0, 11.0, 1.25, 1.1])
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    logprobs = torch.tensor([0.3, 0.2, 0.1, 0.9, 0.6, 0.5]).log()
    old = logprobs - ratios.log()
    rollout = old - 0.1
    config = AlgorithmConfig(clip=ClipConfig(0.2, 0.28, 10.0))
    inputs = micro_batch(
        logprobs, old=old, rollout=rollout, advantages=advantages, entropy=torch.full((6,), 0.7)
    )
    out = build_loss(config)(inputs)
    means = {name: float(out.sums[name] / out.counts[name]) for name in out.sums}
    expected = {
        "policy/clip_low": 1 / 6,
        "policy/clip_high": 2 / 6,
        "policy/clip_spared": 1 / 6,
        "policy/clip_dual": 1 / 6,
        "policy/up_clipped_prob": 0.15,
        "policy/ratio": float(ratios.mean()),
        "policy/kl_old_k1": float(-ratios.log().mean()),
        "policy/kl_old_k3": float((ratios - 1 - ratios.log()).mean()),
        "policy/entropy": 0.7,
        "policy/token_prob": 2.6 / 6,
        "mismatch/logprob_gap": 0.1,
        "mismatch/kl": math.exp(0.1) - 1 - 0.1,
        "mismatch/weight": math.exp(0.1),
        "mismatch/weight_bounded": 0.0,
    }
    assert {name: means[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert set(out.sums) == set(out.counts)
    assert float(out.maxima["policy/ratio_max"]) == pytest.approx(11.0)
    assert float(out.maxima["mismatch/logprob_gap_max"]) == pytest.approx(0.1, rel=1e-5)


def test_a_nonfinite_token_reaches_the_learner() -> None:
    out = build_loss(grpo())(micro_batch(torch.tensor([-1.0, math.nan, -1.0, -2.0])))
    assert math.isnan(float(out.loss)), "the learner stops the run"


def test_effective_sample_size() -> None:
    metrics = {"mismatch/weight": 1.5, "mismatch/weight_square": (1.0 + 4.0) / 2}
    add_derived(metrics)
    assert metrics["mismatch/ess"] == pytest.approx(3**2 / (2 * 5))
    nothing = {"mismatch/weight": 0.0, "mismatch/weight_square": 0.0}
    add_derived(nothing)
    assert nothing["mismatch/ess"] == 0.0


def test_loss_travels_to_other_processes() -> None:
    config = AlgorithmConfig(correction=CorrectionConfig(high=3.0))
    inputs = micro_batch(torch.tensor([-1.0, -2.0]), rollout=torch.tensor([-3.0, -2.1]))
    copy = pickle.loads(pickle.dumps(build_loss(config)))
    assert float(copy(inputs).loss) == float(build_loss(config)(inputs).loss)
