"""The root configuration, composed from the dataclasses that stand beside the classes that they configure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from rlhf.algorithms.config import AlgorithmConfig, CorrectionLevel, KlPlace, OldLogprobs, Surplus
from rlhf.checkpoint import CheckpointConfig
from rlhf.data.config import DataConfig
from rlhf.evaluation.config import EvaluationConfig, Split
from rlhf.models import ModelConfig
from rlhf.rewards.config import RewardConfig
from rlhf.tracking.config import TrackingConfig
from rollout.config import EngineProcess, Numerics, RolloutConfig
from rollout.weights.config import Transport, WeightsConfig
from trainer.config import LearnerConfig, Precision
from trainer.memory.config import OffloadState


class Section(Protocol):
    """A part of the configuration."""

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        ...


@dataclass
class RunConfig:
    """Where a run lives and what seeds it."""

    name: str = ""
    """Name of the run, in `runs/<name>`; empty takes the recipe's, numbered when it is taken."""
    dir: str = ""
    """Folder of the run, instead of `runs/<name>`. One that already holds a run is refused, unless `resume`
    goes on with it."""
    seed: int = 0
    """Seeds the order of prompts, every sampled response and the learner. At least 0."""
    watchdog_minutes: float = 30.0
    """When no phase of a step begins or ends for so long, or a rank is busy or silent for so long, it is
    named and the stacks of all threads are written to `stacks.txt`; the run goes on. 0 watches nothing."""

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        found = []
        if self.seed < 0:
            found.append(f"run.seed={self.seed} must be at least 0: raise it.")
        if not self.watchdog_minutes >= 0:
            found.append(
                f"run.watchdog_minutes={self.watchdog_minutes:g} must be at least 0: set a number of "
                "minutes, or 0 to watch nothing."
            )
        return found


@dataclass
class LoopConfig:
    """Batch arithmetic: what one step keeps and learns from."""

    steps: int = 100
    """Rollout steps; one generates, learns and publishes once. The schedule counts these."""
    max_tokens: int = 0
    """Generated tokens, dropped groups included, after which the step in progress is the last; 0: no limit.
    Compares methods at equal generation."""
    prompts: int = 16
    """Groups that one step learns from (`P`), after selection."""
    group_size: int = 8
    """Responses to each prompt (`G`)."""
    mini_batch: int = 0
    """Groups in one optimizer step; 0 takes all, so the step is on-policy. Must divide `loop.prompts`."""
    epochs: int = 1
    """Passes over each rollout."""
    staleness: int = 0
    """Learner steps that generation may run ahead of learning, and the largest age of groups that are not
    carried over. 0 is synchronous."""
    inflight_updates: bool = False
    """Engines take new weights in the midst of a round instead of at its end; its responses go on under them.
    Needs `staleness` above 0."""

    @property
    def groups_per_mini_batch(self) -> int:
        """`mini_batch` with its default filled in."""
        return self.mini_batch or self.prompts

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that one full rollout gives."""
        return self.epochs * (self.prompts // self.groups_per_mini_batch)

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        found = [
            f"loop.{name}={value} must be at least {least}: raise it."
            for name, value, least in [
                ("steps", self.steps, 1),
                ("max_tokens", self.max_tokens, 0),
                ("prompts", self.prompts, 1),
                ("group_size", self.group_size, 1),
                ("mini_batch", self.mini_batch, 0),
                ("epochs", self.epochs, 1),
                ("staleness", self.staleness, 0),
            ]
            if value < least
        ]
        if self.inflight_updates and not self.staleness:
            found.append(
                "loop.inflight_updates=true needs generation beside learning and loop.staleness=0 has none: "
                "set loop.staleness=1 or more."
            )
        if not found and self.prompts % self.groups_per_mini_batch:
            found.append(
                f"loop.mini_batch={self.mini_batch} does not divide loop.prompts={self.prompts}: "
                f"choose one of {', '.join(map(str, _divisors(self.prompts)))}."
            )
        return found


@dataclass
class Config:
    """Everything that a run is made of."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resume: str = "never"
    """`never` starts anew. `auto` goes on from the last whole checkpoint of the run's folder, or starts anew
    where there is no run. A step goes on from that checkpoint; what the run did after it is removed."""

    @property
    def longest_response(self) -> tuple[str, int]:
        """Key and value, in tokens, of the longer of the response limits of training and evaluation."""
        training = ("rollout.max_new_tokens", self.rollout.max_new_tokens)
        evaluation = ("evaluation.max_new_tokens", self.evaluation.max_new_tokens)
        return max(training, evaluation, key=lambda limit: limit[1])

    @property
    def layercast(self) -> bool:
        """Whether engines and learner compute in float32 with weights in bfloat16."""
        return self.rollout.numerics is Numerics.layercast

    @property
    def longest_sequence(self) -> int:
        """Most tokens of a prompt and its response together that the run can ask an engine for."""
        return self.data.max_prompt_tokens + self.longest_response[1]


