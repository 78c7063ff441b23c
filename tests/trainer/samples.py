"""Tiny random models and rows for the learner's tests, and the slow reference: one sequence at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from trainer.batch import Row
from trainer.loss import LossInputs, LossOutput

VOCABULARY = 300
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}


def tiny_model(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model whose attention matters: weights ten times the usual initial size."""
    config_class, extra = CONFIGS[kind]
    return from_config(config_class(**{**_SHAPE, **extra, **changes}), seed)


def from_config(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model of `config` with large weights."""
    torch.manual_seed(seed)
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_shape() -> dict[str, Any]:
    """Sizes of the tiny models."""
    return dict(_SHAPE)


def random_rows(
    groups: int = 4, samples: int = 3, seed: int = 0, longest: int = 9, shortest: int = 1
) -> list[Row]:
    """Ragged rows: prompts of 3 to 12 tokens, responses of `shortest` to `longest`."""
    draw = random.Random(seed)
    rows = []
    for group in range(groups):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randint(3, 12))]
        for _ in range(samples):
            length = draw.randint(shortest, longest)
            rows.append(make_row(prompt, [draw.randrange(VOCABULARY) for _ in range(length)], group, draw))
    return rows


def make_row(
    prompt: list[int], response: list[int], group: int = 0, draw: random.Random | None = None
) -> Row:
    """A row with random advantages and weights that differ from token to token."""
    draw = draw or random.Random(len(response))
    return Row(
        prompt_ids=prompt,
        response_ids=response,
        group=group,
        advantages=[draw.gauss(0, 1) for _ in response],
        token_weights=[draw.uniform(0.01, 0.1) for _ in response],
        rollout_logprobs=[draw.uniform(-3, 0) for _ in response],
    )


class Reinforce:
    """`-sum(weight * advantage * exp(logprob - old))`, and the entropy as a bonus when asked."""

    def __init__(self, entropy_coefficient: float = 0.0) -> None:
        self.entropy_coefficient = entropy_coefficient

    @property
    def needs_entropy_gradient(self) -> bool:
        return self.entropy_coefficient != 0

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio = (inputs.logprobs - inputs.old_logprobs).exp()
        token_loss = -ratio * inputs.advantages - self.entropy_coefficient * inputs.entropy
        return LossOutput(
            loss=(token_loss * inputs.token_weights).sum(),
            sums={"policy/entropy": inputs.entropy.detach().sum()},
            counts={"policy/entropy": torch.tensor(float(inputs.entropy.numel()))},
            maxima={"policy/ratio_max": ratio.detach().max()},
        )


def reference_logits(model: PreTrainedModel, row: Row) -> Tensor:
    """`[R, V]` logits of a row by the model's own forward on that sequence alone."""
    ids = torch.tensor([row.prompt_ids + row.response_ids])
    return model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]


def reference_logprobs(model: PreTrainedModel, row: Row, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`[R]` log-probs and entropies of a row, computed alone and in full."""
    distribution = (reference_logits(model, row) / temperature).log_softmax(-1)
    chosen = distribution.gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]
    return chosen, -(distribution.exp() * distribution).sum(-1)


def reference_gradients(
    model: PreTrainedModel, rows: Sequence[Row], temperature: float = 1.0
) -> dict[str, Tensor]:
    """Gradients of `Reinforce` at the old policy: `-sum(weight * advantage * grad logprob)`, row by row."""
    model.zero_grad()
    for row in rows:
        logprobs, _ = reference_logprobs(model, row, temperature)
        (-(logprobs * torch.tensor(row.advantages) * torch.tensor(row.token_weights)).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients
