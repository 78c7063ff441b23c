"""The algorithm's switches. The defaults are plain GRPO; each departure from it is one key.

Every switch is written out, with its equation, in `docs/dapo.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Estimator(StrEnum):
    """How rewards become advantages (`rlhf.algorithms.advantages`)."""

    group_mean_std = "group_mean_std"
    """GRPO: minus the group's mean, over the group's standard deviation."""
    group_mean = "group_mean"
    """Dr. GRPO (2503.20783): minus the group's mean, no division."""
    rloo = "rloo"
    """RLOO (2402.14740): minus the mean of the *other* responses of the group."""
    reinforce_plus_plus = "reinforce_plus_plus"
    """REINFORCE++ (2501.03262): mean and standard deviation of the whole batch."""
    reinforce_plus_plus_baseline = "reinforce_plus_plus_baseline"
    """The same with the group's mean taken off first."""


class Objective(StrEnum):
    """What bounds the update."""

    clipped = "clipped"
    """PPO's pessimistic minimum (1707.06347), as in GRPO and DAPO."""
    cispo = "cispo"
    """Clipped importance weight on REINFORCE (2506.13585): no token loses its gradient."""


class Ratio(StrEnum):
    """What the importance ratio is taken of."""

    token = "token"
    """One ratio a token."""
    sequence = "sequence"
    """GSPO (2507.18071): the geometric mean over a response's tokens."""


class Aggregation(StrEnum):
    """How token losses become one number (`rlhf.algorithms.aggregation`)."""

    token_mean = "token_mean"
    """Every token of the mini-batch counts the same: DAPO's script."""
    token_mean_group = "token_mean_group"
    """A token mean in each group, then the mean of groups: DAPO's paper, read literally."""
    seq_mean_token_mean = "seq_mean_token_mean"
    """A token mean in each response, then the mean of responses: GRPO, GSPO."""
    seq_mean_token_sum = "seq_mean_token_sum"
    """A token sum in each response, then the mean of responses."""
    seq_mean_token_sum_norm = "seq_mean_token_sum_norm"
    """The same over the constant response limit: Dr. GRPO."""


class KlEstimator(StrEnum):
    """How the distance to the reference is estimated from one sample (`rlhf.algorithms.kl`)."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KlPlace(StrEnum):
    """Where the KL term enters."""

    loss = "loss"
    """Added to every token's loss."""
    reward = "reward"
    """Subtracted from the response's reward, before advantages."""


class OldLogprobs(StrEnum):
    """Whose log-probs are the denominator of the ratio."""

    current = "current"
    """The learner's own at the update, detached: no extra pass. One optimizer step a rollout."""
    recompute = "recompute"
    """The learner's own before the first update of the rollout: one forward pass."""
    rollout = "rollout"
    """The engine's: no extra pass; the ratio then holds the mismatch, so no correction on top."""


class CorrectionLevel(StrEnum):
    """Over what the mismatch between learner and engine is taken (`rlhf.algorithms.correction`)."""

    off = "off"
    token = "token"
    sequence = "sequence"
    geometric = "geometric"


class CorrectionMode(StrEnum):
    """What happens to a mismatch weight out of bounds."""

    truncate = "truncate"
    """`min(weight, high)`."""
    clip = "clip"
    """Into `[low, high]`."""
    mask = "mask"
    """Zero outside `[low, high]`, unchanged inside."""


class Surplus(StrEnum):
    """What becomes of accepted groups beyond those wanted."""

    drop = "drop"
    carry = "carry"


class WhenExhausted(StrEnum):
    """What a step does that ends with fewer groups than wanted."""

    go_on = "go_on"
    stop = "stop"


@dataclass
class AdvantageConfig:
    """From rewards to advantages."""

    estimator: Estimator = Estimator.group_mean_std
    """group_mean_std (GRPO, DAPO), group_mean (Dr. GRPO), rloo, reinforce_plus_plus or
    reinforce_plus_plus_baseline."""
    eps: float = 1e-6
    """Added to the standard deviation before dividing by it."""

    def problems(self) -> list[str]:
        """One sentence for each value out of range."""
        if self.eps < 0:
            return [f"algorithm.advantage.eps={self.eps:g} is negative: use a small number such as 1e-6."]
        return []


