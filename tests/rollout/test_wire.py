"""Rounds as arrays: nothing is lost on the way."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import numpy as np

from rollout.engine import Completion, Request, Sampling
from rollout.types import FinishReason, VersionSpan
from rollout.wire import pack_completions, pack_requests, unpack_completions, unpack_requests

if TYPE_CHECKING:
    from rollout.vllm_engine import VllmEngine


def test_requests_come_back_and_a_groups_prompt_is_held_once() -> None:
    first, second = [1, 70, 80], [1, 90]
    requests = [Request(prompt_ids=first, seed=(1 << 63) - 1 - i, adapter="a@1" * (i == 2)) for i in range(3)]
    requests += [Request(prompt_ids=second, seed=i) for i in range(2)]
    packed = pickle.loads(pickle.dumps(pack_requests(requests)))
    assert packed.tokens.tolist() == [1, 70, 80, 1, 90]
    assert unpack_requests(packed) == requests


def test_completions_come_back() -> None:
    completions = [
        Completion(
            token_ids=[5, 128_255],
            logprobs=[-0.5, -1.25],
            finish_reason=FinishReason.STOP,
            version_spans=[
                VersionSpan(start=0, end=1, version=7),
                VersionSpan(start=1, end=2, version=8),
            ],
        ),
        Completion(token_ids=[], logprobs=[], finish_reason=FinishReason.ABORT),
        Completion(token_ids=[9], logprobs=[float("-inf")], finish_reason=FinishReason.LENGTH),
    ]
    assert unpack_completions(pack_completions(completions)) == completions
    assert unpack_completions(pack_completions([])) == []
    assert unpack_requests(pack_requests([])) == []


def test_a_response_takes_eight_bytes_a_token() -> None:
    made = Completion(token_ids=[40_000] * 1000, logprobs=[-0.1] * 1000, finish_reason=FinishReason.LENGTH)
    packed = pack_completions([made] * 128)
    assert packed.tokens.nbytes + packed.logprobs.nbytes == 128 * 1000 * 8
    assert len(pickle.dumps(packed)) < 128 * 1000 * 8 + 4096


def test_what_the_engine_computes_is_held_exactly(engine: VllmEngine) -> None:
    requests = [Request(prompt_ids=[1, 70, 80], seed=i) for i in range(8)]
    made = engine.generate(requests, Sampling(max_tokens=16, temperature=0.7, top_p=0.9))
    assert unpack_completions(pack_completions(made)) == made
    assert all(float(np.float32(value)) == value for one in made for value in one.logprobs)
