"""Shared-prefix attention: a group's prompt is computed once, its responses see prompt + themselves.

Registered with transformers' `AttentionInterface` under `ATTENTION_NAME`, so that every model which routes
its attention through the interface runs on a packed line of `N` tokens. The packed line carries its shape in
an `AttentionLayout`, which travels as a keyword argument through the model.

The attention is exact, forward and backward: it is the attention of each response's own sequence, computed
for all responses together. On CPU the queries are gathered into dense blocks (`_Block`), prompts with
prompts and responses with responses of like length; on CUDA `flex_attention` takes the same pattern as a
block-sparse mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from trainer.batch import GroupSpan

ATTENTION_NAME = "whetstone"
"""`config._attn_implementation` of a model whose attention runs through this module."""

_PADDING_SHARE = 0.25
"""A block stops taking in shorter sequences when padding would exceed this share of its queries."""
_LONG = 512
"""Keys above which a CPU block goes to SDPA's tiled kernel; below, plain products are twice as fast."""
_PIECE = 1 << 20
"""Scores computed at once. A block of no more keeps its probabilities for the backward pass, a larger one
computes them again."""


@dataclass(slots=True)
class _Block:
    """`B` sequences of queries, padded to a length, with the keys that they may see."""

    queries: Tensor
    """`[B, Lq]` packed index of each query; padding points at token 0 and is never read back."""
    keys: Tensor
    """`[B, Lk]` packed index of each key."""
    visible: Tensor
    """`[B, Lq, Lk]` bool: may the query see the key. Every query sees at least one."""


@dataclass(slots=True)
class AttentionLayout:
    """How the `N` tokens of a packed line see each other."""

    blocks: list[_Block] = field(default_factory=list)
    places: Tensor | None = None
    """`[N]`: where each token's query lies in the flattened blocks, laid end to end."""
    flex_mask: Any = None
    calls: int = 0
    """Layers that ran on this layout; tells whether a model routes its attention through here."""
    rows: dict[int, _Rows] = field(default_factory=dict)
    """Row indices by number of KV heads, made at the first layer and used by all."""

    @classmethod
    def build(cls, spans: Sequence[GroupSpan], device: torch.device) -> AttentionLayout:
        """The layout of a packed batch, ready for `device`."""
        tokens = sum(span.length for span in spans)
        if device.type == "cuda":
            return cls(flex_mask=_flex_mask(spans, tokens, device))
        blocks, places = _blocks(spans, tokens)
        return cls(blocks=blocks, places=places)

    def rows_of(self, kv_heads: int) -> _Rows:
        """Row indices for tensors seen as `[N * kv_heads, ...]`."""
        if kv_heads not in self.rows:
            assert self.places is not None
            self.rows[kv_heads] = _Rows.build(self.blocks, self.places, kv_heads)
        return self.rows[kv_heads]


@dataclass(slots=True)
class _Rows:
    """The layout in rows: a row is what one token has for one KV head. One gather moves and sorts."""

    queries: list[Tensor]
    """By block `[B * Hkv * Lq]`."""
    keys: list[Tensor]
    """By block `[B * Hkv * Lk]`."""
    places: Tensor
    """`[N * Hkv]`: where a row lies in the gathered query rows of all blocks."""

    @classmethod
    def build(cls, blocks: Sequence[_Block], places: Tensor, kv_heads: int) -> _Rows:
        heads = torch.arange(kv_heads)

        def expand(index: Tensor) -> Tensor:
            return (index[:, None, :] * kv_heads + heads[:, None]).flatten()

        # Gathered rows lie as (block, b, h, l); `places` counts (block, b, l).
        offset, order = 0, []
        for block in blocks:
            order.append(expand(offset + torch.arange(block.queries.numel()).view_as(block.queries)))
            offset += block.queries.numel()
        rank = torch.empty(offset * kv_heads, dtype=torch.int64)
        rank[torch.cat(order)] = torch.arange(offset * kv_heads)
        wanted = (places[:, None] * kv_heads + heads).flatten()
        return cls(
            queries=[expand(block.queries) for block in blocks],
            keys=[expand(block.keys) for block in blocks],
            places=rank[wanted],
        )


def supports_sharing(config: PretrainedConfig) -> str | None:
    """Why a model of this config cannot share prompts by its attention pattern, or None when it can."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of kind {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"it attends in a sliding window of {config.sliding_window} tokens"
    for name in ("attention_chunk_size", "attn_logit_softcapping", "alibi"):
        if getattr(config, name, None):
            return f"its attention has {name}={getattr(config, name)}"
    return None


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: AttentionLayout | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        module: the attention module, unused but for the head dimension.
        query: `[1, Hq, N, D]`.
        key: `[1, Hkv, N, D]`, `Hq` a multiple of `Hkv`.
        value: `[1, Hkv, N, D]`.
        attention_mask: None; the layout says it all.
        scaling: factor on the scores; `D ** -0.5` when None.
        layout: of the packed line.
        unused: `is_causal`, `dropout` and the like.

    Returns:
        `[1, N, Hq, D]` and None (no attention weights).

    Raises:
        ValueError: no layout came, or the layer asks for attention that the layout does not describe.
    """
    if layout is None:
        raise ValueError(
            "Packed attention was called without a layout: run the model through trainer.policy.Policy."
        )
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if unused.get(name) is not None:
            raise ValueError(f"Packed attention does not know {name}: set learner.share_prompts=false.")
    layout.calls += 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if layout.flex_mask is not None:
        return _flex_attention(query, key, value, layout.flex_mask, scale), None
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _block_attention(query, key, value, layout, scale)[None], None


