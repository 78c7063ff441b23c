"""A plain Hugging Face model as the learner, so that these tests need no other part of the program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rollout.vllm_engine import VllmEngine
from rollout.weights.shm import ShmSender

DEMO_RATE = 1e-5
"""The demo's learning rate."""


class PlainLearner:
    """Float32 master weights, compute in `dtype`; `update` is one AdamW step on a policy-gradient loss."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        self.model = cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)).to(device)
        self._masters = [p.detach().float().clone() for p in self.model.parameters()]
        self._optimizer = torch.optim.AdamW(self._masters, lr=DEMO_RATE)
        self._generator = torch.Generator().manual_seed(5)

    def weights(self) -> list[tuple[str, Tensor]]:
        """Names and live tensors; a tied head appears once."""
        return [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of `tokens[1:]`, one sequence at a time."""
        return [self._logprobs(sequence, temperature).tolist() for sequence in sequences]

    def _logprobs(self, sequence: Sequence[int], temperature: float) -> Tensor:
        ids = torch.tensor([list(sequence)], device=self.model.device)
        logprobs = (self.model(ids).logits[0, :-1].float() / temperature).log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[:, 0]

    def update(self, rate: float = DEMO_RATE) -> None:
        """One optimizer step."""
        self.model.zero_grad()
        for sign in (1, -1):
            ids = torch.randint(3, 250, (24,), generator=self._generator).tolist()
            (sign * self._logprobs(ids, 1.0)[12:].sum()).backward()
        for master, parameter in zip(self._masters, self.model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self._masters, self.model.parameters(), strict=True):
                parameter.copy_(master)


def put_back(engine: VllmEngine, folder: Path) -> None:
    """Install the weights on disk again, as version 0: the next test finds the engine as it was started."""
    restorer = ShmSender([engine], columns=-1)
    first = PlainLearner(folder, getattr(torch, engine.spec.dtype)).weights()
    restorer.install(restorer.stage(first, 0))


def copied(weights: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The same weights in memory of their own."""
    return {name: tensor.clone() for name, tensor in weights}


def sequences(count: int = 6, length: int = 48, seed: int = 3) -> list[list[int]]:
    """Random token sequences of the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for _ in range(count)]


def once(weights: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A source that can be iterated only once."""
    yield from weights
