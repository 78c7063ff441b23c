"""The policy loss: one function of plain tensors, put together from the switches of `AlgorithmConfig`.

    loss = sum over tokens of  w * (rho * policy + kl.coefficient * kl - entropy_coefficient * entropy)

`w` are the aggregation weights (global denominators, so any split of a mini-batch gives the same
gradient), `rho` the correction weights, without gradient. `policy` is one of

    clipped   max(-r A, -clip(r, 1 - low, 1 + high) A); where A < 0 and dual > 0: at most -dual A
    cispo     -sg[clip(r, 1 - low, 1 + high)] A log pi

with `r = exp(log pi - log pi_old)` of the token, or GSPO's geometric mean over the response.
Tokens of weight zero are taken out first: they get no gradient and enter no metric.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rlhf.algorithms import kl
from rlhf.algorithms.aggregation import row_mean
from rlhf.algorithms.config import AlgorithmConfig, ClipConfig, KlPlace, Objective, Ratio
from rlhf.algorithms.correction import correction_weights
from trainer.loss import Loss, LossInputs, LossOutput

LIMIT = kl.LOG_RATIO_LIMIT


def build_loss(config: AlgorithmConfig) -> Loss:
    """The loss that the switches describe; picklable, so that it can be sent to other ranks."""
    return PolicyLoss(config)


@dataclass(frozen=True)
class PolicyLoss:
    """A `Loss`. Raises ValueError when a KL term finds no reference log-probs."""

    config: AlgorithmConfig

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss differentiates through the entropy."""
        return self.config.entropy_coefficient != 0

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Weighted sum of the token losses of one micro-batch, with the metrics of its tokens."""
        config = self.config
        tokens = _learned_tokens(inputs)
        log_ratio = (tokens.logprobs - tokens.old_logprobs).clamp(-LIMIT, LIMIT)
        ratio = _ratio(config.ratio, log_ratio, tokens).exp()
        if config.objective is Objective.cispo:
            policy = cispo_loss(ratio, tokens.logprobs, tokens.advantages, config.clip)
        else:
            policy = clipped_loss(ratio, tokens.advantages, config.clip)
        gap = (tokens.old_logprobs - tokens.rollout_logprobs).detach()
        weights, bounded = correction_weights(config.correction, gap, tokens.row_ids, tokens.rows)
        loss = policy * weights - config.entropy_coefficient * tokens.entropy
        if config.kl.coefficient and config.kl.place is KlPlace.loss:
            loss = loss + config.kl.coefficient * _reference_kl(config, tokens)
        meter = _Meter()
        with torch.no_grad():
            _policy_metrics(meter, config, tokens, ratio)
            _mismatch_metrics(meter, tokens, gap, weights, bounded)
        total = (loss * tokens.token_weights).sum()
        return LossOutput(loss=total, sums=meter.sums, counts=meter.counts, maxima=meter.maxima)


def clipped_loss(ratio: torch.Tensor, advantages: torch.Tensor, clip: ClipConfig) -> torch.Tensor:
    """PPO's pessimistic token loss with separate bounds and dual clip (1912.09729), `[M]`.

    Gradient by the log-prob (c = dual), zero wherever moving further is no longer rewarded:

                    r < 1 - low    inside    1 + high < r < c    r > c
        A > 0          -r A         -r A            0              0
        A < 0            0          -r A          -r A             0
    """
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    loss = torch.maximum(-ratio * advantages, -bounded * advantages)
    if clip.dual:
        loss = torch.where(advantages < 0, torch.minimum(loss, -clip.dual * advantages), loss)
    return loss


def cispo_loss(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, clip: ClipConfig
) -> torch.Tensor:
    """CISPO's token loss, `[M]`: REINFORCE with a clipped importance weight that carries no gradient.

    Bounds are distances from 1, as in verl: `1 + high` is the largest weight (TRL's `epsilon_high` is
    that weight itself, so its 5.0 is `high=4` here), and `low >= 1` means no lower bound.
    """
    return -ratio.detach().clamp(1 - clip.low, 1 + clip.high) * advantages * logprobs


def _learned_tokens(inputs: LossInputs) -> LossInputs:
    """The same micro-batch without the tokens of weight zero, so that nothing leaks from them (0 * NaN)."""
    keep = inputs.token_weights != 0
    reference = inputs.reference_logprobs
    return replace(
        inputs,
        logprobs=inputs.logprobs[keep],
        entropy=inputs.entropy[keep],
        old_logprobs=inputs.old_logprobs[keep],
        rollout_logprobs=inputs.rollout_logprobs[keep],
        advantages=inputs.advantages[keep],
        token_weights=inputs.token_weights[keep],
        row_ids=inputs.row_ids[keep],
        reference_logprobs=None if reference is None else reference[keep],
    )


def _ratio(kind: Ratio, log_ratio: torch.Tensor, tokens: LossInputs) -> torch.Tensor:
    """Log of the importance ratio of each token, `[M]`.

    For GSPO the value is the response's mean log-ratio, and the gradient reaches each token through its
    own log-prob: `sg[s] * pi / sg[pi]`. Micro-batches hold whole responses, so the mean is exact.
    """
    if kind is Ratio.token:
        return log_ratio
    mean = row_mean(log_ratio.detach(), tokens.row_ids, tokens.rows)[tokens.row_ids]
    return mean + (tokens.logprobs - tokens.logprobs.detach())


def _reference_kl(config: AlgorithmConfig, tokens: LossInputs) -> torch.Tensor:
    if tokens.reference_logprobs is None:
        raise ValueError(
            f"algorithm.kl.coefficient={config.kl.coefficient:g} needs reference log-probs, and the rows "
            "have none."
        )
    return kl.estimate(tokens.logprobs, tokens.reference_logprobs, config.kl.estimator)


class _Meter:
    """Collects sums with their counts, and maxima."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, torch.Tensor] = {}

    def mean(self, name: str, values: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """A mean over tokens, or over those of them that `where` selects."""
        chosen = values if where is None else values[where]
        self.sums[name] = chosen.detach().float().sum()
        self.counts[name] = torch.tensor(float(chosen.numel()), device=values.device)

    def maximum(self, name: str, values: torch.Tensor) -> None:
        """A maximum over tokens; absent when there are none."""
        if values.numel():
            self.maxima[name] = values.detach().float().max()


def _policy_metrics(
    meter: _Meter,
    config: AlgorithmConfig,
    tokens: LossInputs,
    ratio: torch.Tensor,
) -> None:
    """What the update does: ratio, where the clip binds, distance moved, entropy."""
    low, high, dual = clipped_tokens(config, ratio, tokens.advantages)
    probability = tokens.logprobs.exp()
    moved = (tokens.logprobs - tokens.old_logprobs).clamp(-LIMIT, LIMIT)
    meter.mean("policy/ratio", ratio)
    meter.maximum("policy/ratio_max", ratio)
    meter.mean("policy/clip_low", low)
    meter.mean("policy/clip_high", high)
    meter.mean("policy/clip_spared", spared_tokens(config, ratio, tokens.advantages))
    meter.mean("policy/clip_dual", dual)
    meter.mean("policy/up_clipped_prob", probability, where=high)
    meter.mean("policy/kl_old_k1", -moved)
    meter.mean("policy/kl_old_k3", moved.exp() - moved - 1)
    meter.mean("policy/entropy", tokens.entropy)
    meter.mean("policy/token_prob", probability)
    if tokens.reference_logprobs is not None:
        reference = kl.estimate(tokens.logprobs, tokens.reference_logprobs, config.kl.estimator)
        meter.mean("policy/kl_reference", reference)


def clipped_tokens(
    config: AlgorithmConfig, ratio: torch.Tensor, advantages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the lower, upper and dual bound take effect, three `[M]` bool.

    The clipped objective binds only where it stops the gradient; CISPO's clip binds for either sign.
    """
    low, high = ratio < 1 - config.clip.low, ratio > 1 + config.clip.high
    if config.objective is Objective.cispo:
        return low, high, torch.zeros_like(low)
    negative = advantages < 0
    dual = negative & (ratio > config.clip.dual) if config.clip.dual else torch.zeros_like(low)
    return low & negative, high & (advantages > 0), dual


def spared_tokens(config: AlgorithmConfig, ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Where clip-higher acts, `[M]` bool: the ratio lies above `1 + low` and not above `1 + high`, and the
    clip would bind. Nowhere when the bounds are symmetric."""
    between = (ratio > 1 + config.clip.low) & (ratio <= 1 + config.clip.high)
    return between if config.objective is Objective.cispo else between & (advantages > 0)


def _mismatch_metrics(
    meter: _Meter,
    tokens: LossInputs,
    gap: torch.Tensor,
    weights: torch.Tensor,
    bounded: torch.Tensor,
) -> None:
    """How far the old policy (learner) lies from the rollout policy (engine), and what corrects for it.

    With `old_logprobs=rollout` the two are the same by definition and the mismatch shows in policy/ratio.
    """
    probabilities = (tokens.old_logprobs.exp() - tokens.rollout_logprobs.exp()).abs()
    safe = gap.clamp(-LIMIT, LIMIT)
    meter.mean("mismatch/logprob_gap", gap.abs())
    meter.maximum("mismatch/logprob_gap_max", gap.abs())
    meter.mean("mismatch/prob_gap", probabilities)
    meter.maximum("mismatch/prob_gap_max", probabilities)
    meter.mean("mismatch/kl", safe.exp() - safe - 1)
    meter.mean("mismatch/weight", weights)
    meter.mean("mismatch/weight_square", weights.square())
    meter.mean("mismatch/weight_bounded", bounded)


def add_derived(metrics: dict[str, float]) -> None:
    """Add what only the mini-batch's means give: the effective sample size of the correction weights.

    `mismatch/ess = mean(w)^2 / mean(w^2)`, the share of tokens that equal weights would need for the same
    variance: 1 when all weights are equal. Absent without weights, zero when every weight is zero.
    """
    if "mismatch/weight" not in metrics:
        return
    square = metrics["mismatch/weight_square"]
    metrics["mismatch/ess"] = metrics["mismatch/weight"] ** 2 / square if square else 0.0