AttentionInterface.register(ATTENTION_NAME, packed_attention)


def _block_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float
) -> Tensor:
    """`[N, Hq, D]` attention on CPU, block by block.

    Raises ValueError for values that are wider or narrower than keys.
    """
    tokens, heads, width = query.shape
    if value.shape[-1] != width:
        raise ValueError(
            f"Packed attention does not know values of {value.shape[-1]} dimensions beside keys of {width}: "
            "set learner.share_prompts=false."
        )
    kv_heads = key.shape[1]
    rows = layout.rows_of(kv_heads)
    query = query.reshape(tokens * kv_heads, -1)
    key, value = key.reshape(tokens * kv_heads, width), value.reshape(tokens * kv_heads, width)
    outputs = []
    for block, query_rows, key_rows in zip(layout.blocks, rows.queries, rows.keys):
        attend = _attend_long if block.keys.shape[1] > _LONG else _attend_short
        outputs.append(attend(query, key, value, block, query_rows, key_rows, scale))
    return torch.cat(outputs).index_select(0, rows.places).view(tokens, heads, width)


def _attend_long(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: _Block,
    query_rows: Tensor,
    key_rows: Tensor,
    scale: float,
) -> Tensor:
    """Rows of output for one block by SDPA, which tiles. A KV head's query heads fold into the length."""
    (batch, length), width = block.queries.shape, key.shape[1]
    fold = query.shape[1] // width
    queries = query.index_select(0, query_rows).view(batch, -1, length * fold, width)
    keys, values = (
        tensor.index_select(0, key_rows).view(batch, -1, block.keys.shape[1], width)
        for tensor in (key, value)
    )
    mask = block.visible.repeat_interleave(fold, dim=1)[:, None]
    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return output.reshape(-1, fold * width)


def _attend_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: _Block,
    query_rows: Tensor,
    key_rows: Tensor,
    scale: float,
) -> Tensor:
    """Rows of output for one block by plain products."""
    return _ShortAttention.apply(query, key, value, block, query_rows, key_rows, scale)


