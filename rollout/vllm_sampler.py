"""The sampler that our CPU engines use inside vLLM: one exponential a token of the vocabulary, not three.

vLLM 0.32 samples on a CPU by adding Gumbel noise to every logit (two logarithms and a hash each) and takes a
separate log-softmax for the log-prob: 34 ms of a 150 ms decoding step of SmolLM2-135M at 128 sequences on
one core. Here the softmax serves both: a token is drawn by inverting its cumulative sum, with one uniform
number a request, and its log-prob is read from it. 5 ms, and the same distribution.

Imported only where an engine is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

BLOCK = 128
"""Tokens whose probabilities are summed first; the cumulative sum runs over these sums, then inside one
block."""


class InverseSampler(Sampler):
    """vLLM's `Sampler`, with its own path for the batches that training makes.

    That is: every request samples at a temperature above 0 and wants the log-prob of its own token or none.
    Any other batch (greedy, top log-probs, chosen token ids) goes through vLLM's code.
    """

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """Sample one token a row of `logits` `[B, V]`; log-probs are those of the sampling distribution."""
        wanted = sampling_metadata.max_num_logprobs
        mode = logprobs_mode_override or self.logprobs_mode
        if (
            not sampling_metadata.all_random
            or wanted not in (None, 0)
            or sampling_metadata.logprob_token_ids
            or mode != "processed_logprobs"
        ):
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        logits = self.apply_logits_processors(logits.float(), sampling_metadata, predict_bonus_token)
        assert sampling_metadata.temperature is not None
        logits = self.apply_temperature(logits, sampling_metadata.temperature, all_random=True)
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        logits = apply_top_k_top_p(logits, sampling_metadata.top_k, sampling_metadata.top_p)
        tokens, logprobs = draw(logits.softmax(-1), uniforms(len(logits), sampling_metadata.generators))
        return SamplerOutput(
            sampled_token_ids=tokens.to(torch.int32),
            logprobs_tensors=None if wanted is None else _unranked(tokens, logprobs.float()),
        )

    @staticmethod
    def gather_logprobs(
        logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
    ) -> LogprobsTensors:
        """As vLLM's, without counting ranks (which compiles C++) when only the tokens' own values are
        wanted."""
        if num_logprobs:
            return Sampler.gather_logprobs(logprobs, num_logprobs, token_ids)
        return _unranked(token_ids[:, None], logprobs.gather(-1, token_ids[:, None]))


def _unranked(tokens: torch.Tensor, logprobs: torch.Tensor) -> LogprobsTensors:
    ranks = torch.zeros(len(tokens), dtype=torch.int64)
    return LogprobsTensors(tokens.to(torch.int32), logprobs, ranks)


def uniforms(rows: int, generators: dict[int, torch.Generator]) -> torch.Tensor:
    """`[B, 1]` float64 in [0, 1): a request's own generator where it has one, else the global one."""
    values = torch.rand(rows, dtype=torch.float64)
    for row, generator in generators.items():
        values[row] = torch.rand((), generator=generator, dtype=torch.float64)
    return values[:, None]


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens where the cumulative sum of `probabilities` `[B, V]` first exceeds `uniform` `[B, 1]`.

    Returns tokens `[B, 1]` int64 and their log-probs `[B, 1]` float64. A token of probability 0 is never
    drawn. Raises ValueError for probabilities that are not finite.
    """
    rows, vocabulary = probabilities.shape
    if vocabulary % BLOCK:
        probabilities = pad(probabilities, (0, -vocabulary % BLOCK))
    blocks = probabilities.view(rows, -1, BLOCK)
    masses = blocks.sum(-1).double()
    if not masses.isfinite().all():
        raise ValueError("The engine's logits are not finite: its weights are broken.")
    block, rest = _invert(masses, uniform)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double()
    position, _ = _invert(inside, rest)
    logprobs = inside.gather(1, position).log() - masses.sum(-1, keepdim=True).log()
    return block * BLOCK + position, logprobs


def _invert(masses: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the share `uniform` `[B, 1]` of the total of `masses` `[B, K]` falls: index, and share of that
    mass."""
    cumulative = masses.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)
    mass = masses.gather(1, index)
    return index, ((target - (cumulative.gather(1, index) - mass)) / mass).clamp_(0.0, 1.0)


def install(worker: Any) -> None:
    """Runs in the worker: give its model runner this sampler in the place of vLLM's."""
    runner = worker.model_runner
    if type(runner.sampler) is not Sampler:
        raise TypeError(
            f"vLLM's CPU model runner has a {type(runner.sampler).__name__} where its Sampler was."
        )
    runner.sampler = InverseSampler(runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel)
