"""Groups -> mini-batches of the learner's `Row`s, with advantages and global token weights filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf.algorithms.advantages import compute_advantages
from rlhf.algorithms.aggregation import token_weights
from rlhf.algorithms.config import AlgorithmConfig
from rlhf.algorithms.overlong import learn_mask
from rlhf.config import LoopConfig
from rollout.types import Group, Trajectory
from trainer.batch import Row


@dataclass(slots=True, kw_only=True)
class MiniBatches:
    """What one rollout teaches, split into optimizer steps."""

    batches: list[list[Row]]
    """One list of rows an optimizer step, epochs one after another."""
    rows: list[Row]
    """Every row once, in order: what log-prob passes run over. Epochs share these objects."""
    empty_responses: int
    """Responses without a token to learn from (masked, aborted or empty)."""

    @property
    def moved(self) -> list[Row]:
        """Rows, each once, that are learned from after the first optimizer step has moved the policy.

        The others meet the very policy that old log-probs are taken from, so their ratio is 1 by definition.
        """
        if len(self.batches) < 2:
            return []
        again = any(rows is self.batches[0] for rows in self.batches[1:])
        return self.rows if again else self.rows[len(self.batches[0]) :]


def assign_advantages(groups: Sequence[Group], algorithm: AlgorithmConfig) -> None:
    """Fill `advantage` of every trajectory from the rewards of the whole rollout (docs/dapo.md)."""
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories:
        return
    rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float64)
    index = torch.tensor([i for i, group in enumerate(groups) for _ in group.trajectories])
    advantages = compute_advantages(algorithm.advantage, rewards, index).tolist()
    for trajectory, value in zip(trajectories, advantages):
        trajectory.advantage = value


def mini_batches(
    groups: Sequence[Group], algorithm: AlgorithmConfig, loop: LoopConfig, max_new_tokens: int
) -> MiniBatches:
    """Split kept groups into mini-batches of `loop.groups_per_mini_batch` groups, in order.

    A short rollout (dynamic sampling ran out) gives fewer mini-batches, the last one perhaps smaller; its
    token weights are computed from its own counts, so every optimizer step is normalized on its own.
    """
    size = loop.groups_per_mini_batch
    chunks = [groups[i : i + size] for i in range(0, len(groups), size)]
    built = [_rows(chunk, i * size, algorithm, max_new_tokens) for i, chunk in enumerate(chunks)]
    batches = [rows for rows, _ in built]
    return MiniBatches(
        batches=batches * loop.epochs,
        rows=[row for rows in batches for row in rows],
        empty_responses=sum(empty for _, empty in built),
    )


def plain_rows(groups: Sequence[Group]) -> list[Row]:
    """A row for every trajectory, in order, with no weight in any loss: for log-prob passes alone."""
    members = [(i, t) for i, group in enumerate(groups) for t in group.trajectories]
    return [_row(t, index, [0.0] * len(t.response_ids)) for index, t in members]


def _rows(
    groups: Sequence[Group], first: int, algorithm: AlgorithmConfig, max_new_tokens: int
) -> tuple[list[Row], int]:
    """Rows of one mini-batch and how many of its responses teach nothing."""
    members = [(first + i, t) for i, group in enumerate(groups) for t in group.trajectories]
    masks = [learn_mask(t, algorithm.overlong.mask_truncated) for _, t in members]
    weights = token_weights(masks, [index for index, _ in members], algorithm.aggregation, max_new_tokens)
    rows = [_row(t, index, w) for (index, t), w in zip(members, weights.weights) if any(w)]
    return rows, weights.empty_responses


def _row(trajectory: Trajectory, group: int, weights: list[float]) -> Row:
    length = len(trajectory.response_ids)
    return Row(
        prompt_ids=trajectory.prompt_ids,
        response_ids=trajectory.response_ids,
        group=group,
        advantages=[trajectory.advantage] * length,
        token_weights=weights,
        rollout_logprobs=trajectory.logprobs,
    )
