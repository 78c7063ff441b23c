"""Activation checkpointing: which results of a decoder layer are computed again for its backward pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from trainer.memory.config import ActivationCheckpointing

_ATEN = torch.ops.aten
KEPT = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
]
"""Operations whose results `selective` keeps: linear layers (adapters' too) and fused attention, most of a
layer's work. Batched products stay out: attention in plain products makes them, and its scores grow with the
square of the length."""


def checkpoint_layers(model: PreTrainedModel, kind: ActivationCheckpointing, offload: bool = False) -> None:
    """Have every decoder layer of `model` compute again what `kind` says; `none` leaves it as it is.

    `offload` holds the layers' inputs in pinned memory of the host until they are needed (transformers'
    own hook). Raises ValueError when the model does not support it.
    """
    if kind is ActivationCheckpointing.none:
        return
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(model).__name__} cannot recompute its layers: set "
            "learner.memory.activation_checkpointing=none."
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if kind is ActivationCheckpointing.selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, KEPT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, offload=offload)
    model.train()  # Checkpointing layers look at this flag; dropout is off already.