@dataclass
class ClipConfig:
    """The trust region, as distances from a ratio of 1."""

    low: float = 0.2
    """The ratio's lower bound is 1 - low (DAPO keeps 0.2; GSPO wants about 3e-4)."""
    high: float = 0.2
    """The ratio's upper bound is 1 + high (DAPO's clip-higher: 0.28; GSPO: 4e-4)."""
    dual: float = 0.0
    """Dual clip: where the advantage is negative, a ratio above this stops counting (DAPO's script: 10).
    0 turns it off."""


@dataclass
class KlConfig:
    """Distance to the frozen reference policy; under LoRA the reference is the base model."""

    coefficient: float = 0.0
    """Weight of the term; 0 turns it off and no reference is kept (DAPO)."""
    estimator: KlEstimator = KlEstimator.k3
    """k1, k2 or k3 (GRPO). In the loss, k1's gradient has mean zero and k2's is the true one."""
    place: KlPlace = KlPlace.loss
    """loss (GRPO) or reward (PPO, REINFORCE++)."""

    def problems(self) -> list[str]:
        """One sentence for each value out of range."""
        if self.coefficient < 0:
            return [
                f"algorithm.kl.coefficient={self.coefficient:g} would push the policy away from the "
                "reference: use 0 (off) or a positive number."
            ]
        return []


@dataclass
class OverlongConfig:
    """What length costs (DAPO, section 3.4)."""

    buffer: int = 0
    """Tokens before the response limit over which the soft penalty grows from 0 to penalty_factor
    (DAPO: 4096 of 20480). 0 turns it off."""
    penalty_factor: float = 1.0
    """The penalty of a response as long as the limit."""
    mask_truncated: bool = False
    """Learn nothing from responses cut at the limit; they still count in the group's baseline."""

    def problems(self) -> list[str]:
        """One sentence for each value out of range."""
        found = []
        if self.buffer < 0:
            found.append(
                f"algorithm.overlong.buffer={self.buffer} is negative: use 0 (off) or a token count."
            )
        if self.penalty_factor <= 0:
            found.append(
                f"algorithm.overlong.penalty_factor={self.penalty_factor:g} would not punish length: use a "
                "positive number, or overlong.buffer=0 to turn the penalty off."
            )
        return found


@dataclass
class CorrectionConfig:
    """Importance weight learner / engine on the policy term, without gradient (TIS, MIS and kin)."""

    level: CorrectionLevel = CorrectionLevel.token
    """off, token, sequence (product over the response) or geometric (its length-normalized root).
    In YAML write 'off' with quotes."""
    mode: CorrectionMode = CorrectionMode.truncate
    """truncate, clip or mask."""
    low: float = 0.0
    """Lower bound of the weight, in [0, 1]; clip and mask use it."""
    high: float = 2.0
    """Upper bound of the weight, at least 1."""

    def problems(self) -> list[str]:
        """One sentence for each value out of range."""
        if self.level is CorrectionLevel.off:
            return []
        found = []
        if not 0 <= self.low <= 1:
            found.append(
                f"algorithm.correction.low={self.low:g} must lie in [0, 1]: a weight of 1 is agreement and "
                "has to stay inside the bounds."
            )
        if self.high < 1:
            found.append(
                f"algorithm.correction.high={self.high:g} is below 1, where learner and engine agree: "
                "use 1 or more."
            )
        if self.mode is CorrectionMode.truncate and self.low > 0:
            found.append(
                f"algorithm.correction.low={self.low:g} has no effect with correction.mode=truncate: "
                "use mode=clip, or low=0."
            )
        return found


@dataclass
class DynamicSamplingConfig:
    """Keep only groups that teach something, and draw more until enough are found (DAPO, section 3.2)."""

    enabled: bool = False
    """Drop groups whose raw accuracy is the same for every response, and refill. Off: every group passes."""
    max_rounds: int = 10
    """Generation rounds a step may take, the first included."""
    oversample: float = 1.0
    """Prompts drawn in a round for each group still missing, at least 1 (DAPO's script: 3)."""
    surplus: Surplus = Surplus.drop
    """drop accepted groups beyond those wanted, or carry them into the next step."""
    max_age: int = 1
    """Learner steps after which a carried group is too stale to use."""
    when_exhausted: WhenExhausted = WhenExhausted.go_on
    """When rounds or data run out: go_on with a smaller batch, or stop the run. It says so either way."""

    def problems(self) -> list[str]:
        """One sentence for each value out of range."""
        found = []
        if self.max_rounds < 1:
            found.append(
                f"algorithm.dynamic_sampling.max_rounds={self.max_rounds} generates nothing: use 1 or more."
            )
        if not 1 <= self.oversample < float("inf"):
            found.append(
                f"algorithm.dynamic_sampling.oversample={self.oversample:g} cannot fill a batch: use a "
                "finite number of at least 1."
            )
        if self.max_age < 1:
            found.append(
                f"algorithm.dynamic_sampling.max_age={self.max_age} would make every carried group stale: "
                "use 1 or more, or surplus=drop."
            )
        return found


