"""Publishing into a real vLLM engine: what is right goes through, every fault stops the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rollout.engine import Completion, Request, Sampling
from rollout.vllm_engine import VllmEngine
from rollout.weights.config import WeightsConfig
from rollout.weights.delivery import Delivery
from rollout.weights.errors import ProbeError, WeightTransferError
from rollout.weights.probe import gap
from rollout.weights.publisher import Publisher
from tests.rollout.weights.learners import PlainLearner, copied, once, put_back, sequences

installer = pytest.importorskip("rollout.weights.installer", reason="vLLM is not installed")

PROBE = sequences()
DOWN = "model.layers.1.mlp.down_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"
VALUE = "model.layers.0.self_attn.v_proj.weight"

Weights = list[tuple[str, Tensor]]


@dataclass
class Bench:
    """One engine, the learner of the same model, and a publisher between them."""

    engine: VllmEngine
    learner: PlainLearner
    publisher: Publisher

    def publish(self, weights: Weights | None = None) -> Any:
        """Publish the learner's weights, or others under its name."""
        weights = self.learner.weights() if weights is None else weights
        return self.publisher.publish(weights, self.learner.score)

    def using(self, engine: Any = None, **config: Any) -> Publisher:
        """A publisher of its own, to an engine that may be faulty, with the first publish done."""
        publisher = Publisher([engine or self.engine], WeightsConfig(**config), PROBE)
        publisher.publish(self.learner.weights(), self.learner.score)
        return publisher


