"""Hand-made groups for tests of what stands between rollout and learner."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.types import FinishReason, Group, Prompt, Trajectory, VersionSpan


def trajectory(
    length: int,
    reward: float = 0.0,
    *,
    accuracy: float | None = None,
    finish: FinishReason = FinishReason.STOP,
) -> Trajectory:
    """A response of `length` tokens; its accuracy is its reward unless given."""
    return Trajectory(
        prompt_ids=[1, 2],
        response_ids=list(range(10, 10 + length)),
        logprobs=[-0.5] * length,
        finish_reason=finish,
        version_spans=[VersionSpan(start=0, end=length, version=1)],
        sample_index=0,
        seed=0,
        text="7",
        rewards={"exact": reward},
        reward=reward,
        accuracy=reward if accuracy is None else accuracy,
        extracted="7",
        grade_status="ok",
    )


def group(members: Sequence[Trajectory], name: str = "0", born: int = 0) -> Group:
    """A group of these responses to one prompt."""
    prompt = Prompt(id=f"sums:{name}", token_ids=[1, 2], text="3 + 4", answer="7", source="sums")
    return Group(id=name, prompt=prompt, trajectories=list(members), born=born)
