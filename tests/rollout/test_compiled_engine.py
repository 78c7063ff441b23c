"""A compiled engine: takes published weights as an eager one does, and starts again without compiling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rollout.child_engine import ChildEngine
from rollout.engine import Request, Sampling
from rollout.engine_spec import EngineSpec
from rollout.weights.config import WeightsConfig
from rollout.weights.publisher import Publisher
from tests.rollout.weights.learners import PlainLearner, sequences

PROBE = sequences(4)


@pytest.fixture
def spec(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSpec:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    return EngineSpec(
        model=str(tiny_llama),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=16,
        threads=1,
        transport="shm",
        log_path=str(tmp_path / "first.log"),
    )


def test_new_weights_reach_compiled_code_and_the_next_start_reuses_it(
    spec: EngineSpec, tiny_llama: Path, tmp_path: Path
) -> None:
    learner = PlainLearner(tiny_llama, torch.float32)
    first = ChildEngine(spec)
    try:
        publisher = Publisher([first], WeightsConfig(), PROBE)
        publisher.publish(learner.weights(), learner.score)
        learner.update(rate=1e-2)
        report = publisher.publish(learner.weights(), learner.score)
        assert report.gap_mean < 1e-4
        requests = [Request(prompt_ids=[1, 70, 80], seed=index) for index in range(4)]
        for request, made in zip(requests, first.generate(requests, Sampling(max_tokens=8)), strict=True):
            scores = learner.score([request.prompt_ids + made.token_ids])[0]
            assert made.logprobs == pytest.approx(scores[-len(made.logprobs) :], abs=1e-4)
        publisher.close()
    finally:
        first.close()
    assert "saved AOT compiled function" in (tmp_path / "first.log").read_text()
    second = ChildEngine(replace(spec, log_path=str(tmp_path / "second.log")))
    try:
        fresh = PlainLearner(tiny_llama, torch.float32)
        for scores, expected in zip(second.score(PROBE), fresh.score(PROBE), strict=True):
            assert scores == pytest.approx(expected, abs=1e-4)
    finally:
        second.close()
    log = (tmp_path / "second.log").read_text()
    assert "Directly load AOT compilation" in log
    assert "saved AOT compiled function" not in log