@pytest.fixture(params=["float32", "bfloat16"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A tied Llama in float32, a Qwen3 with a head of its own in bfloat16; the first weights are put back."""
    name = "tiny_llama" if request.param == "float32" else "tiny_qwen"
    engine = request.getfixturevalue("engine" if request.param == "float32" else "bfloat16_engine")
    folder = request.getfixturevalue(name)
    learner = PlainLearner(folder, getattr(torch, request.param))
    publisher = Publisher([engine], WeightsConfig(), PROBE, frozen=())
    publisher.publish(learner.weights(), learner.score)
    yield Bench(engine, learner, publisher)
    put_back(engine, folder)


def generate(engine: VllmEngine, prompts: list[list[int]]) -> list[Completion]:
    requests = [Request(prompt_ids=prompt, seed=index) for index, prompt in enumerate(prompts)]
    return engine.generate(requests, Sampling(max_tokens=12, ignore_eos=True))


# ---------------------------------------------------------------- what is right


def test_five_full_publishes_at_rate_zero_change_nothing(bench: Bench) -> None:
    scores = bench.engine.score(PROBE)
    texts = [completion.token_ids for completion in generate(bench.engine, PROBE)]
    version = bench.publisher.version
    for _ in range(5):
        bench.learner.update(rate=0.0)
        report = bench.publish()
        assert report.unchanged == len(bench.learner.weights())
        assert bench.engine.score(PROBE) == scores
    assert bench.engine.weight_version == bench.publisher.version == version + 5
    assert [completion.token_ids for completion in generate(bench.engine, PROBE)] == texts


def test_updates_at_the_demo_rate_arrive(bench: Bench) -> None:
    limit = 2e-6 if bench.engine.spec.dtype == "float32" else 5e-3
    for _ in range(3):
        before = bench.engine.score(PROBE)
        bench.learner.update()
        report = bench.publish()
        assert report.gap_mean < limit
        assert report.unchanged < len(bench.learner.weights())
        assert bench.engine.score(PROBE) != before
        assert report.read_back >= len(bench.learner.weights())
    assert report.size == sum(tensor.nbytes for _, tensor in bench.learner.weights())


def test_a_large_update_is_exact(bench: Bench) -> None:
    with torch.no_grad():
        for parameter in bench.learner.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    stale = gap(bench.engine.score(PROBE), bench.learner.score(PROBE))
    report = bench.publish()
    assert stale.mean > 0.1
    assert report.gap_mean < (1e-5 if bench.engine.spec.dtype == "float32" else 2e-2)


def test_prefix_cache_is_dropped(bench: Bench) -> None:
    """A prompt of more than a KV block, cached under the old weights, is computed anew under the new ones."""
    prompt = sequences(count=1, length=200, seed=9)[0]
    generate(bench.engine, [prompt])
    with torch.no_grad():
        for parameter in bench.learner.model.parameters():
            parameter.mul_(1.05)
    bench.publish()
    completion = generate(bench.engine, [prompt])[0]
    learner = bench.learner.score([prompt + completion.token_ids])[0][len(prompt) - 1 :]
    tolerance = 1e-4 if bench.engine.spec.dtype == "float32" else 0.1
    assert completion.logprobs == pytest.approx(learner, abs=tolerance)
    assert {span.version for span in completion.version_spans} == {bench.publisher.version}


def test_a_source_that_is_iterated_once_is_enough(bench: Bench) -> None:
    publisher = Publisher([bench.engine], WeightsConfig(), PROBE)
    assert publisher.publish(once(bench.learner.weights()), bench.learner.score).read_back >= 20


def test_reading_all_columns_back(bench: Bench) -> None:
    publisher = bench.using(readback_columns=0)
    bench.learner.update()
    assert publisher.publish(bench.learner.weights(), bench.learner.score).read_back > 20


def test_unchanged_modules_can_be_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v are one module, and of each of two layers two modules changed."""
    publisher = bench.using(skip_unchanged=True)
    installed: list[str] = []
    real = installer._install

    def counting(unit: Any, tensors: dict[str, Tensor]) -> None:
        installed.append(unit.path)
        real(unit, tensors)

    monkeypatch.setattr(installer, "_install", counting)
    frozen = copied(bench.learner.weights())
    bench.learner.update()
    with torch.no_grad():
        for name, parameter in bench.learner.model.named_parameters():
            if "k_proj" not in name and "down_proj" not in name:
                parameter.copy_(frozen[name])
    report = publisher.publish(bench.learner.weights(), bench.learner.score)
    changed = ("self_attn.qkv_proj", "mlp.down_proj")
    assert sorted(installed) == sorted(f"model.layers.{i}.{path}" for i in range(2) for path in changed)
    assert report.gap_mean < 1e-2


def test_metrics_use_the_common_names(bench: Bench) -> None:
    metrics = bench.publish().metrics()
    assert {
        "weights/version",
        "weights/bytes",
        "weights/unchanged",
        "weights/read_back",
        "weights/probe_gap_mean",
        "weights/probe_gap_max",
    } <= metrics.keys()
    phases = {name.removesuffix("_seconds") for name in metrics if name.endswith("_seconds")}
    assert phases == {f"weights/{p}" for p in ("gather", "transfer", "hash", "install", "readback", "probe")}


def test_weights_that_cannot_be_repacked_do_not_stay_in_shared_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM goes on unpacked when oneDNN refuses; the next transfer must not reach what is in force."""

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("no primitive")

    with monkeypatch.context() as patch:
        patch.setattr("vllm._custom_ops.create_onednn_mm", refuse)
        bench.learner.update()
        bench.publish()
    scores = bench.engine.score(PROBE)
    bench.learner.update(rate=1e-3)
    bench.publisher._sender.stage(bench.learner.weights(), bench.publisher.version + 1)
    assert bench.engine.score(PROBE) == scores
    assert bench.publish().gap_mean < 1e-2


# ---------------------------------------------------------------- refused before anything is touched


@pytest.fixture
def unharmed(bench: Bench) -> Iterator[Bench]:
    """The old version is fully in force after the test, and the next publish goes through."""
    version = bench.engine.weight_version
    scores, texts = bench.engine.score(PROBE), generate(bench.engine, PROBE)
    yield bench
    assert bench.engine.weight_version == version
    assert bench.engine.score(PROBE) == scores
    assert [c.token_ids for c in generate(bench.engine, PROBE)] == [c.token_ids for c in texts]
    bench.publish()
    assert bench.engine.weight_version == version + 1


def refusal(bench: Bench, weights: Weights) -> str:
    """What is said when `weights` are published under the learner's name."""
    with pytest.raises(WeightTransferError) as caught:
        bench.publish(weights)
    return str(caught.value)


def refusal_after(bench: Bench, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Delivery], None]) -> str:
    """What is said when the shared segment is altered between the learner's write and the engine's read."""
    install = bench.publisher._sender.install

    def damaged(delivery: Delivery) -> list[dict[str, Any]]:
        damage(delivery)
        return install(delivery)

    bench.learner.update()
    with monkeypatch.context() as patch:
        patch.setattr(bench.publisher._sender, "install", damaged)
        return refusal(bench, bench.learner.weights())


