"""`StepReport`: what the micro-batches of one optimizer step add up to, on one rank and over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.batch import TokenBatch
from trainer.loss import LossOutput


@dataclass(slots=True)
class StepReport:
    """Sums that become a step's metrics once every rank's are joined."""

    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    micro_batches: int = 0
    learning: int = 0
    """Micro-batches with a token to learn from."""
    tokens: int = 0
    """Packed tokens."""
    unshared_tokens: int = 0
    """What they would be with every prompt repeated."""
    problem: str = ""
    """The sentence about the first loss that was not finite."""

    @classmethod
    def of(cls, batches: Sequence[TokenBatch]) -> StepReport:
        """A report that has counted the step's micro-batches."""
        return cls(
            micro_batches=len(batches),
            tokens=sum(batch.tokens for batch in batches),
            unshared_tokens=sum(batch.unshared_tokens for batch in batches),
        )

    @classmethod
    def join(cls, reports: Sequence[dict[str, Any]]) -> StepReport:
        """One report of every rank's `plain()`. `micro_batches` are those of the rank that has most."""
        total = cls()
        for report in reports:
            total._add(cls(**report))
        return total

    def plain(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def add(self, output: LossOutput) -> None:
        """Count one micro-batch that was learned from."""
        self.learning += 1
        self.loss += output.loss.item()
        for name, value in output.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0.0) + float(output.counts[name])
        for name, value in output.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), float(value))

    def batch_metrics(self) -> dict[str, float]:
        """What holds of the micro-batches whether or not the step is taken."""
        saving = 1 - self.tokens / self.unshared_tokens if self.unshared_tokens else 0.0
        return {
            "learner/micro_batches": self.micro_batches,
            "learner/tokens": self.tokens,
            "learner/prompt_saving": saving,
        }

    def loss_metrics(self) -> dict[str, float]:
        """Means (absent where the count is zero), maxima and the loss."""
        means = {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}
        return {"policy/loss": self.loss, **means, **self.maxima}

    def _add(self, other: StepReport) -> None:
        self.loss += other.loss
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), value)
        self.micro_batches = max(self.micro_batches, other.micro_batches)
        self.learning += other.learning
        self.tokens += other.tokens
        self.unshared_tokens += other.unshared_tokens
        self.problem = self.problem or other.problem
