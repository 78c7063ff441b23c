"""An adapter and its base as one model on the disk."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf.models import ResolvedModel
from trainer.model import hub_names, load_model, save_model


def merge_adapter(resolved: ResolvedModel, dtype: torch.dtype, folder: Path) -> None:
    """Write base and adapter to `folder` as one model, added in float32 and rounded once to `dtype`.

    Raises `ValueError` when there is no adapter.
    """
    if resolved.adapter is None:
        raise ValueError(f"{resolved.description} has no adapter to merge.")
    from adapters import lora  # loads peft, which nothing else here needs

    base = load_model(resolved.folder, trust_remote_code=resolved.trust_remote_code)
    merged = lora.load(base, resolved.adapter)
    weights = dict(merged.model.named_parameters())
    save_model(merged.model, hub_names(merged.model, merged.merged(dtype, weights)), folder)
