"""What vLLM's linear layers, embedding and head do under LayerCast. Imported where a model is built.

Head and embedding are stored in bfloat16 too, one tensor where they are tied: in a small model they are a
fifth to a half of all weights. (The paper's released patch leaves them in float32.) vLLM creates biases and
norms in the model's float32; they hold the checkpoint's bfloat16 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from trainer.numerics import layercast_linear, require_exact_products


def method_for(layer: nn.Module, prefix: str, stored: torch.dtype) -> QuantizeMethodBase | None:
    """See `rollout.layercast.LayerCastConfig.get_quant_method`."""
    if isinstance(layer, LinearBase):
        return LayerCastLinearMethod(stored)
    if isinstance(layer, VocabParallelEmbedding):
        return LayerCastEmbeddingMethod(stored)
    if "MoE" in type(layer).__name__ or "Experts" in type(layer).__name__:
        raise ValueError(
            f"rollout.numerics=layercast does not know {prefix} ({type(layer).__name__}), a mixture of "
            "experts: set rollout.numerics=standard."
        )
    return None


@register_weight_loader_v2_supported_method
class LayerCastLinearMethod(LinearMethodBase):
    """A weight in `stored`, upcast for each product. q, k and v (gate and up) are one weight, as ever."""

    supports_pre_processed_weights = True

    def __init__(self, stored: torch.dtype) -> None:
        self._stored = stored

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """`layer.weight`, `[sum(output_partition_sizes), input_size_per_partition]`, whatever
        `params_dtype`."""
        rows = sum(output_partition_sizes)
        weight = ModelWeightParameter(
            data=torch.empty(rows, input_size_per_partition, dtype=self._stored),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs.pop("weight_loader"),
        )
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep the weight as it is: what vLLM would repack is a copy, which a publish would leave stale.

        Raises ValueError where float32 products are not float32.
        """
        if not layer.weight.is_meta:
            require_exact_products(layer.weight.device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., out]` float32 of `x` `[..., in]` float32."""
        return layercast_linear(x, layer.weight, bias)


class LayerCastEmbeddingMethod(QuantizeMethodBase):
    """Embedding and head, whose weight vLLM pads to a multiple of 64 rows.

    Not a subclass of vLLM's `UnquantizedEmbeddingMethod`, which stands for a table that fused kernels may
    read as if it were in the model's dtype.
    """

    supports_pre_processed_weights = True

    def __init__(self, stored: torch.dtype) -> None:
        self._stored = stored

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """`layer.weight`, `[rows, hidden]`."""
        rows = sum(output_partition_sizes)
        data = torch.empty(rows, input_size_per_partition, dtype=self._stored)
        weight = Parameter(data, requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """`[..., hidden]` float32; only the rows looked up are upcast."""
        return F.embedding(input_, layer.weight).float()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., rows]` float32 logits."""
        return layercast_linear(x, layer.weight, bias)
