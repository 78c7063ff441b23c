"""New weights in the midst of a round: published and proven, and every token's log-prob is its version's."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.child_engine import ChildEngine
from rollout.engine import Completion, Request, Sampling
from rollout.engine_spec import EngineSpec
from rollout.turns import paused
from rollout.weights.config import WeightsConfig
from rollout.weights.publisher import Publisher
from tests.rollout.weights.learners import PlainLearner, sequences

pytest.importorskip("vllm", reason="vLLM is not installed")

LENGTH = 200
PROMPTS = [[1, 70, 80, 90 + index] for index in range(12)]
SAMPLING = Sampling(max_tokens=LENGTH, ignore_eos=True)


@pytest.fixture(scope="module")
def child(tiny_llama: Path) -> Iterator[ChildEngine]:
    """One with room for eight sequences: four of a round of twelve wait while the others decode."""
    spec = EngineSpec(
        model=str(tiny_llama),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_bytes=64 << 20,
        threads=1,
        eager=True,
        transport="shm",
    )
    engine = ChildEngine(spec)
    yield engine
    engine.close()


def requests() -> list[Request]:
    return [Request(prompt_ids=prompt, seed=index) for index, prompt in enumerate(PROMPTS)]


def begun(child: ChildEngine, thread: ThreadPoolExecutor) -> Future[list[Completion]]:
    """A round that the engine is in the midst of."""
    work = thread.submit(child.generate, requests(), SAMPLING)
    while not child._rounds.locked():
        pass
    time.sleep(0.05)
    with paused([child]):
        pass
    return work


def test_a_publish_in_a_round_is_proven_and_each_token_has_its_versions_logprob(
    child: ChildEngine, tiny_llama: Path
) -> None:
    learner = PlainLearner(tiny_llama, torch.float32)
    publisher = Publisher([child], WeightsConfig(), sequences(), frozen=())
    publisher.publish(learner.weights(), learner.score)
    models = {1: copy.deepcopy(learner.model)}
    for version in (2, 3):
        learner.update(rate=3e-2)
        models[version] = copy.deepcopy(learner.model)
    with ThreadPoolExecutor(1) as thread:
        work = begun(child, thread)
        for version in (2, 3):
            learner.model = models[version]
            with paused([child]):
                report = publisher.publish(learner.weights(), learner.score)
            assert report.gap_mean < 1e-5
            assert report.read_back > 0
        assert not work.done(), "published while the round went on"
        made = work.result()
    assert child.weight_version == 3
    versions = {tuple(span.version for span in one.version_spans) for one in made}
    assert any(len(found) > 1 for found in versions)
    assert max(found[-1] for found in versions) == 3
    assert all(list(found) == sorted(found) for found in versions)
    worst = other = 0.0
    for request, one in list(zip(requests(), made, strict=True))[::5]:
        assert len(one.token_ids) == LENGTH
        assert one.version_spans[0].start == 0
        assert one.version_spans[-1].end == LENGTH
        under = {version: scored(learner, model, request, one) for version, model in models.items()}
        for span in one.version_spans:
            part = slice(span.start, span.end)
            worst = max(worst, distance(one.logprobs[part], under[span.version][part]))
            other = max(other, distance(one.logprobs[part], under[1 if span.version > 1 else 3][part]))
    assert worst < 1e-4
    assert other > 1e-2


def scored(learner: PlainLearner, model: Any, request: Request, one: Completion) -> list[float]:
    """Log-probs of a response under a model."""
    learner.model = model
    return learner.score([request.prompt_ids + one.token_ids])[0][len(request.prompt_ids) - 1 :]


def distance(ours: list[float], theirs: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def test_the_same_weights_in_a_round_change_no_token(child: ChildEngine, tiny_llama: Path) -> None:
    """Requests are kept with their generators; only what is cached of them is computed anew."""
    learner = PlainLearner(tiny_llama, torch.float32)
    publisher = Publisher([child], WeightsConfig(), sequences(), frozen=())
    publisher.publish(learner.weights(), learner.score)
    undisturbed = child.generate(requests(), SAMPLING)
    with ThreadPoolExecutor(1) as thread:
        work = begun(child, thread)
        learner.update(rate=0.0)
        with paused([child]):
            publisher.publish(learner.weights(), learner.score)
        assert not work.done()
        made = work.result()
    assert any(len(one.version_spans) == 2 for one in made)
    assert [one.token_ids for one in made] == [one.token_ids for one in undisturbed]
    for one, other in zip(made, undisturbed, strict=True):
        assert distance(one.logprobs, other.logprobs) < 1e-4


def test_a_round_asked_for_in_a_pause_waits_for_its_end(child: ChildEngine) -> None:
    expected = child.generate(requests(), SAMPLING)
    with ThreadPoolExecutor(1) as thread:
        with paused([child]):
            work = thread.submit(child.generate, requests(), SAMPLING)
            while not child._rounds.locked():
                pass
            assert child.score([[1, 70, 80]], temperature=0.5) != child.score([[1, 70, 80]])
            assert not work.done()
        assert [one.token_ids for one in work.result()] == [one.token_ids for one in expected]


def test_what_fails_in_a_pause_is_said_and_the_round_goes_on(child: ChildEngine) -> None:
    with ThreadPoolExecutor(1) as thread:
        work = begun(child, thread)
        with pytest.raises(ValueError, match="cannot be scored"), paused([child]):
            child.score([[1]])
        assert [len(one.token_ids) for one in work.result()] == [LENGTH] * len(PROMPTS)
