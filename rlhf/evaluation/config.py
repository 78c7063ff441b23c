"""`EvaluationConfig`: when and how the held-out set is answered, apart from training's sampling."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Split(StrEnum):
    """Which rows are answered."""

    heldout = "heldout"
    """The final word: nothing may be chosen on it."""
    validation = "validation"
    """To choose settings and checkpoints on."""


@dataclass
class EvaluationConfig:
    """When the held-out set is answered, with sampling settings of its own. One response to each prompt."""

    every: int = 10
    """Steps between evaluations; 0 leaves only the first and the last."""
    split: Split = Split.heldout
    """`heldout`, or `validation` while settings are being chosen."""
    at_start: bool = True
    """Evaluate before the first step (step 0)."""
    at_end: bool = True
    """Evaluate after the last step."""
    prompts: int = 0
    """Answer at most this many held-out prompts, the first ones; 0 takes all."""
    temperature: float = 0.0
    """0 is greedy. At least 0."""
    top_p: float = 1.0
    """Nucleus sampling, in (0, 1]; of no effect when greedy."""
    max_new_tokens: int = 0
    """Response limit in tokens; 0 takes `rollout.max_new_tokens`."""

    def due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after `step` of `steps` (step 0: before training)."""
        if step == 0:
            return self.at_start
        if step == steps:
            return self.at_end
        return self.every > 0 and step % self.every == 0

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        found = [
            f"evaluation.{name}={value} is negative: set {remedy}."
            for name, value, remedy in [
                ("every", self.every, "a number of steps, or 0 for none between the first and the last"),
                ("prompts", self.prompts, "a number of prompts, or 0 for all"),
                ("max_new_tokens", self.max_new_tokens, "a number of tokens, or 0 for training's limit"),
                ("temperature", self.temperature, "0 for greedy, or a positive temperature"),
            ]
            if value < 0
        ]
        if not 0.0 < self.top_p <= 1.0:
            found.append(f"evaluation.top_p={self.top_p} is outside (0, 1]: set 1.0 to keep every token.")
        return found
