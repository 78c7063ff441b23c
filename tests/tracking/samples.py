"""Small scored groups for the tests of trackers, evaluation and report."""

from __future__ import annotations

from rollout.types import FinishReason, Group, Prompt, Trajectory


def prompt(index: int) -> Prompt:
    text = f"<|im_start|>user\nWhat is {index} + {index}?<|im_end|>\n<|im_start|>assistant\n"
    return Prompt(id=f"sums:{index}", token_ids=[1, 2], text=text, answer=str(2 * index), source="sums")


def trajectory(text: str, accuracy: float = 1.0, *, length: int = 2, finished: bool = True) -> Trajectory:
    return Trajectory(
        prompt_ids=[1, 2],
        response_ids=list(range(length)),
        logprobs=[-0.5] * length,
        finish_reason=FinishReason.STOP if finished else FinishReason.LENGTH,
        version_spans=[],
        sample_index=0,
        seed=0,
        text=text,
        accuracy=accuracy,
        reward=2 * accuracy - 1,
        rewards={"exact": accuracy},
        extracted=text if finished else None,
        grade_status="ok" if finished else "no_answer",
    )


def group(index: int, texts: dict[str, float], verdict: str = "kept") -> Group:
    """Group `index` with one response a text, of the given accuracy."""
    responses = [trajectory(text, accuracy) for text, accuracy in texts.items()]
    return Group(id=f"g{index}", prompt=prompt(index), trajectories=responses, born=0, verdict=verdict)