def check(config: Config) -> list[str]:
    """Every problem of a configuration as one sentence each; empty when it can run.

    Each section checks its own ranges; what spans sections is checked here.
    """
    sections: list[Section] = [
        config.run,
        config.model,
        config.data,
        config.reward,
        config.algorithm,
        config.rollout,
        config.weights,
        config.learner,
        config.loop,
        config.evaluation,
        config.checkpoint,
        config.tracking,
    ]
    own = [sentence for section in sections for sentence in section.check()]
    return own or list(_across(config))


def _across(config: Config) -> Iterator[str]:
    """Impossible combinations of keys in different sections."""
    algorithm, loop, rollout = config.algorithm, config.loop, config.rollout
    if config.resume not in ("never", "auto") and not config.resume.isdecimal():
        yield f"resume={config.resume} is not known: set never, auto, or a checkpoint's step (resume=40)."
    if algorithm.overlong.buffer > rollout.max_new_tokens:
        yield (
            f"algorithm.overlong.buffer={algorithm.overlong.buffer} is longer than the response limit "
            f"rollout.max_new_tokens={rollout.max_new_tokens}: shorten the buffer."
        )
    if algorithm.dynamic_sampling.enabled and loop.group_size < 2:
        yield (
            f"algorithm.dynamic_sampling.enabled=true needs groups that can disagree but "
            f"loop.group_size={loop.group_size}: set loop.group_size to 2 or more."
        )
    if rollout.top_p != 1:
        yield (
            f"rollout.top_p={rollout.top_p} cuts the sampling distribution, which the learner cannot "
            f"renormalize: set rollout.top_p=1."
        )
    if algorithm.old_logprobs is OldLogprobs.current and loop.optimizer_steps > 1:
        yield (
            f"algorithm.old_logprobs=current needs one optimizer step a rollout but loop.mini_batch="
            f"{loop.mini_batch} and loop.epochs={loop.epochs} give {loop.optimizer_steps}: set "
            f"algorithm.old_logprobs=recompute."
        )
    if loop.staleness:
        yield from _ahead(config)
    if config.layercast:
        yield from _layercast(config.learner)
    if rollout.process is EngineProcess.inprocess and config.weights.transport is Transport.ipc:
        yield "weights.transport=ipc needs an engine in a process of its own: set rollout.process=child."
    if 0 < rollout.max_model_len < config.longest_sequence:
        yield (
            f"rollout.max_model_len={rollout.max_model_len} is shorter than data.max_prompt_tokens + "
            f"{config.longest_response[0]} = {config.longest_sequence}: raise it or set 0."
        )
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    if config.learner.token_budget < longest:
        yield (
            f"learner.token_budget={config.learner.token_budget} is smaller than the longest row, "
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}: raise it."
        )
    if config.model.adapter and config.learner.lora.rank:
        yield (
            f"learner.lora.rank={config.learner.lora.rank} asks for a fresh adapter and "
            f"model.adapter={config.model.adapter} for an old one: set learner.lora.rank=0 to continue it."
        )
    if config.checkpoint.save_best and config.evaluation.split is Split.heldout:
        yield (
            "checkpoint.save_best=true would choose on evaluation.split=heldout, where nothing may be "
            "chosen: set evaluation.split=validation, and data.validation to a number of problems."
        )
    if config.checkpoint.save_best and not (config.evaluation.every or config.evaluation.at_end):
        yield (
            "checkpoint.save_best=true needs evaluations to choose by but evaluation.every=0 and "
            "evaluation.at_end=false: set evaluation.every."
        )


