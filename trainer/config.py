"""What of the learner can be set. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from trainer.memory.config import ActivationCheckpointing, MemoryConfig
from trainer.parallel.config import ParallelConfig

NEEDS_BITSANDBYTES = (
    "learner.optimizer.name=adamw_8bit needs the package bitsandbytes, which is not installed: pip install "
    "'bitsandbytes>=0.50', or use learner.optimizer.name=adamw."
)


class OptimizerName(StrEnum):
    """Optimizers by name."""

    adamw = "adamw"
    """Adam with decoupled weight decay (1711.05101), fused."""
    adamw_8bit = "adamw_8bit"
    """AdamW whose moments take 8 bits each, with a scale for every 256 (2110.02861); needs bitsandbytes."""
    sgd = "sgd"
    """Stochastic gradient descent; `betas[0]` is its momentum."""
    muon = "muon"
    """Muon (2502.16982) for hidden matrices, scaled to AdamW's update size; AdamW for all else."""
    lion = "lion"
    """Sign of the momentum (2302.06675); wants a third of AdamW's rate."""
    adafactor = "adafactor"
    """Factored second moments (1804.04235): next to no optimizer memory."""
    schedulefree = "schedulefree"
    """Schedule-free AdamW (2405.15682); the published and saved weights are those it takes gradients at."""


class ScheduleName(StrEnum):
    """How the rate goes after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Precision(StrEnum):
    """What the learner computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """Where the learner runs."""

    auto = "auto"
    """CUDA when there is a device, else CPU."""
    cpu = "cpu"
    cuda = "cuda"


class OnNonfinite(StrEnum):
    """What a loss or gradient that is NaN or infinite does."""

    stop = "stop"
    """The run stops; weights and optimizer are as before that optimizer step."""
    skip = "skip"
    """That optimizer step is dropped and counted; ten in a row stop the run."""


@dataclass
class OptimizerConfig:
    """The optimizer. Its copy of the weights is float32 whatever `learner.dtype` is, and so is its state, but
    for `adamw_8bit`."""

    name: OptimizerName = OptimizerName.adamw
    """`adamw`, `adamw_8bit`, `sgd`, `muon`, `lion`, `adafactor` or `schedulefree`."""
    lr: float = 1e-6
    """Learning rate after warm-up. LoRA wants about ten times that of full fine-tuning."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Averaging of the first and second moment. `sgd`, `muon` and `lion` take what applies to them."""
    eps: float = 1e-8
    """Added to the denominator of Adam-like updates."""


@dataclass
class ScheduleConfig:
    """The learning rate over rollout steps (not optimizer steps)."""

    name: ScheduleName = ScheduleName.constant
    """`constant`, `linear` or `cosine`, after warm-up."""
    warmup_steps: int = 0
    """Rollout steps of linear warm-up, from `lr / warmup_steps` to `lr`."""
    final_ratio: float = 0.0
    """Share of `lr` that `linear` and `cosine` end at, 0 to 1."""


@dataclass
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning (2106.09685)."""

    rank: int = 0
    """Rank of the update; 0 trains all weights."""
    alpha: int = 32
    """The update is scaled by `alpha / rank`."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get an adapter; `all-linear` takes all but the head."""


@dataclass
class ProfileConfig:
    """Traces of the update."""

    steps: list[int] = field(default_factory=list)
    """Rollout steps (from 0) whose update writes a torch trace to `profile/` in the run's folder, for
    chrome://tracing or Perfetto."""


@dataclass
class LearnerConfig:
    """The learner: what is trained, how, and with what memory."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """A loss or gradient that is NaN or infinite: `stop` the run, or `skip` that optimizer step, count it in
    `learner/skipped_steps`, and stop after ten in a row."""
    token_budget: int = 4096
    """Packed tokens of a micro-batch: memory against speed, the gradient does not depend on it."""
    share_prompts: bool = True
    """Compute a group's prompt once, where the model's attention allows it."""
    dtype: Precision = Precision.bfloat16
    """What the model computes in; master weights, gradients sums and the optimizer stay float32."""
    freeze: list[str] = field(default_factory=list)
    """Patterns (as in file names) of parameters that are not trained, such as `*embed_tokens*`."""
    compile: bool = False
    """Compile decoder layers with torch.compile: a slow first step, faster ones after."""
    threads: int = 0
    """CPU threads of the learner; 0 leaves torch's own choice."""
    device: Device = Device.auto
    """`auto`, `cpu` or `cuda`."""

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        optimizer, schedule = self.optimizer, self.schedule
        ranges = [
            ("optimizer.lr", optimizer.lr, 0, None),
            ("optimizer.weight_decay", optimizer.weight_decay, 0, None),
            ("optimizer.eps", optimizer.eps, 0, None),
            ("schedule.warmup_steps", schedule.warmup_steps, 0, None),
            ("schedule.final_ratio", schedule.final_ratio, 0, 1),
            ("lora.rank", self.lora.rank, 0, None),
            ("max_grad_norm", self.max_grad_norm, 0, None),
            ("token_budget", self.token_budget, 1, None),
            ("threads", self.threads, 0, None),
        ]
        found = [sentence for item in ranges if (sentence := _out_of_range(*item))]
        if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
            found.append(
                f"learner.optimizer.betas={optimizer.betas} must be two numbers from 0 to below 1: "
                "give [0.9, 0.999]."
            )
        if any(step < 0 for step in self.profile.steps):
            found.append(
                f"learner.profile.steps={self.profile.steps} counts from 0: leave out negative steps."
            )
        return (
            found + self._check_compile() + self._check_lora() + self.parallel.check() + self.memory.check()
        )

    def _check_compile(self) -> list[str]:
        if self.compile and self.memory.activation_checkpointing is ActivationCheckpointing.selective:
            return [
                "learner.memory.activation_checkpointing=selective picks single operations, and "
                "learner.compile=true fuses them and picks by itself what to compute again: set it to none "
                "or full."
            ]
        return []

    def _check_lora(self) -> list[str]:
        if not self.lora.rank:
            return []
        found = []
        if self.lora.alpha <= 0:
            found.append(f"learner.lora.alpha={self.lora.alpha} must be above 0: try twice the rank.")
        if not self.lora.targets:
            found.append("learner.lora.targets is empty: name linear layers, or give [all-linear].")
        if self.freeze:
            found.append(
                f"learner.freeze={self.freeze} has no effect with learner.lora.rank={self.lora.rank}, "
                "which freezes the whole model: leave learner.freeze empty."
            )
        return found


def _out_of_range(key: str, value: float, least: float, most: float | None) -> str | None:
    if value < least:
        return f"learner.{key}={value:g} must be at least {least:g}: raise it."
    if most is not None and value > most:
        return f"learner.{key}={value:g} must be at most {most:g}: lower it."
    return None
