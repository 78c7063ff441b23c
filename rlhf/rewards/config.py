"""Configuration of rewards: named parts, their weights, and the limits of the grading workers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

# Importing a kind registers it; none of these imports torch, vllm or math_verify.
from rlhf.rewards import aime, dapo_math, exact, format, length
from rlhf.rewards import math as math_kind
from rlhf.rewards.grade import FUNCTION, LARGEST, build_spec, find_kind, kind_names

RESERVED = ("overlong", "kl")
"""Names of the parts that the algorithm adds after scoring."""
BUILT_IN = (exact.KIND, aime.KIND, math_kind.KIND, dapo_math.KIND, format.KIND, length.KIND)
"""The kinds that come with Whetstone, graders first."""


@dataclass
class RewardPartConfig:
    """One named part of the reward."""

    kind: str = ""
    """exact_integer | aime | math_verify | dapo_math | format | length | function."""
    weight: float = 1.0
    """Factor of this part in the reward, which is the weighted sum of all parts. 0 only measures."""
    sources: list[str] = field(default_factory=list)
    """Data sources whose rows this part scores; empty: all."""
    args: dict[str, Any] = field(default_factory=dict)
    """Options of the kind (for `exact_integer` e.g. `{rule: boxed}`); keyword arguments of a `function`."""
    values: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """What wrong and right are worth; DAPO has `[-1, 1]` (arXiv 2503.14476, eq. 7). `accuracy` stays raw."""
    path: str = ""
    """For kind `function`: `module:function`, importable from the working directory. Empty when the function
    is given in Python (`rlhf.train(..., reward=fn)`)."""
    sandbox: bool = False
    """Run it in the killable workers, one response at a time. `math_verify` and `format` always do."""

    def check(self, key: str) -> list[str]:
        """Sentences about impossible values; `key` is the part's full key."""
        problems = []
        if not self.kind:
            return [f"{key}.kind is empty: choose one of {', '.join(kind_names())}."]
        if not abs(self.weight) <= LARGEST:
            problems.append(f"{key}.weight={self.weight} must be a number from -1e9 to 1e9.")
        if len(self.values) != 2 or not all(abs(value) <= LARGEST for value in self.values):
            problems.append(
                f"{key}.values={self.values} must be two numbers from -1e9 to 1e9, [wrong, right]."
            )
        if self.kind == FUNCTION:
            return problems + self._check_function(key)
        if self.path:
            problems.append(
                f"{key}.path={self.path!r} is for kind=function only: remove it or change the kind."
            )
        try:
            build_spec(find_kind(self.kind), self.args)
        except ValueError as error:
            problems.append(f"{key}.{error}")
        return problems

    def _check_function(self, key: str) -> list[str]:
        problems = []
        if self.values != [0.0, 1.0]:
            problems.append(
                f"{key}.values={self.values} does not apply to a function: let it return the values."
            )
        if self.sandbox and not self.path:
            problems.append(
                f"{key}.sandbox=true needs {key}.path: a function given in Python runs in the main process."
            )
        return problems


@dataclass
class RewardConfig:
    """The reward of a run. Three lines make one: `reward:`, `parts:`, `answer: {kind: exact_integer}`."""

    parts: dict[str, RewardPartConfig] = field(default_factory=dict)
    """Parts by name; logged as `reward/<name>_mean`. The reward is their weighted sum."""
    accuracy_from: str = ""
    """Name of the part that decides `accuracy`, which dynamic sampling filters on. Empty: the first grader
    (exact_integer, aime, math_verify, dapo_math) that covers the row's source, else the first function."""
    workers: int = 0
    """Killable processes for parts that need them, started when first needed. 0: one a core, at most 8."""
    timeout_s: float = 5.0
    """Seconds of wall clock that one answer may take in a worker; beyond it counts as a failure."""
    memory_mb: int = 2048
    """Address space of one worker in MiB; 0 sets no limit (a function that imports torch needs that)."""

    def check(self) -> list[str]:
        """Sentences about impossible values."""
        problems = []
        if self.workers < 0:
            problems.append(
                f"reward.workers={self.workers} is negative: give 1 or more, or 0 for one a core."
            )
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            problems.append(f"reward.timeout_s={self.timeout_s} must be a positive number of seconds.")
        if self.memory_mb and self.memory_mb < 256:
            problems.append(
                f"reward.memory_mb={self.memory_mb} is too little to start a worker: give 256 or more, or 0."
            )
        for name, part in self.parts.items():
            if not name.isidentifier():
                problems.append(f"reward.parts.{name}: name a part with letters, digits and underscores.")
            if name in RESERVED:
                problems.append(
                    f"reward.parts.{name}: the algorithm has a part of this name: choose another."
                )
            problems += part.check(f"reward.parts.{name}")
        if self.accuracy_from and self.accuracy_from not in self.parts:
            problems.append(
                f"reward.accuracy_from={self.accuracy_from!r} is no part of the reward: "
                f"choose one of {', '.join(self.parts) or 'reward.parts, which is empty'}."
            )
        return problems
