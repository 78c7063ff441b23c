"""`ProtocolConfig`: how a benchmark is asked, sampled and graded. A score means nothing without it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlhf.rewards.config import RewardConfig, RewardPartConfig
from rollout.engine import Sampling

PART = "answer"
"""Name of the one reward part that grades a benchmark."""


class AnswerKind(StrEnum):
    """What the answers of a benchmark are; a protocol has a grader for each."""

    aime = "aime"
    """Whole numbers from 0 to 999."""
    integer = "integer"
    """Whole numbers (AMC, GSM8K)."""
    expression = "expression"
    """Mathematical expressions (MATH-500, OlympiadBench)."""


@dataclass
class GraderConfig:
    """One grader of a protocol."""

    kind: str = ""
    """A grading kind of `reward.parts`: exact_integer | math_verify | dapo_math | aime."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its options."""


@dataclass
class ProtocolConfig:
    """A named and versioned way to ask, sample and grade. `protocol=dapo` takes a preset whole."""

    name: str = ""
    """Of the preset."""
    version: int = 1
    """Raised whenever a number of the preset can change. At least 1."""
    samples: int = 1
    """Responses to each problem. At least 1."""
    temperature: float = 0.0
    """0 is greedy. At least 0."""
    top_p: float = 1.0
    """Nucleus sampling, in (0, 1]; of no effect when greedy."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all; of no effect when greedy."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability, in [0, 1)."""
    max_new_tokens: int = 512
    """Response limit in tokens. At least 1."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response, beside the model's end tokens."""
    system_prompt: str = ""
    """System message. Empty adds none, but the model's chat template may."""
    template: str = "{prompt}"
    """Text of the user's turn; `{prompt}` stands for the problem."""
    graders: dict[str, GraderConfig] = field(default_factory=dict)
    """By kind of answer (`aime`, `integer`, `expression`)."""

    def check(self) -> list[str]:
        """Sentences about values that cannot work."""
        found = [
            f"protocol.{name}={getattr(self, name)} must be at least {least}: raise it."
            for name, least in (
                ("version", 1), ("samples", 1), ("temperature", 0), ("top_k", 0), ("max_new_tokens", 1)
            )
            if getattr(self, name) < least
        ]  # fmt: skip
        if not 0 < self.top_p <= 1:
            found.append(f"protocol.top_p={self.top_p} must lie in (0, 1]: use 1 to keep every token.")
        if not 0 <= self.min_p < 1:
            found.append(f"protocol.min_p={self.min_p} must lie in [0, 1): use 0 to keep every token.")
        if "{prompt}" not in self.template:
            found.append(
                f"protocol.template={self.template!r} has no {{prompt}}: say where the problem goes."
            )
        if any(not text for text in self.stop):
            found.append('protocol.stop holds an empty string, which would end every response: remove "".')
        if self.samples > 1 and self.temperature == 0:
            found.append(
                f"protocol.samples={self.samples} greedy responses would all be one: set "
                "protocol.temperature above 0, or protocol.samples=1."
            )
        known = [kind.value for kind in AnswerKind]
        found += [
            f"protocol.graders.{name} is for no kind of answer: the kinds are {', '.join(known)}."
            for name in self.graders
            if name not in known
        ]
        return found

    def reward(self, answers: AnswerKind) -> RewardConfig:
        """The grader of such answers as a reward of one part, which decides the accuracy."""
        grader = self.graders[answers.value]
        return RewardConfig(parts={PART: RewardPartConfig(kind=grader.kind, args=dict(grader.args))})

    def sampling(self, end_tokens: tuple[int, ...] = ()) -> Sampling:
        """With the end tokens of the model; greedy keeps nothing that would only seem to matter."""
        greedy = self.temperature == 0
        return Sampling(
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=1.0 if greedy else self.top_p,
            top_k=0 if greedy else self.top_k,
            min_p=0.0 if greedy else self.min_p,
            stop=tuple(self.stop),
            stop_token_ids=end_tokens,
        )

    @property
    def label(self) -> str:
        """`name@version`."""
        return f"{self.name or 'unnamed'}@{self.version}"


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content(protocol: ProtocolConfig, answers: AnswerKind) -> dict[str, Any]:
    """What of a protocol can move a number on a benchmark with such answers: all but its name and the
    graders of other answers."""
    values = dataclasses.asdict(protocol)
    values["graders"] = values["graders"].get(answers.value)
    return {name: value for name, value in values.items() if name not in ("name", "version")}
