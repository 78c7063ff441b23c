"""Sleep: an engine gives memory back until it is next needed, and never answers without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.algorithms.config import DynamicSamplingConfig
from rlhf.algorithms.dynamic_sampling import Selection, Selector
from rlhf.clock import Clock
from rlhf.data.cursor import Cursor
from rlhf.generation import Harvest, Resting
from rollout.child_engine import ChildEngine
from rollout.engine import Request, Sampling
from rollout.engine_spec import EngineSpec
from rollout.errors import EngineError
from rollout.pool import LocalPool
from rollout.vllm_engine import VllmEngine
from rollout.weights.config import WeightsConfig
from rollout.weights.publisher import Publisher
from tests.rollout.weights.learners import PlainLearner, put_back, sequences

SAMPLING = Sampling(max_tokens=8, ignore_eos=True)
REQUESTS = [Request(prompt_ids=[1, 70, 80], seed=seed) for seed in range(3)]


def sleeps(engine: VllmEngine) -> bool:
    """What vLLM says."""
    return bool(engine._engine.engine_core.is_sleeping())


def test_a_call_wakes_an_engine_that_kept_its_weights(engine: VllmEngine) -> None:
    """vLLM's CPU worker frees nothing, but its scheduler stands still until it is woken."""
    before = engine.generate(REQUESTS, SAMPLING)
    engine.sleep(1)
    assert sleeps(engine)
    assert engine.generate(REQUESTS, SAMPLING) == before
    assert not sleeps(engine)
    engine.sleep(1)
    assert len(engine.score([[1, 70, 80]])[0]) == 2
    assert not sleeps(engine)


def test_an_engine_without_weights_answers_after_the_next_publish(
    engine: VllmEngine, tiny_llama: Path
) -> None:
    learner = PlainLearner(tiny_llama, torch.float32)
    publisher = Publisher([engine], WeightsConfig(), sequences())
    publisher.publish(learner.weights(), learner.score)
    before = engine.generate(REQUESTS, SAMPLING)
    engine.sleep(2)
    with pytest.raises(EngineError, match=r"^the engine has dropped its weights: generating waits for"):
        engine.generate(REQUESTS, SAMPLING)
    with pytest.raises(EngineError, match=r"dropped its weights: scoring"):
        engine.score([[1, 70, 80]])
    assert sleeps(engine)
    publisher.publish(learner.weights(), learner.score)
    assert not sleeps(engine)
    after = engine.generate(REQUESTS, SAMPLING)
    assert [made.token_ids for made in after] == [made.token_ids for made in before]
    publisher.close()
    put_back(engine, tiny_llama)


HARVEST = Harvest(
    selection=Selection(groups=[], dropped=[], carried=[], counts={}),
    generated=[],
    failures={},
    cursor=Cursor({"sums": 1}, seed=0),
    selector=Selector(DynamicSamplingConfig(), 1),
)


class Asked:
    """A source that generates with a pool, as `Direct` does."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.asleep: list[bool] = []

    def next(self, step: int) -> Harvest:
        self.asleep.append(sleeps(self._engine))
        self._engine.generate(REQUESTS, SAMPLING)
        self.asleep.append(sleeps(self._engine))
        return HARVEST

    def stop(self) -> None:
        self.asleep.clear()

    def close(self) -> None:
        self.stop()


def test_engines_sleep_from_a_harvest_to_the_next_call(engine: VllmEngine) -> None:
    source = Asked(engine)
    resting = Resting(source, LocalPool([engine], run_seed=0), 1, Clock())
    for step in range(2):
        resting.next(step)
        assert sleeps(engine)
    assert source.asleep == [False, False, True, False]
    resting.stop()
    assert source.asleep == []
    engine.score([[1, 70, 80]])


def test_an_engine_that_cannot_sleep_is_named() -> None:
    class Restless:
        weight_version = 0

    pool = LocalPool([Restless()], run_seed=0)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^Restless has no sleep mode\.$"):
        pool.sleep(1)


def test_sleep_mode_on_a_cpu_is_refused_by_vllm_itself(tiny_llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    spec = EngineSpec(model=str(tiny_llama), max_model_len=64, max_num_seqs=4, eager=True, sleep_mode=True)
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        VllmEngine(spec)


@pytest.mark.gpu
@pytest.mark.parametrize("level", [1, 2])
def test_memory_comes_back_and_weights_with_the_publish(tiny_llama: Path, level: int) -> None:
    spec = EngineSpec(
        model=str(tiny_llama),
        max_model_len=128,
        max_num_seqs=16,
        gpu_memory=0.3,
        eager=True,
        transport="ipc",
        sleep_mode=True,
    )
    engine = ChildEngine(spec)
    learner = PlainLearner(tiny_llama, torch.bfloat16, "cuda:0")
    publisher = Publisher([engine], WeightsConfig(), sequences(), on_gpu=True, shares_gpu=True)
    try:
        publisher.publish(learner.weights(), learner.score)
        before, (free, total) = engine.generate(REQUESTS, SAMPLING), torch.cuda.mem_get_info()
        engine.sleep(level)
        assert torch.cuda.mem_get_info()[0] - free > 0.2 * total
        assert publisher.publish(learner.weights(), learner.score).gap_mean < 0.05
        assert [made.token_ids for made in engine.generate(REQUESTS, SAMPLING)] == [
            made.token_ids for made in before
        ]
    finally:
        publisher.close()
        engine.close()
