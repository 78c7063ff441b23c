"""Second opinions that evaluation reports beside the strict rule."""

from __future__ import annotations

from rlhf.evaluation.runner import Grader
from rlhf.rewards import aime, dapo_math, exact
from rlhf.rewards.config import RewardConfig
from rlhf.rewards.grade import Response
from rollout.types import FinishReason, Prompt, Trajectory

INTEGER_KINDS = (exact.KIND.name, aime.KIND.name, dapo_math.KIND.name)
"""Kinds that grade integers, so that a mention of the answer can be looked for."""


def second_opinions(config: RewardConfig) -> dict[str, Grader]:
    """`any_mention` beside a grader of integers: what the model knows, whatever form it answers in.

    It has no opinion on a problem whose answer is none, so `evaluate` reports it for integers alone.
    """
    integers = any(part.kind in INTEGER_KINDS for part in config.parts.values())
    return {"any_mention": _any_mention} if integers else {}


def _any_mention(prompt: Prompt, trajectory: Trajectory) -> float | None:
    if prompt.answer is None or exact.integer(prompt.answer) is None:
        return None
    response = Response(
        text=trajectory.text,
        finished=trajectory.finish_reason is FinishReason.STOP,
        length=len(trajectory.response_ids),
    )
    return exact.grade(response, prompt.answer, exact.ExactSpec(rule=exact.ExactRule.any_mention)).accuracy