def test_one_flipped_bit_is_refused(unharmed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(delivery: Delivery) -> None:
        delivery.sent[DOWN].view(torch.uint8)[40, 17] ^= 1

    text = refusal_after(unharmed, monkeypatch, flip)
    assert f"the hash of 1 of {len(unharmed.learner.weights())} tensors is wrong: {DOWN}." in text
    assert "the old weights stay" in text


def test_two_tensors_swapped_on_the_way_are_refused(unharmed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(delivery: Delivery) -> None:
        one, other = delivery.sent[KEY], delivery.sent[VALUE]
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)

    text = refusal_after(unharmed, monkeypatch, swap)
    assert "the hash of 2 of" in text
    assert KEY in text
    assert VALUE in text


def test_swapped_places_in_the_manifest_are_refused(unharmed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes intact, names exchanged: the digest binds the name."""

    def swap(delivery: Delivery) -> None:
        entries = {entry.name: entry for entry in delivery.manifest.entries}
        one, other = entries[KEY], entries[VALUE]
        one.offset, other.offset = other.offset, one.offset
        one.digest, other.digest = other.digest, one.digest

    text = refusal_after(unharmed, monkeypatch, swap)
    assert "the hash of 2 of" in text


def test_a_layer_that_was_not_copied_is_refused(unharmed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = copied(unharmed.learner.weights())

    def keep(delivery: Delivery) -> None:
        for name, tensor in delivery.sent.items():
            if ".layers.1." in name:
                tensor.copy_(stale[name])

    text = refusal_after(unharmed, monkeypatch, keep)
    assert "model.layers.1.self_attn.q_proj.weight" in text
    assert "model.layers.0." not in text


def test_missing_and_unexpected_tensors_are_refused(unharmed: Bench) -> None:
    weights = unharmed.learner.weights()
    text = refusal(unharmed, [(n, t) for n, t in weights if ".layers.1." not in n])
    assert "model.layers.1.self_attn.q_proj.weight is missing" in text
    text = refusal(unharmed, [(n, t) for n, t in weights if n != KEY])
    assert text.endswith(f"was refused: {KEY} is missing.")
    text = refusal(unharmed, [*weights, ("model.layers.2.mlp.up_proj.weight", weights[1][1])])
    assert text.endswith("was refused: model.layers.2.mlp.up_proj.weight is unexpected.")


def test_wrong_shapes_and_formats_are_refused(unharmed: Bench) -> None:
    unharmed.learner.update()
    weights = unharmed.learner.weights()
    text = refusal(unharmed, [(n, t[:-1] if n == KEY else t) for n, t in weights])
    assert f"{KEY} has shape [63, 64], the engine's is [64, 64]" in text
    text = refusal(unharmed, [(n, t.half() if n == KEY else t) for n, t in weights])
    assert f"{KEY} is float16, the engine's is {unharmed.engine.spec.dtype}" in text


def test_two_tensors_under_each_others_names_are_not_sent(unharmed: Bench) -> None:
    unharmed.learner.update()
    names = {KEY: VALUE, VALUE: KEY}
    text = refusal(unharmed, [(names.get(n, n), t) for n, t in unharmed.learner.weights()])
    assert f"{KEY} holds the weights of {VALUE}" in text
    assert f"{VALUE} holds the weights of {KEY}" in text


def test_a_layer_exported_from_before_the_update_is_not_sent(unharmed: Bench) -> None:
    stale = copied(unharmed.learner.weights())
    unharmed.learner.update()
    mixed = [(n, stale[n] if ".layers.1." in n else t) for n, t in unharmed.learner.weights()]
    text = refusal(unharmed, mixed)
    assert "model.layers.1.self_attn.q_proj.weight, model.layers.1.self_attn.k_proj.weight" in text
    assert "did not change since the last version, the same tensors of other layers did." in text
    assert "model.layers.0." not in text


def test_a_tied_head_is_not_taken_twice(engine: VllmEngine, tiny_llama: Path) -> None:
    learner = PlainLearner(tiny_llama, torch.float32)
    weights = learner.weights()
    publisher = Publisher([engine], WeightsConfig(), PROBE)
    with pytest.raises(WeightTransferError, match=r"lm_head\.weight is unexpected"):
        publisher.publish([*weights, ("lm_head.weight", weights[0][1])], learner.score)


# ---------------------------------------------------------------- installed wrongly, or not at all


class Faulty:
    """A real engine whose `receive_weights` can be replaced; everything else is the engine's."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.report: dict[str, Any] | None = None
        self._claimed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def weight_version(self) -> int:
        return self._claimed or self._engine.weight_version

    def receive_weights(self, info: dict[str, Any], version: int) -> dict[str, Any]:
        """Install; or, when a `report` is set, claim the version and do nothing."""
        if self.report is None:
            return self._engine.receive_weights(info, version)
        self._claimed = version
        return self.report


def failure(bench: Bench, publisher: Publisher) -> str:
    """What is said when the learner's weights after one more update are published."""
    bench.learner.update()
    with pytest.raises(ProbeError) as caught:
        publisher.publish(bench.learner.weights(), bench.learner.score)
    return str(caught.value)


def test_an_engine_that_installs_nothing_and_proves_nothing(bench: Bench) -> None:
    faulty = Faulty(bench.engine)
    publisher = bench.using(faulty)
    faulty.report = {}
    assert "read back only 0 of" in failure(bench, publisher)


def test_an_engine_that_repeats_an_old_proof(bench: Bench) -> None:
    faulty = Faulty(bench.engine)
    publisher = bench.using(faulty)
    faulty.report = dict(bench.engine._llm.collective_rpc(lambda w: w.weight_transfer_engine.last_report)[0])
    text = failure(bench, publisher)
    assert "was installed wrongly in engine 0, though every tensor arrived intact" in text


def test_a_dropped_publish_shows_in_log_probs_alone(bench: Bench) -> None:
    """Nothing is read back, the update is one step at the demo's rate; bfloat16 rounds more than that."""
    faulty = Faulty(bench.engine)
    publisher = bench.using(faulty, readback_columns=-1)
    faulty.report = {}
    text = failure(bench, publisher)
    assert "was not installed in engine 0, though it says so" in text


def test_a_receiver_that_installs_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.weights.installer._install", lambda unit, tensors: None)
    text = failure(bench, bench.publisher)
    assert "was installed wrongly in engine 0, though every tensor arrived intact" in text
    assert "The worst is model." in text


def test_a_receiver_that_leaves_one_module_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fused projection of one layer keeps its old weights."""
    real = installer._install
    left_out = "model.layers.1.mlp.gate_up_proj"
    monkeypatch.setattr(
        installer, "_install", lambda unit, tensors: unit.path != left_out and real(unit, tensors)
    )
    text = failure(bench, bench.publisher)
    assert f"2 hold other weights than were sent. The worst is {left_out} (from model.layers.1.mlp." in text


def test_a_receiver_that_leaves_one_layer_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = installer._install
    monkeypatch.setattr(
        installer, "_install", lambda unit, tensors: ".layers.1." in unit.path or real(unit, tensors)
    )
    assert "The worst is model.layers.1." in failure(bench, bench.publisher)


def test_a_receiver_that_swaps_two_tensors(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = installer._install

    def swapped(unit: Any, tensors: dict[str, Tensor]) -> None:
        real(unit, tensors | {KEY: tensors[VALUE], VALUE: tensors[KEY]})

    monkeypatch.setattr(installer, "_install", swapped)
    text = failure(bench, bench.publisher)
    assert "2 hold other weights than were sent" in text
    assert "model.layers.0.self_attn.qkv_proj" in text


def test_a_tied_head_that_keeps_its_old_packing(
    engine: VllmEngine, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM's own layer-wise reload does on a CPU."""
    learner = PlainLearner(tiny_llama, torch.float32)
    publisher = Publisher([engine], WeightsConfig(), PROBE)
    publisher.publish(learner.weights(), learner.score)
    real = installer._install
    monkeypatch.setattr(
        installer, "_install", lambda unit, tensors: unit.path == "lm_head" or real(unit, tensors)
    )
    learner.update()
    with pytest.raises(ProbeError, match=r"The worst is lm_head \(from model\.embed_tokens\.weight\)"):
        publisher.publish(learner.weights(), learner.score)
    monkeypatch.undo()
    publisher.publish(copied_from(tiny_llama), PlainLearner(tiny_llama, torch.float32).score)


def copied_from(folder: Path) -> Weights:
    """The weights on disk."""
    return PlainLearner(folder, torch.float32).weights()


def test_swapped_tensors_at_the_first_publish_show_in_the_probe(bench: Bench) -> None:
    """Nothing to compare with yet: the learner's log-probs tell."""
    publisher = Publisher([bench.engine], WeightsConfig(), PROBE)
    names = {KEY: VALUE, VALUE: KEY}
    weights = [(names.get(name, name), tensor) for name, tensor in bench.learner.weights()]
    if bench.engine.spec.dtype == "bfloat16":
        publisher._config.tolerance = 0.01  # a tiny random model's log-probs hardly depend on its attention
    with pytest.raises(ProbeError) as caught:
        publisher.publish(weights, bench.learner.score)
    assert "engine 0 and learner disagree on the probe by" in str(caught.value)
    assert "what was read back is what was sent" in str(caught.value)


def test_a_scorer_that_gives_no_number_stops_the_run(bench: Bench) -> None:
    with pytest.raises(ProbeError, match="disagree on the probe by inf nats"):
        bench.publisher.publish(bench.learner.weights(), lambda s: [[float("nan")] * (len(x) - 1) for x in s])


def test_a_publisher_needs_an_engine_and_a_probe(bench: Bench) -> None:
    for engines, probe in [([], PROBE), ([bench.engine], []), ([bench.engine], [[1]])]:
        with pytest.raises(ValueError, match="needs an engine and a probe"):
            Publisher(engines, WeightsConfig(), probe)