@dataclass
class AlgorithmConfig:
    """All switches of the algorithm. With correction.level=off too, the defaults are exactly GRPO."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From rewards to advantages."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Bounds of the ratio."""
    objective: Objective = Objective.clipped
    """clipped (PPO, GRPO, DAPO) or cispo."""
    ratio: Ratio = Ratio.token
    """token, or sequence (GSPO)."""
    aggregation: Aggregation = Aggregation.seq_mean_token_mean
    """token_mean (DAPO), token_mean_group, seq_mean_token_mean (GRPO), seq_mean_token_sum or
    seq_mean_token_sum_norm (Dr. GRPO)."""
    kl: KlConfig = field(default_factory=KlConfig)
    """Distance to the reference; off by default."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus, in nats; 0 turns it off (DAPO)."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    """Length penalty and truncation mask; off by default."""
    old_logprobs: OldLogprobs = OldLogprobs.recompute
    """current (one optimizer step a rollout only), recompute, or rollout."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """Mismatch between learner and engine; where they agree it changes nothing."""
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    """Group filter and refill; off by default."""

    def check(self) -> list[str]:
        """One sentence for every value out of range or combination that cannot be meant."""
        return [
            *self.advantage.problems(),
            *_clip_problems(self.clip, self.objective),
            *self.kl.problems(),
            *self.overlong.problems(),
            *self.correction.problems(),
            *self.dynamic_sampling.problems(),
            *_off_policy_problems(self),
        ]


def _clip_problems(clip: ClipConfig, objective: Objective) -> list[str]:
    found = []
    if clip.low < 0 or clip.high < 0:
        found.append(
            f"algorithm.clip.low={clip.low:g} and clip.high={clip.high:g} are distances from a ratio of 1: "
            "neither may be negative."
        )
    if objective is Objective.cispo:
        if clip.dual:
            found.append(
                f"algorithm.clip.dual={clip.dual:g} has no effect with objective=cispo: set clip.dual=0."
            )
        return found
    if clip.low > 1:
        found.append(
            f"algorithm.clip.low={clip.low:g} puts the ratio's lower bound below zero: use a value in [0, 1]."
        )
    if clip.high < clip.low:
        found.append(
            f"algorithm.clip.high={clip.high:g} is below algorithm.clip.low={clip.low:g}: raise clip.high or "
            "lower clip.low."
        )
    if clip.dual and clip.dual <= 1 + clip.high:
        found.append(
            f"algorithm.clip.dual={clip.dual:g} must be above 1 + clip.high = {1 + clip.high:g}: raise it, "
            "or set 0 to turn it off."
        )
    return found


def _off_policy_problems(config: AlgorithmConfig) -> list[str]:
    """Each source of off-policy data must be counted exactly once."""
    found = []
    corrected = config.correction.level is not CorrectionLevel.off
    if config.old_logprobs is OldLogprobs.rollout and corrected:
        found.append(
            "algorithm.old_logprobs=rollout already divides by the engine's log-probs, so "
            f"algorithm.correction.level={config.correction.level} would count the mismatch twice: set "
            "correction.level=off, or old_logprobs=recompute."
        )
    carries = config.dynamic_sampling.enabled and config.dynamic_sampling.surplus is Surplus.carry
    if carries and config.old_logprobs is OldLogprobs.current:
        found.append(
            "algorithm.old_logprobs=current is for fresh groups only, and "
            "algorithm.dynamic_sampling.surplus=carry trains on older ones: set old_logprobs=recompute, or "
            "surplus=drop."
        )
    if carries and config.old_logprobs is OldLogprobs.recompute and not corrected:
        found.append(
            "algorithm.dynamic_sampling.surplus=carry trains on groups of older weights, and with "
            "algorithm.correction.level=off nothing accounts for it: set correction.level=token, or "
            "surplus=drop."
        )
    return found
