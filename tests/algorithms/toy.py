"""What the algorithm's tests share: groups with given accuracies, micro-batches, a bigram policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.algorithms.config import AlgorithmConfig, CorrectionConfig, CorrectionLevel
from rollout.types import FinishReason, Group, Prompt, Trajectory, VersionSpan
from trainer.loss import LossInputs

UNCORRECTED = CorrectionConfig(level=CorrectionLevel.off)


def grpo(**switches: object) -> AlgorithmConfig:
    """Plain GRPO without correction, with the given switches on top."""
    return AlgorithmConfig(**{"correction": UNCORRECTED, **switches})  # type: ignore[arg-type]


def group(
    name: str,
    accuracies: Sequence[float],
    *,
    rewards: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    born: int = 0,
) -> Group:
    """A graded group of one trajectory an accuracy."""
    rewards = accuracies if rewards is None else rewards
    lengths = [3] * len(accuracies) if lengths is None else lengths
    trajectories = [
        Trajectory(
            prompt_ids=[1, 2],
            response_ids=[5] * length,
            logprobs=[-0.5] * length,
            finish_reason=FinishReason.STOP,
            version_spans=[VersionSpan(start=0, end=length, version=born)],
            sample_index=index,
            seed=index,
            text="x" * length,
            accuracy=float(accuracy),
            rewards={"exact": float(accuracy)},
            reward=float(reward),
            grade_status="ok",
            step_spans=[(0, length)],
        )
        for index, (accuracy, reward, length) in enumerate(zip(accuracies, rewards, lengths))
    ]
    prompt = Prompt(id=f"toy:{name}", token_ids=[1, 2], text="1+1=", answer="2", source="toy", row={"a": 1})
    return Group(id=name, prompt=prompt, trajectories=trajectories, born=born)


def micro_batch(
    logprobs: torch.Tensor,
    *,
    old: torch.Tensor | None = None,
    rollout: torch.Tensor | None = None,
    advantages: torch.Tensor | float = 1.0,
    weights: torch.Tensor | None = None,
    row_ids: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
) -> LossInputs:
    """Loss inputs with what a test leaves out filled in: on policy, one row a token, equal weights."""
    size = logprobs.numel()
    old = logprobs.detach() if old is None else old
    row_ids = torch.arange(size) if row_ids is None else row_ids
    if not isinstance(advantages, torch.Tensor):
        advantages = torch.full((size,), advantages, dtype=logprobs.dtype)
    return LossInputs(
        logprobs=logprobs,
        entropy=torch.zeros(size, dtype=logprobs.dtype) if entropy is None else entropy,
        old_logprobs=old,
        rollout_logprobs=old if rollout is None else rollout,
        advantages=advantages,
        token_weights=torch.full((size,), 1.0 / size, dtype=logprobs.dtype) if weights is None else weights,
        row_ids=row_ids,
        rows=int(row_ids.max()) + 1 if size else 0,
        reference_logprobs=reference,
    )


class Bigram:
    """A policy whose next token depends on the last one: `softmax(table[last])`."""

    def __init__(self, vocabulary: int = 7, seed: int = 0) -> None:
        """Random logits in float64, so that differences are not rounding."""
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
        self.table = table.requires_grad_()
        self.generator = generator

    def rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Random responses of the given lengths."""
        size = len(self.table)
        return [torch.randint(size, (length,), generator=self.generator).tolist() for length in lengths]

    def logprobs(self, response: Sequence[int]) -> torch.Tensor:
        """`[R]` log-probs of a response that begins after token 0."""
        previous = torch.tensor([0, *response[:-1]], dtype=torch.long)
        return torch.log_softmax(self.table[previous], -1)[
            torch.arange(len(response)), torch.tensor(response)
        ]

    def gradient(self) -> torch.Tensor:
        """The accumulated gradient, taken away."""
        assert self.table.grad is not None
        gradient, self.table.grad = self.table.grad, None
        return gradient
