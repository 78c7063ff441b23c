"""The trainer's own `Learner` and a real vLLM engine: what one publishes, the other computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rollout.engine import Completion, Request, Sampling
from rollout.vllm_engine import VllmEngine
from rollout.weights.config import WeightsConfig
from rollout.weights.errors import ProbeError
from rollout.weights.publisher import Publisher, PublishReport
from tests.rollout.weights.learners import DEMO_RATE, put_back, sequences
from tests.trainer.samples import Reinforce, make_row
from trainer.batch import Row
from trainer.config import Device, LearnerConfig, OptimizerConfig, Precision
from trainer.learner import Learner
from trainer.model import load_model

installer = pytest.importorskip("rollout.weights.installer", reason="vLLM is not installed")

PROBE = sequences()
TEMPERATURE = 0.8


@dataclass
class Pair:
    """A learner and an engine of one model, and the publisher between them."""

    engine: VllmEngine
    learner: Learner
    publisher: Publisher
    limit: float
    """What the publisher tolerates, in nats."""

    def publish(self) -> PublishReport:
        """Send the learner's weights in the engine's number format, as the loop does."""
        weights = self.learner.weights(getattr(torch, self.engine.spec.dtype))
        return self.publisher.publish(weights, self.learner.score)

    def update(self, rate: float) -> None:
        """One optimizer step at `rate` on twelve rows of three groups."""
        self.learner.config.optimizer.lr = rate
        rows = [make_row(prompt, prompt[::-1], group) for group, prompt in enumerate(sequences(3, 16))]
        (metrics,) = self.learner.update([rows * 4])
        assert metrics["learner/grad_norm"] > 0


LIMITS = {("float32", "float32"): 1e-4, ("bfloat16", "bfloat16"): 0.2, ("bfloat16", "float32"): 0.2}
"""What is tolerated, by the number formats of learner and engine."""


@pytest.fixture(params=LIMITS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A tied Llama in the float32 engine, a Qwen3 in the bfloat16 one; the first weights are put back."""
    compute, rollout = request.param
    engine = request.getfixturevalue("engine" if rollout == "float32" else "bfloat16_engine")
    folder = request.getfixturevalue("tiny_llama" if rollout == "float32" else "tiny_qwen")
    publisher = Publisher([engine], WeightsConfig(), PROBE, frozen=(), learner_dtype=compute)
    yield Pair(engine, learner_of(folder, Precision(compute)), publisher, LIMITS[request.param])
    put_back(engine, folder)


def learner_of(folder: Path, dtype: Precision) -> Learner:
    """A fresh learner of the model in `folder`."""
    config = LearnerConfig(dtype=dtype, device=Device.cpu, optimizer=OptimizerConfig(lr=DEMO_RATE))
    model = load_model(folder)
    return Learner(config, model, loss=Reinforce(), temperature=TEMPERATURE, total_steps=10, seed=0)


def generate(engine: VllmEngine) -> list[Completion]:
    """Twelve sampled tokens for each of the probe's sequences."""
    requests = [Request(prompt_ids=prompt, seed=index) for index, prompt in enumerate(PROBE)]
    return engine.generate(requests, Sampling(max_tokens=12, temperature=TEMPERATURE, ignore_eos=True))


def rows_of(completions: list[Completion]) -> list[Row]:
    """The same tokens as the learner gets them."""
    return [
        make_row(prompt, made.token_ids, group)
        for group, (prompt, made) in enumerate(zip(PROBE, completions, strict=True))
    ]


def distances(completions: list[Completion], learner: Learner) -> torch.Tensor:
    """|engine - learner| log-prob of every sampled token."""
    mine = learner.logprobs(rows_of(completions))
    theirs = [made.logprobs for made in completions]
    return (torch.tensor(mine) - torch.tensor(theirs)).abs()


def test_at_rate_zero_rollout_and_learner_stay_in_agreement(pair: Pair) -> None:
    pair.publish()
    first = generate(pair.engine)
    before = pair.learner.logprobs(rows_of(first))
    for _ in range(5):
        pair.update(rate=0.0)
        report = pair.publish()
        assert report.unchanged == len(pair.learner.weights().metadata())
        assert report.gap_mean < pair.limit
    last = generate(pair.engine)
    assert [made.token_ids for made in last] == [made.token_ids for made in first]
    assert [made.logprobs for made in last] == [made.logprobs for made in first]
    assert pair.learner.logprobs(rows_of(last)) == before
    exact = pair.limit < 1e-3
    assert distances(last, pair.learner).max() < (2e-5 if exact else 0.1)


@pytest.mark.parametrize("rate", [DEMO_RATE, 1e-2])
def test_updates_reach_the_rollout(pair: Pair, rate: float) -> None:
    pair.publish()
    for _ in range(3):
        before = pair.engine.score(PROBE)
        pair.update(rate)
        report = pair.publish()
        assert report.gap_mean < pair.limit
        assert pair.engine.score(PROBE) != before
    assert distances(generate(pair.engine), pair.learner).mean() < pair.limit


def test_a_layer_that_keeps_its_old_weights_stops_the_run(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.publish()
    real = installer._install
    monkeypatch.setattr(
        installer, "_install", lambda unit, tensors: ".layers.1." in unit.path or real(unit, tensors)
    )
    pair.update(DEMO_RATE)
    with pytest.raises(ProbeError, match=r"installed wrongly in engine 0.* The worst is model\.layers\.1\."):
        pair.publish()


def test_a_publish_that_installs_nothing_stops_the_run(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read back: the learner's log-probs moved, and the engine's did not."""
    pair.publisher._config.readback_columns = -1
    pair.publish()
    monkeypatch.setattr(installer, "_install", lambda unit, tensors: None)
    pair.update(DEMO_RATE)
    with pytest.raises(ProbeError, match="was not installed in engine 0, though it says so"):
        pair.publish()


def test_the_engines_format_sets_the_tolerance_unless_the_learners_is_given(
    engine: VllmEngine, tiny_llama: Path
) -> None:
    learner = learner_of(tiny_llama, Precision.bfloat16)
    publisher = Publisher([engine], WeightsConfig(), PROBE)
    with pytest.raises(ProbeError, match=r"on average \(at most 0\.0001 for float32\)") as caught:
        publisher.publish(learner.weights(torch.float32), learner.score)
    assert "round differently" not in str(caught.value)
    named = Publisher([engine], WeightsConfig(tolerance=1e-5), PROBE, learner_dtype="bfloat16")
    with pytest.raises(ProbeError, match=r"\(at most 1e-05 for float32 and bfloat16\)") as caught:
        named.publish(learner.weights(torch.float32), learner.score)
    assert (
        "The learner computes in bfloat16 and the engine in float32, which round differently, and the gap "
        "may grow with training: give learner.dtype and rollout.dtype the same value, or raise "
        "weights.tolerance."
    ) in str(caught.value)
    put_back(engine, tiny_llama)
