"""LayerCast in vLLM: a quantization method of our own, made known through vLLM's public functions.

An engine is started with `dtype=float32, quantization=whetstone_layercast`: vLLM then allocates activations,
norms, biases, rotary tables, KV cache and logits in float32, and asks this configuration for what linear
layers and embeddings do (`rollout.layercast_layers`). Cheap to import and to register: vLLM's layers are
imported only when a model is built.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

NAME = "whetstone_layercast"
"""vLLM's name for it."""


class LayerCastConfig(QuantizationConfig):
    """Weights of linear layers, embedding and head in `stored`, everything computed in float32."""

    stored = torch.bfloat16
    """`trainer.numerics.STORED`, which is not imported where plugins are made known."""

    def get_name(self) -> Any:
        """`NAME`; vLLM types it as one of its own names."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """float32 alone: vLLM refuses to build an engine of another dtype."""
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: nothing but float32 products is asked of it."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: every dense checkpoint will do."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Never reached with a model that fits. Raises ValueError: a quantized checkpoint has no bfloat16
        weights to keep."""
        raise ValueError(
            f"rollout.numerics=layercast keeps bfloat16 weights, and the model is quantized "
            f"({config.get('quant_method', 'unknown method')}): set rollout.numerics=standard."
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What `layer` does; None for those without weights of their own (attention).

        Raises ValueError for mixtures of experts, which vLLM multiplies by kernels of their own.
        """
        from rollout.layercast_layers import method_for

        return method_for(layer, prefix, self.stored)


def register() -> None:
    """Make LayerCast known to vLLM in this process; calling it again changes nothing."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(LayerCastConfig)


def stored_dtype(model_config: Any) -> torch.dtype:
    """The number format of the tensors that a vLLM model is loaded from and published in."""
    return (
        LayerCastConfig.stored if model_config.quantization == NAME else cast(torch.dtype, model_config.dtype)
    )
