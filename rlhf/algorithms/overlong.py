"""What length costs: DAPO's soft overlong punishment and the masks of truncated responses.

The penalty goes by the token count, the mask by the finish reason: a response may end by itself exactly
at the limit.
"""

from __future__ import annotations

from collections.abc import Iterable

from rlhf.algorithms.config import OverlongConfig
from rollout.types import FinishReason, Group, Trajectory

PART = "overlong"
"""Name of the reward part."""


def penalty(length: int, limit: int, buffer: int, factor: float = 1.0) -> float:
    """Zero up to `limit - buffer` tokens, then linear down to `-factor` at `limit` and beyond.

    length, limit, buffer: response tokens. A buffer of 0 turns the penalty off.
    """
    if buffer == 0:
        return 0.0
    over = length - (limit - buffer)
    return -factor * min(max(over / buffer, 0.0), 1.0)


def shape_rewards(groups: Iterable[Group], config: OverlongConfig, limit: int) -> None:
    """Add the penalty to every trajectory's `rewards["overlong"]` and `reward`.

    To be called once a group, after scoring. Raises ValueError when a group was shaped before or the
    buffer is longer than the limit.
    """
    if config.buffer == 0:
        return
    if config.buffer > limit:
        raise ValueError(
            f"algorithm.overlong.buffer={config.buffer} is longer than the response limit of {limit} tokens: "
            "lower the buffer or raise rollout.max_new_tokens."
        )
    for group in groups:
        for trajectory in group.trajectories:
            if PART in trajectory.rewards:
                raise ValueError(f"group {group.id} already carries the overlong penalty.")
            part = penalty(len(trajectory.response_ids), limit, config.buffer, config.penalty_factor)
            trajectory.rewards[PART] = part
            trajectory.reward += part


def learn_mask(trajectory: Trajectory, mask_truncated: bool) -> list[bool]:
    """Which response tokens are learned from: all, or none of a truncated one when it is to be masked.

    Nothing is ever learned from an aborted response, whose text the engine left unfinished.
    """
    aborted = trajectory.finish_reason is FinishReason.ABORT
    learn = not aborted and not (mask_truncated and trajectory.truncated)
    return [learn] * len(trajectory.response_ids)
