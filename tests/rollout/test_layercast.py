"""LayerCast in real vLLM engines: what equals float32 bit for bit, what memory holds, what is published."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout.child_engine import ChildEngine
from rollout.engine import Completion, Request, Sampling
from rollout.engine_spec import EngineSpec
from rollout.vllm_engine import VllmEngine
from rollout.weights import plugin
from rollout.weights.config import TOLERANCES, WeightsConfig
from rollout.weights.errors import ProbeError
from rollout.weights.publisher import Publisher
from tests.rollout.weights.learners import put_back, sequences
from tests.trainer.samples import Reinforce, make_row
from trainer.config import Device, LearnerConfig, OptimizerConfig, Precision
from trainer.learner import Learner
from trainer.model import load_model
from trainer.numerics import STORED

layercast = pytest.importorskip("rollout.layercast", reason="vLLM is not installed")

PROBE = sequences()
NARROW = {"dtype": "bfloat16"}
CAST = {"dtype": "bfloat16", "numerics": "layercast"}
WIDE = {"dtype": "float32"}


def spec(model: Path, **changes: Any) -> EngineSpec:
    """A small engine that takes weights."""
    fixed: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_bytes": 32 << 20}
    return EngineSpec(model=str(model), threads=1, eager=True, transport="shm", **fixed, **changes)


def test_engine_and_learner_round_to_one_format() -> None:
    assert layercast.LayerCastConfig.stored is STORED


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a head of its own, written in bfloat16: what every engine here reads."""
    folder = tmp_path_factory.mktemp("layercast") / "qwen"
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cast(checkpoint: Path) -> Iterator[VllmEngine]:
    yield from opened(checkpoint, CAST)


@pytest.fixture(scope="module")
def wide(checkpoint: Path) -> Iterator[VllmEngine]:
    """vLLM's own float32: oneDNN's repacked products."""
    yield from opened(checkpoint, WIDE)


@pytest.fixture(scope="module")
def narrow(checkpoint: Path) -> Iterator[VllmEngine]:
    yield from opened(checkpoint, NARROW)


@pytest.fixture(scope="module")
def tied(tiny_llama: Path) -> Iterator[VllmEngine]:
    """LayerCast of a model whose head is its embedding. (vLLM's process groups end with the first engine of a
    process that ends, so all of them live as long as the module.)"""
    yield from opened(tiny_llama, CAST)


@pytest.fixture(scope="module")
def same_kernel(checkpoint: Path) -> Iterator[VllmEngine]:
    """Weights loaded and kept in float32, multiplied by the kernel that LayerCast uses."""
    with float32_storage():
        engine = VllmEngine(spec(checkpoint, **CAST))
    yield engine
    engine.close()


