"""`Policy`: packed tokens in, log-probs and entropy out. The one module that a learner trains.

Decoder, head and the loop over the vocabulary all run inside `Policy.forward`, so that FSDP2 can wrap this
module as its root: nothing outside touches a submodule in the training path.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.attention import ATTENTION_NAME, AttentionLayout, supports_sharing
from trainer.batch import Row, TokenBatch
from trainer.lean_layers import use_lean_layers
from trainer.logprobs import HeadOptions, VocabularyRanks, head_logprobs
from trainer.packing import pack

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class PolicyOutput:
    """Per response token, float32."""

    logprobs: Tensor
    """`[M]`: log-prob of each target under the distribution at the given temperature."""
    entropy: Tensor
    """`[M]`: entropy of that distribution in nats."""


class Policy(nn.Module):
    """A causal language model seen as `TokenBatch -> log-probs, entropy`.

    `shares_prompts` says whether it takes batches in which a group's prompt stands once. It does when the
    model's attention runs through transformers' `AttentionInterface` and sees all that precedes; proven at
    construction on a few tokens, not assumed. Other models take one response a span and run on padded rows
    with their own attention.
    """

    def __init__(self, model: PreTrainedModel, share_prompts: bool = True) -> None:
        """Wrap `model`, changing its attention implementation if it can share.

        Raises:
            ValueError: the model's logits are not a plain head over its last hidden state.
        """
        super().__init__()
        self.model = model
        self.logit_scale = _logit_scale(model)
        self.shares_prompts = False
        self.why_not_shared = "learner.share_prompts is false"
        self.vocabulary_ranks: VocabularyRanks | None = None
        """With whom the head's work is shared, see `trainer.parallel.tensor`."""
        self.packs = False
        """Whether attention runs on packed lines (`trainer.attention`)."""
        _silence_dropout(model)
        own_attention = model.config._attn_implementation
        use_lean_layers(model)
        expected = self._check_head()
        self.packs, reason = self._try_packing(expected)
        self.shares_prompts = self.packs and share_prompts
        if not self.packs:
            model.set_attn_implementation(own_attention)
            self.why_not_shared = reason
            if share_prompts:
                logger.warning("Prompts are not shared within a group: %s.", reason)

    def forward(
        self, batch: TokenBatch, temperature: float = 1.0, entropy_gradient: bool = False
    ) -> PolicyOutput:
        """Log-probs and entropy of the batch's `M` response tokens.

        Args:
            batch: packed tokens on this module's device.
            temperature: logits are divided by it, as the engine does when sampling.
            entropy_gradient: whether `entropy` carries a gradient.
        """
        layout = AttentionLayout.build(batch.spans, batch.input_ids.device) if self.packs else None
        return self._run(batch, layout, temperature, entropy_gradient)

    def _run(
        self, batch: TokenBatch, layout: AttentionLayout | None, temperature: float, entropy_gradient: bool
    ) -> PolicyOutput:
        # The last token of a shared prompt predicts the first of every response: one row of the head.
        predictors, positions = batch.predictors.unique(return_inverse=True)
        hidden = self._hidden(batch, layout, predictors)
        head = self.model.get_output_embeddings()
        options = HeadOptions(
            scale=self.logit_scale / temperature,
            entropy_gradient=entropy_gradient,
            ranks=self.vocabulary_ranks,
        )
        logprobs, entropy = head_logprobs(hidden, head.weight, head.bias, positions, batch.targets, options)
        return PolicyOutput(logprobs=logprobs, entropy=entropy)

    def compile_layers(self) -> None:
        """Compile each decoder layer in place, for varying numbers of tokens. Attention stays as it is.

        Raises:
            ValueError: the model keeps its layers elsewhere than transformers' decoders do.
        """
        layers = getattr(self.model.get_decoder(), "layers", None)
        if layers is None:
            raise ValueError(
                f"{type(self.model).__name__} has no list of decoder layers: set learner.compile=false."
            )
        for layer in layers:
            layer.compile(dynamic=True)

    def _hidden(self, batch: TokenBatch, layout: AttentionLayout | None, predictors: Tensor) -> Tensor:
        """`[U, D]` final hidden states of the packed positions `predictors`."""
        decoder = self.model.get_decoder()
        if layout is None:
            return self._padded_hidden(decoder, batch, predictors)
        output = decoder(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            layout=layout,
        )
        return output.last_hidden_state[0].index_select(0, predictors)

    def _padded_hidden(self, decoder: nn.Module, batch: TokenBatch, predictors: Tensor) -> Tensor:
        """The same for models with their own attention: one right-padded row a span."""
        lengths = torch.tensor([span.length for span in batch.spans], device=batch.input_ids.device)
        real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        place = real.flatten().nonzero()[:, 0]
        ids = torch.zeros_like(real, dtype=torch.int64).masked_scatter_(real, batch.input_ids)
        output = decoder(input_ids=ids, attention_mask=real.long(), use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, place[predictors])

    @torch.no_grad()
    def _check_head(self) -> Tensor:
        """Compare with the model's own logits on the probe, one sequence at a time: `[M]` log-probs."""
        expected = []
        for row in _PROBE:
            ids = torch.tensor([row.prompt_ids + row.response_ids], device=self.model.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
            chosen = ids[0, len(row.prompt_ids) :, None]
            expected.append(logits.float().log_softmax(-1).gather(1, chosen)[:, 0])
        reference = torch.cat(expected)
        if not self._agrees(reference, None):
            raise ValueError(
                f"{type(self.model).__name__} computes its logits with more than a linear head "
                "(soft-capping, or a scale that its config does not name): it cannot be trained here."
            )
        return reference

    def _try_packing(self, expected: Tensor) -> tuple[bool, str]:
        """Switch to packed attention; returns whether the probe still agrees, and else why not."""
        name = type(self.model).__name__
        reason = supports_sharing(self.model.config)
        if reason is not None:
            return False, f"{name} does not take shared prefixes, {reason}"
        (batch,) = pack(_PROBE, token_budget=1 << 20, share_prompts=True)
        layout = AttentionLayout.build(batch.spans, self.model.device)
        try:
            self.model.set_attn_implementation(ATTENTION_NAME)
            agrees = self._agrees(expected, layout)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            return False, f"{name} does not run on packed attention ({error})"
        routed = layout.calls == self.model.config.num_hidden_layers
        return agrees and routed, f"{name} does not route its attention through transformers' interface"

    @torch.no_grad()
    def _agrees(self, expected: Tensor, layout: AttentionLayout | None) -> bool:
        (batch,) = pack(_PROBE, token_budget=1 << 20, share_prompts=layout is not None)
        got = self._run(batch.to(self.model.device), layout, 1.0, False).logprobs
        order = sorted(range(batch.rows), key=lambda row: batch.row_indices[row])
        restored = torch.cat([got[(batch.row_ids == row).to(got.device)] for row in order])
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.25
        return bool((restored - expected).abs().max() < tolerance)


def _probe_row(response: list[int]) -> Row:
    zeros = [0.0] * len(response)
    return Row(
        prompt_ids=[5, 7, 11, 6],
        response_ids=response,
        group=0,
        advantages=zeros,
        token_weights=zeros,
        rollout_logprobs=zeros,
    )


_PROBE = [_probe_row([8, 9, 10, 12, 8]), _probe_row([13, 8, 14])]
"""Two responses to one prompt, ids that every vocabulary has."""


def _logit_scale(model: PreTrainedModel) -> float:
    """The factor that the model's own forward puts on its logits."""
    config = model.config
    if getattr(config, "final_logit_softcapping", None):
        raise ValueError(
            f"{type(model).__name__} soft-caps its logits (final_logit_softcapping="
            f"{config.final_logit_softcapping}), which the learner does not support: choose another model."
        )
    return float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )


def _silence_dropout(model: PreTrainedModel) -> None:
    """Dropout would make the learner another policy than the one that sampled: it is turned off."""
    silenced = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            silenced += 1
        if getattr(module, "attention_dropout", 0):
            module.attention_dropout = 0.0  # type: ignore[assignment]
            silenced += 1
    if silenced:
        logger.warning(
            "Dropout was turned off in %d modules: learner and engine must be one policy.", silenced
        )
