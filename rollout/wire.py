"""Requests and completions as arrays: how a round crosses a pipe or a network, to a child process or to Ray.

A response takes eight bytes a token: its id and its log-prob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rollout.engine import Completion, Request
from rollout.types import FinishReason, VersionSpan

_REASONS = tuple(FinishReason)


@dataclass(slots=True, kw_only=True, frozen=True)
class PackedRequests:
    """A round on its way to an engine. A prompt that follows itself (the samples of a group) is held once."""

    tokens: NDArray[np.int32]
    """The prompts, one after another."""
    lengths: NDArray[np.int32]
    """Tokens of each prompt."""
    prompts: NDArray[np.int32]
    """The prompt of each request."""
    seeds: NDArray[np.int64]
    """The seed of each request."""
    adapters: tuple[str | None, ...]
    """The adapter of each request."""


@dataclass(slots=True, kw_only=True, frozen=True)
class PackedCompletions:
    """A round on its way back."""

    tokens: NDArray[np.int32]
    """The responses, one after another."""
    logprobs: NDArray[np.float32]
    """One a token; what vLLM computes is float32 already."""
    lengths: NDArray[np.int32]
    """Tokens of each response."""
    reasons: NDArray[np.uint8]
    """Why each ended: its place in `FinishReason`."""
    spans: NDArray[np.int32]
    """`[spans, 4]`: response, start, end, version."""


def pack_requests(requests: Sequence[Request]) -> PackedRequests:
    """The arrays that `unpack_requests` turns back into equal requests."""
    prompts: list[list[int]] = []
    places = []
    for request in requests:
        if not prompts or request.prompt_ids is not prompts[-1]:
            prompts.append(request.prompt_ids)
        places.append(len(prompts) - 1)
    return PackedRequests(
        tokens=_joined(prompts, np.int32),
        lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        prompts=np.array(places, np.int32),
        seeds=np.array([request.seed for request in requests], np.int64),
        adapters=tuple(request.adapter for request in requests),
    )


def unpack_requests(packed: PackedRequests) -> list[Request]:
    """The requests; those with the same prompt share its list."""
    prompts = _split(packed.tokens, packed.lengths)
    return [
        Request(prompt_ids=prompts[place], seed=seed, adapter=adapter)
        for place, seed, adapter in zip(packed.prompts.tolist(), packed.seeds.tolist(), packed.adapters)
    ]


def pack_completions(completions: Sequence[Completion]) -> PackedCompletions:
    """The arrays that `unpack_completions` turns back into equal completions."""
    spans = [
        (index, span.start, span.end, span.version)
        for index, completion in enumerate(completions)
        for span in completion.version_spans
    ]
    return PackedCompletions(
        tokens=_joined([completion.token_ids for completion in completions], np.int32),
        logprobs=_joined([completion.logprobs for completion in completions], np.float32),
        lengths=np.array([len(completion.token_ids) for completion in completions], np.int32),
        reasons=np.array([_REASONS.index(c.finish_reason) for c in completions], np.uint8),
        spans=np.array(spans, np.int32).reshape(-1, 4),
    )


def unpack_completions(packed: PackedCompletions) -> list[Completion]:
    """The completions, in order."""
    completions = [
        Completion(token_ids=token_ids, logprobs=logprobs, finish_reason=_REASONS[reason])
        for token_ids, logprobs, reason in zip(
            _split(packed.tokens, packed.lengths),
            _split(packed.logprobs, packed.lengths),
            packed.reasons.tolist(),
        )
    ]
    for index, start, end, version in packed.spans.tolist():
        completions[index].version_spans.append(VersionSpan(start=start, end=end, version=version))
    return completions


def _joined(lists: Sequence[Sequence[float]], dtype: type[np.number]) -> NDArray:
    flat = [value for values in lists for value in values]
    return np.array(flat, dtype)


def _split(values: NDArray, lengths: NDArray[np.int32]) -> list[list]:
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])] if len(lengths) else []