@contextmanager
def float32_storage() -> Iterator[None]:
    """LayerCast whose storage is float32, so that nothing is upcast: through vLLM's public registry."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    class Float32(layercast.LayerCastConfig):  # type: ignore[name-defined]
        stored = torch.float32

    register_quantization_config(layercast.NAME)(Float32)
    try:
        yield
    finally:
        register_quantization_config(layercast.NAME)(layercast.LayerCastConfig)


def opened(model: Path, numbers: dict[str, str]) -> Iterator[VllmEngine]:
    engine = VllmEngine(spec(model, **numbers))
    yield engine
    engine.close()


def greedy(engine: VllmEngine | ChildEngine) -> list[Completion]:
    requests = [Request(prompt_ids=prompt, seed=0) for prompt in PROBE]
    return engine.generate(requests, Sampling(max_tokens=64, temperature=0.0, ignore_eos=True))


def gap(one: list[list[float]], other: list[list[float]]) -> torch.Tensor:
    """Mean difference in nats."""
    return (torch.tensor(one) - torch.tensor(other)).abs().mean()


def parameters(engine: VllmEngine) -> dict[str, tuple[torch.dtype, int]]:
    """Format and size of every parameter of the live model."""

    def look(worker: Any) -> dict[str, tuple[torch.dtype, int]]:
        return {name: (p.dtype, p.numel()) for name, p in worker.model_runner.model.named_parameters()}

    found: dict[str, tuple[torch.dtype, int]] = engine._llm.collective_rpc(look)[0]
    return found


def caches(engine: VllmEngine) -> set[torch.dtype]:
    found: set[torch.dtype] = engine._llm.collective_rpc(
        lambda worker: {cache.dtype for cache in worker.model_runner.kv_caches}
    )[0]
    return found


# ---------------------------------------------------------------- equal to float32


def test_layercast_is_float32_bit_for_bit_on_one_kernel(cast: VllmEngine, same_kernel: VllmEngine) -> None:
    """Prompts, cached decoding, log-probs: same kernels, one thread, same batch."""
    assert {dtype for dtype, _ in parameters(same_kernel).values()} == {torch.float32}
    assert cast.score(PROBE) == same_kernel.score(PROBE)
    ours, theirs = greedy(cast), greedy(same_kernel)
    assert [made.token_ids for made in ours] == [made.token_ids for made in theirs]
    assert [made.logprobs for made in ours] == [made.logprobs for made in theirs]


def test_vllms_own_float32_differs_by_its_last_bits(
    cast: VllmEngine, wide: VllmEngine, narrow: VllmEngine
) -> None:
    """Another kernel (oneDNN) adds up in another order."""
    assert gap(cast.score(PROBE), wide.score(PROBE)) < 1e-5
    assert gap(narrow.score(PROBE), wide.score(PROBE)) > 1e-3
    assert [made.token_ids for made in greedy(cast)] == [made.token_ids for made in greedy(wide)]


def test_weights_are_bfloat16_and_all_else_float32(
    cast: VllmEngine, wide: VllmEngine, checkpoint: Path
) -> None:
    found = parameters(cast)
    norms = {name: kind for name, kind in found.items() if "norm" in name}
    assert {dtype for dtype, _ in norms.values()} == {torch.float32}
    matrices = {name: kind for name, kind in found.items() if name not in norms}
    assert {dtype for dtype, _ in matrices.values()} == {torch.bfloat16}
    assert caches(cast) == {torch.float32} == caches(wide)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    padding = 2 * (-vocabulary % 64) * hidden  # vLLM pads embedding and head to multiples of 64 rows
    counted = sum(p.numel() for p in model.parameters()) + padding
    assert sum(numel for _, numel in found.values()) == counted
    held = sum(dtype.itemsize * numel for dtype, numel in found.values())
    small = sum(numel for _, numel in norms.values())
    assert held == 2 * (counted - small) + 4 * small


def test_a_tied_head_is_one_bfloat16_tensor(tied: VllmEngine, tiny_llama: Path) -> None:
    shared = tied._llm.collective_rpc(
        lambda worker: (
            worker.model_runner.model.lm_head.weight is worker.model_runner.model.model.embed_tokens.weight
        )
    )[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).float()
    ids = torch.tensor(PROBE)
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    assert shared
    assert gap(tied.score(PROBE), expected.tolist()) < 1e-5


def test_an_engine_process_computes_the_same(cast: VllmEngine, checkpoint: Path, tmp_path: Path) -> None:
    child = ChildEngine(spec(checkpoint, log_path=str(tmp_path / "log"), **CAST))
    try:
        child.wait()
        assert gap(child.score(PROBE), cast.score(PROBE)) < 1e-6
        assert [made.token_ids for made in greedy(child)] == [made.token_ids for made in greedy(cast)]
    finally:
        child.close()


def test_every_process_of_vllm_knows_it(cast: VllmEngine) -> None:
    """vLLM's workers call the entry point; called again it changes nothing."""
    from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="whetstone")
    assert entry.load() is plugin.register
    plugin.register()
    assert QUANTIZATION_METHODS.count(layercast.NAME) == 1
    assert WEIGHT_LOADER_V2_SUPPORTED.count("LayerCastLinearMethod") == 1
    assert get_quantization_config(layercast.NAME) is layercast.LayerCastConfig


# ---------------------------------------------------------------- publishing


def learner_of(folder: Path, dtype: Precision, **options: Any) -> Learner:
    config = LearnerConfig(dtype=dtype, device=Device.cpu, optimizer=OptimizerConfig(lr=1e-3))
    fixed: dict[str, Any] = {"loss": Reinforce(), "temperature": 1.0, "total_steps": 10, "seed": 0}
    return Learner(config, load_model(folder), **fixed, **options)