def _layercast(learner: LearnerConfig) -> Iterator[str]:
    """Learners that would not compute with the weights that the engines keep."""
    if learner.dtype is not Precision.bfloat16:
        yield (
            f"learner.dtype={learner.dtype} with rollout.numerics=layercast would have the learner compute "
            "with weights that the engines round to bfloat16: set learner.dtype=bfloat16, in which weights "
            "are kept; what is computed is float32."
        )
    if learner.lora.rank:
        yield (
            f"learner.lora.rank={learner.lora.rank} with rollout.numerics=layercast: engines round base "
            "and adapter to bfloat16 together, which the learner's separate adapter does not; set "
            "learner.lora.rank=0, or rollout.numerics=standard."
        )
    if learner.parallel.tensor > 1:
        yield (
            f"learner.parallel.tensor={learner.parallel.tensor} with rollout.numerics=layercast: split "
            "layers do not upcast their weights; set learner.parallel.tensor=1."
        )


def _ahead(config: Config) -> Iterator[str]:
    """What generating ahead of learning (`loop.staleness` above 0) does not go with."""
    algorithm, lead = config.algorithm, f"loop.staleness={config.loop.staleness}"
    sampling = algorithm.dynamic_sampling
    if config.rollout.process is EngineProcess.inprocess:
        yield (
            f"rollout.process=inprocess cannot generate while the learner works, as {lead} asks: set "
            "rollout.process=child."
        )
    if config.rollout.sleep_level:
        yield (
            f"rollout.sleep_level={config.rollout.sleep_level} has engines sleep while the learner learns, "
            f"and {lead} has them generate then: set one of them to 0."
        )
    if config.loop.inflight_updates and config.rollout.restarts:
        yield (
            f"rollout.restarts={config.rollout.restarts} makes the round of a lost engine again under one "
            "version, and loop.inflight_updates=true mixes two in it: set one of them off."
        )
    if algorithm.old_logprobs is OldLogprobs.current:
        yield (
            f"algorithm.old_logprobs=current is for fresh groups only, and {lead} trains on older ones: set "
            "old_logprobs=recompute."
        )
    place = config.learner.memory.offload_state
    if place is not OffloadState.never:
        yield (
            f"learner.memory.offload_state={place} frees the learner's memory while engines generate, and "
            f"with {lead} it is learning then: set it to never."
        )
    corrected = algorithm.correction.level is not CorrectionLevel.off
    if algorithm.old_logprobs is OldLogprobs.recompute and not corrected:
        yield (
            f"{lead} trains on groups of older weights, and with algorithm.correction.level=off nothing "
            "accounts for it: set correction.level=token, or old_logprobs=rollout."
        )
    if algorithm.kl.coefficient and algorithm.kl.place is KlPlace.reward:
        yield (
            f"algorithm.kl.place=reward asks the learner for log-probs while groups are scored, and with "
            f"{lead} it is learning then: set algorithm.kl.place=loss."
        )
    carries = sampling.enabled and sampling.surplus is Surplus.carry
    if carries and sampling.max_age <= config.loop.staleness:
        yield (
            f"algorithm.dynamic_sampling.max_age={sampling.max_age} would drop every carried group that was "
            f"generated ahead as far as {lead} allows: set max_age={config.loop.staleness + 1} or more, or "
            "surplus=drop."
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