class _ShortAttention(torch.autograd.Function):
    """Softmax attention of one block with a backward written out.

    Scores and softmax are float32, as in tiled kernels; the other products run in the tensors' own dtype.
    Gradients of keys, which many queries share, are summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block: _Block,
        query_rows: Tensor,
        key_rows: Tensor,
        scale: float,
    ) -> Tensor:
        queries, keys, values = _gather(query, key, value, block, query_rows, key_rows)
        output = torch.empty_like(queries)
        probabilities = None
        pieces = _pieces(queries, keys)
        for piece in pieces:
            probabilities = _probabilities(queries, keys, block, piece, scale)
            torch.bmm(probabilities, values[piece], out=output[piece])
        kept = probabilities if len(pieces) == 1 else None
        ctx.save_for_backward(query, key, value, query_rows, key_rows, kept)
        ctx.block, ctx.scale = block, scale
        return output.view(len(query_rows), query.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, query_rows, key_rows, kept = ctx.saved_tensors
        queries, keys, values = _gather(query, key, value, ctx.block, query_rows, key_rows)
        grad = grad.view_as(queries)
        query_grad, key_grad, value_grad = (torch.empty_like(tensor) for tensor in (queries, keys, values))
        for piece in _pieces(queries, keys):
            probabilities = kept
            if probabilities is None:
                probabilities = _probabilities(queries, keys, ctx.block, piece, ctx.scale)
            torch.bmm(probabilities.transpose(1, 2), grad[piece], out=value_grad[piece])
            slope = torch.bmm(grad[piece], values[piece].transpose(1, 2))
            slope = torch._softmax_backward_data(slope, probabilities, -1, slope.dtype)
            torch.bmm(slope, keys[piece], out=query_grad[piece])
            torch.bmm(slope.transpose(1, 2), queries[piece], out=key_grad[piece])
        return (
            _scatter(query_grad.mul_(ctx.scale), query_rows, query),
            _scatter(key_grad.mul_(ctx.scale), key_rows, key),
            _scatter(value_grad, key_rows, value),
            *[None] * 4,
        )


def _gather(
    query: Tensor, key: Tensor, value: Tensor, block: _Block, query_rows: Tensor, key_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`[B * Hkv, Lq * fold, D]` queries, `[B * Hkv, Lk, D]` keys and values."""
    width = key.shape[1]
    length = block.queries.shape[1] * (query.shape[1] // width)
    return (
        query.index_select(0, query_rows).view(-1, length, width),
        key.index_select(0, key_rows).view(-1, block.keys.shape[1], width),
        value.index_select(0, key_rows).view(-1, block.keys.shape[1], width),
    )


def _pieces(queries: Tensor, keys: Tensor) -> list[slice]:
    """Ranges of `B * Hkv` whose scores are few enough to stay in cache."""
    count = len(queries)
    size = max(1, _PIECE // (queries.shape[1] * keys.shape[1]))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _probabilities(queries: Tensor, keys: Tensor, block: _Block, piece: slice, scale: float) -> Tensor:
    """`[piece, Lq * fold, Lk]` in the dtype of the queries."""
    nothing = torch.zeros((), device=queries.device)
    left, right = queries[piece].float(), keys[piece].float().transpose(1, 2)
    scores = torch.baddbmm(nothing, left, right, beta=0, alpha=scale)
    batch, length, seen = block.visible.shape
    sequence = torch.arange(piece.start, piece.stop) // (len(queries) // batch)
    by_head = scores.view(len(scores), length, -1, seen)
    by_head.masked_fill_(~block.visible[sequence][:, :, None, :], -torch.inf)
    return torch.softmax(scores, -1).to(queries.dtype)


def _scatter(grad: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Sum gradients of gathered rows in float32."""
    total = torch.zeros(like.shape, dtype=torch.float32)
    return total.index_add_(0, rows, grad.reshape(len(rows), -1).float()).to(like.dtype)


def _blocks(spans: Sequence[GroupSpan], tokens: int) -> tuple[list[_Block], Tensor]:
    """Blocks that cover every token once as a query, and where to read each token's output."""
    prompts = [(span.prompt_start, span.prompt_length, 0, 0) for span in spans]
    responses = [
        (start, length, span.prompt_start, span.prompt_length)
        for span in spans
        for start, length in zip(span.response_starts, span.response_lengths)
        if length
    ]
    blocks: list[_Block] = []
    places = torch.empty(tokens, dtype=torch.int64)
    offset = 0
    for sequences in (prompts, responses):
        for members in _buckets(sequences):
            block = _block(members)
            real = torch.arange(block.queries.shape[1]) < torch.tensor([m[1] for m in members])[:, None]
            places[block.queries[real]] = offset + real.flatten().nonzero()[:, 0]
            offset += real.numel()
            blocks.append(block)
    return blocks, places


def _buckets(sequences: list[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
    """Sequences sorted by length and cut where padding to the longest would waste too much."""
    buckets: list[list[tuple[int, int, int, int]]] = []
    real = 0
    for sequence in sorted(sequences, key=lambda item: (-item[1], -item[3])):
        length = sequence[1]
        if buckets:
            padded = (len(buckets[-1]) + 1) * buckets[-1][0][1]
            if padded - (real + length) <= _PADDING_SHARE * padded + 16 * (len(buckets[-1]) + 1):
                buckets[-1].append(sequence)
                real += length
                continue
        buckets.append([sequence])
        real = length
    return buckets


def _block(members: Sequence[tuple[int, int, int, int]]) -> _Block:
    """The block of `(start, length, prefix_start, prefix_length)` sequences: causal behind a whole prefix."""
    start, length, prefix_start, prefix = torch.tensor(members).T[:, :, None]
    own, before = torch.arange(int(length.max())), torch.arange(int(prefix.max()))
    real = own < length
    queries = torch.where(real, start + own, 0)
    keys = torch.cat([torch.where(before < prefix, prefix_start + before, 0), queries], dim=1)
    # A padded query may see all that its row sees, so that its softmax is finite.
    causal = (own[:, None] >= own) & real[:, None, :]
    visible = (before < prefix)[:, None, :].expand(-1, len(own), -1)
    return _Block(queries=queries, keys=keys, visible=torch.cat([visible, causal], dim=2))


def _flex_mask(spans: Sequence[GroupSpan], tokens: int, device: torch.device) -> Any:
    """The block-sparse mask for `flex_attention`: causal, same group, and prompt or same response."""
    from torch.nn.attention.flex_attention import create_block_mask

    group = torch.empty(tokens, dtype=torch.int32)
    segment = torch.empty(tokens, dtype=torch.int32)
    for number, span in enumerate(spans):
        group[span.prompt_start : span.prompt_start + span.length] = number
        segment[span.prompt_start : span.prompt_start + span.prompt_length] = -1
        for response, (start, length) in enumerate(zip(span.response_starts, span.response_lengths)):
            segment[start : start + length] = response
    group, segment = group.to(device), segment.to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (segment[key] == -1) | (segment[key] == segment[query])
        return (query >= key) & (group[query] == group[key]) & same

    return create_block_mask(visible, None, None, tokens, tokens, device=device)


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """`[1, N, Hq, D]` attention on CUDA."""
    output = _compiled_flex()(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2)


_FLEX: list[Any] = []


def _compiled_flex() -> Any:
    """`flex_attention`, compiled once a process: uncompiled it materialises all scores."""
    if not _FLEX:
        from torch.nn.attention.flex_attention import flex_attention

        _FLEX.append(torch.compile(flex_attention, dynamic=True))
    return _FLEX[0]