def publisher_of(engine: VllmEngine) -> Publisher:
    """As `rlhf.pipeline` builds it: both sides compute in float32, so float32's tolerance holds."""
    return Publisher(
        [engine],
        WeightsConfig(readback_columns=0),
        PROBE,
        frozen=(),
        learner_dtype="float32",
        engine_dtype=engine.spec.compute_dtype,
    )


def updated(learner: Learner) -> None:
    rows = [make_row(prompt[:16], prompt[16:32], group) for group, prompt in enumerate(PROBE)]
    learner.update([rows])


def test_a_publish_lands_in_the_bfloat16_weights_and_nothing_goes_stale(
    cast: VllmEngine, checkpoint: Path
) -> None:
    learner, publisher = learner_of(checkpoint, Precision.bfloat16, layercast=True), publisher_of(cast)
    before, formats = cast.score(PROBE), parameters(cast)
    try:
        for number in range(3):
            if number:
                updated(learner)
            report = publisher.publish(learner.weights(), learner.score)
            assert report.gap_mean < 1e-5 < TOLERANCES["float32"]
            assert report.read_back == len(learner.weights().metadata())
        assert gap(cast.score(PROBE), before) > 1e-2
        assert parameters(cast) == formats
        fresh = learner.policy.model
        ids = torch.tensor(PROBE)
        wide: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in wide.named_parameters():
                parameter.copy_(dict(fresh.named_parameters())[name])
            logits = wide(ids).logits[:, :-1]
        expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        assert gap(cast.score(PROBE), expected.tolist()) < 1e-5
    finally:
        put_back(cast, checkpoint)
    assert cast.score(PROBE) == before


def test_a_learner_that_computes_otherwise_is_found(cast: VllmEngine, checkpoint: Path) -> None:
    """bfloat16 products, and float32 weights that were not rounded, are both beyond float32's tolerance."""
    narrow = learner_of(checkpoint, Precision.bfloat16)
    unrounded = learner_of(checkpoint, Precision.float32)
    updated(unrounded)
    try:
        for learner in (narrow, unrounded):
            with pytest.raises(ProbeError, match=r"on average \(at most 0\.0001 for float32\)"):
                publisher_of(cast).publish(learner.weights(torch.bfloat16), learner.score)
    finally:
        put_back(cast, checkpoint)


def test_the_gap_between_engine_and_learner_falls_with_the_format(
    cast: VllmEngine, wide: VllmEngine, narrow: VllmEngine, checkpoint: Path
) -> None:
    """§9.11 of the notes: bfloat16 far above LayerCast, which is float32's."""
    gaps = {
        name: gap(engine.score(PROBE), learner.score(PROBE))
        for name, engine, learner in [
            ("bfloat16", narrow, learner_of(checkpoint, Precision.bfloat16)),
            ("layercast", cast, learner_of(checkpoint, Precision.bfloat16, layercast=True)),
            ("float32", wide, learner_of(checkpoint, Precision.float32)),
        ]
    }
    assert gaps["bfloat16"] > 1e-3
    assert gaps["layercast"] < 1e-5
    assert gaps["float32"] < 1e-5


# ---------------------------------------------------------------- refusals


def test_what_layercast_cannot_be_is_said(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="keeps its weights in bfloat16, not in dtype=float32"):
        VllmEngine(spec(checkpoint, dtype="float32", numerics="layercast"))
    with pytest.raises(
        ValueError, match=r"^rollout\.numerics=layercast keeps bfloat16 weights, and the model"
    ):
        layercast.LayerCastConfig.from_config({"quant_method": "awq"})

    class FusedMoE(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"does not know model\.layers\.0\.mlp\.experts \(FusedMoE\)"):
        layercast.LayerCastConfig().get_quant_method(FusedMoE(), "model.layers.0.mlp.experts")
    assert layercast.LayerCastConfig().get_quant_method(torch.nn.Module(), "model.norm") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes it")
def test_batch_invariance_on_a_cpu_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    with pytest.raises(ValueError, match="batch_invariant switches vLLM's GPU kernels, and this engine runs"):
        VllmEngine(spec(checkpoint, dtype="bfloat16", numerics="batch_invariant"))
