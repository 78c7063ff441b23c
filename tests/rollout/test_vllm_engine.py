"""`VllmEngine` against vLLM's real CPU back end, and its log-probs against transformers'."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pytest
import torch

from rollout.engine import Request, Sampling
from rollout.engine_spec import EngineSpec, kv_cache_bytes, max_positions
from rollout.types import FinishReason, VersionSpan
from rollout.vllm_engine import VllmEngine, _engine_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END = 2
"""`<|im_end|>` of the tiny models."""


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tiny_llama)


def requests(count: int, prompt: list[int] | None = None, first_seed: int = 0) -> list[Request]:
    return [Request(prompt_ids=prompt or [1, 70, 80, 90], seed=first_seed + index) for index in range(count)]


def reference_logprobs(model: PreTrainedModel, tokens: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    table = (logits / temperature).log_softmax(-1)
    return table.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_logprobs_are_those_of_the_sampling_distribution(
    engine: VllmEngine, reference: PreTrainedModel, temperature: float
) -> None:
    sampling = Sampling(max_tokens=12, temperature=temperature, ignore_eos=True)
    for request, made in zip(requests(4), engine.generate(requests(4), sampling), strict=True):
        expected = reference_logprobs(reference, request.prompt_ids + made.token_ids, temperature)[-12:]
        assert torch.tensor(made.logprobs) == pytest.approx(expected, abs=2e-5)
        assert made.finish_reason is FinishReason.LENGTH
        assert made.version_spans == [VersionSpan(start=0, end=12, version=engine.weight_version)]


def test_truncated_sampling_renormalises_over_the_kept_tokens(
    engine: VllmEngine, reference: PreTrainedModel
) -> None:
    sampling = Sampling(max_tokens=1, top_k=3, ignore_eos=True)
    prompt = [1, 70, 80, 90]
    with torch.no_grad():
        top = reference(torch.tensor([prompt])).logits[0, -1].topk(3)
    expected = dict(zip(top.indices.tolist(), top.values.log_softmax(-1).tolist(), strict=True))
    for made in engine.generate(requests(16), sampling):
        assert made.token_ids[0] in expected
        assert made.logprobs[0] == pytest.approx(expected[made.token_ids[0]], abs=2e-5)


def test_the_same_seed_gives_the_same_response_whatever_shares_the_batch(engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=16, ignore_eos=True)
    together = engine.generate(requests(8), sampling)
    alone = engine.generate(requests(1, first_seed=5), sampling)
    assert alone[0].token_ids == together[5].token_ids
    assert len({tuple(made.token_ids) for made in together}) == 8


def test_tokens_follow_their_probabilities(engine: VllmEngine, reference: PreTrainedModel) -> None:
    """800 first tokens: each frequent token's share lies within four standard errors of its probability."""
    made = engine.generate(requests(800), Sampling(max_tokens=1, ignore_eos=True))
    with torch.no_grad():
        chances = reference(torch.tensor([[1, 70, 80, 90]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in made]), minlength=len(chances))
    for token in (chances > 0.03).nonzero().flatten().tolist():
        chance = chances[token].item()
        error = (chance * (1 - chance) / 800) ** 0.5
        assert abs(counts[token].item() / 800 - chance) < 4 * error


def test_an_end_token_stops_and_is_kept(engine: VllmEngine) -> None:
    made = engine.generate(requests(32), Sampling(max_tokens=24, stop_token_ids=(END,)))
    stopped = [one for one in made if one.finish_reason is FinishReason.STOP]
    assert stopped
    for one in made:
        assert (one.token_ids[-1] == END) is (one.finish_reason is FinishReason.STOP)
        assert END not in one.token_ids[:-1]
        assert len(one.logprobs) == len(one.token_ids)


def test_every_end_token_of_the_list_stops(engine: VllmEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    digit = tokenizer.encode("7")[0]
    made = engine.generate(requests(32), Sampling(max_tokens=40, stop_token_ids=(END, digit)))
    assert {one.token_ids[-1] for one in made} == {END, digit}


def test_end_tokens_that_are_not_listed_do_not_stop(engine: VllmEngine) -> None:
    made = engine.generate(requests(16), Sampling(max_tokens=24))
    assert all(len(one.token_ids) == 24 for one in made)
    assert any(END in one.token_ids for one in made)


def test_a_stop_string_keeps_the_tokens_that_spell_it(
    engine: VllmEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    free = engine.generate(requests(1, first_seed=3), Sampling(max_tokens=24, ignore_eos=True))[0].token_ids
    pairs = [str(tokenizer.decode(free[at : at + 2])) for at in range(23)]
    stop = next(pair for at, pair in enumerate(pairs) if at > 1 and pair.isdigit() and pair not in pairs[:at])
    made = engine.generate(requests(1, first_seed=3), Sampling(max_tokens=24, stop=(stop,)))[0]
    assert made.finish_reason is FinishReason.STOP
    assert made.token_ids == free[: len(made.token_ids)]
    assert str(tokenizer.decode(made.token_ids)).endswith(stop)
    assert len(made.logprobs) == len(made.token_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_score_is_the_learners_logprob(
    engine: VllmEngine, reference: PreTrainedModel, temperature: float
) -> None:
    generator = random.Random(0)
    sequences = [[generator.randrange(3, 250) for _ in range(length)] for length in (2, 40, 130, 256)]
    scores = engine.score(sequences, temperature)
    for tokens, values in zip(sequences, scores, strict=True):
        expected = reference_logprobs(reference, tokens, temperature)
        assert torch.tensor(values) == pytest.approx(expected, abs=5e-5)


def test_score_does_not_read_the_prefix_cache(engine: VllmEngine) -> None:
    tokens = [3 + index % 200 for index in range(250)]
    engine.generate(requests(1, tokens), Sampling(max_tokens=1))  # caches the whole prompt
    first, second = engine.score([tokens])[0], engine.score([tokens, tokens])[1]
    assert len(first) == 249
    assert first == pytest.approx(second, abs=1e-6)


def test_score_agrees_with_generate(engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=20, temperature=0.8, ignore_eos=True)
    made = engine.generate(requests(3), sampling)
    scores = engine.score([[1, 70, 80, 90, *one.token_ids] for one in made], 0.8)
    for one, values in zip(made, scores, strict=True):
        assert values[-20:] == pytest.approx(one.logprobs, abs=2e-5)


def test_a_whole_round_is_longer_than_one_batch(engine: VllmEngine) -> None:
    """More prompts than slots and more prompt tokens than one step takes: vLLM cuts no prompt in two.

    (Chunked prefill rewinds seeded generators, which fails on a CPU.)
    """
    prompt = [1, *range(3, 203)]
    made = engine.generate(requests(100, prompt), Sampling(max_tokens=2, ignore_eos=True))
    assert [len(one.token_ids) for one in made] == [2] * 100


def test_the_process_is_left_as_it_was(engine: VllmEngine) -> None:
    torch.manual_seed(11)
    random.seed(12)
    numpy.random.seed(13)
    expected = torch.rand(2), random.random(), numpy.random.rand()
    torch.manual_seed(11)
    random.seed(12)
    numpy.random.seed(13)
    engine.generate(requests(4), Sampling(max_tokens=4))
    engine.score([[1, 2, 3]])
    assert torch.equal(torch.rand(2), expected[0])
    assert (random.random(), numpy.random.rand()) == expected[1:]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_the_models_generation_config_does_not_alter_sampling(engine: VllmEngine) -> None:
    effective = engine.effective_sampling(Sampling(max_tokens=7, stop_token_ids=(END,)))
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
    assert {name: effective[name] for name in neutral} == neutral
    assert effective["max_tokens"] == 7
    assert effective["stop_token_ids"] == [END]
    assert engine._llm.get_default_sampling_params().top_k == 0


def test_what_does_not_fit_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(
        ValueError, match=r"prompt of 4 tokens with max_tokens=300 does not fit max_model_len=256"
    ):
        engine.generate(requests(1), Sampling(max_tokens=300))
    with pytest.raises(ValueError, match="adapter 'a@1'"):
        engine.generate([Request(prompt_ids=[1], seed=0, adapter="a@1")], Sampling(max_tokens=1))
    with pytest.raises(ValueError, match="1 tokens cannot be scored: it must have 2 to 256"):
        engine.score([[1]])


def test_a_failing_round_leaves_nothing_behind(engine: VllmEngine) -> None:
    with pytest.raises(Exception, match="top_p"):
        engine.generate(requests(3), Sampling(max_tokens=4, top_p=2.0))
    assert not engine._engine.has_unfinished_requests()
    assert len(engine.generate(requests(2), Sampling(max_tokens=4, ignore_eos=True))) == 2


def test_memory_names_its_parts(engine: VllmEngine) -> None:
    memory = engine.memory()
    assert memory["peak"] > memory["kv_cache"] > 1 << 20


def test_automatic_kv_cache_holds_every_sequence(tiny_llama: Path) -> None:
    """8 sequences of four blocks of 32, and one block more; 2 layers of 2 KV heads of 32, float32: 1 KiB a
    token."""
    spec = EngineSpec(model=str(tiny_llama), dtype="float32", max_model_len=100, max_num_seqs=8)
    assert kv_cache_bytes(spec) == (8 * 4 + 1) * 32 * 1024


def test_an_engine_longer_than_its_model_is_refused(tiny_llama: Path) -> None:
    """The tiny models take 1024 tokens: an engine for as many gets no more, and one for more is refused."""
    spec = EngineSpec(model=str(tiny_llama), dtype="float32", max_model_len=1024)
    lengths = [_engine_length(replace(spec, max_model_len=asked)) for asked in (1022, 1023, 1024)]
    assert lengths == [1023, 1024, 1024]
    with pytest.raises(ValueError, match=r"max_model_len=1025 tokens, but .* takes at most 1024"):
        VllmEngine(replace(spec, max_model_len=1025))


def test_a_model_of_unknown_size_needs_an_explicit_kv_cache(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no 'num_attention_heads'. Set rollout.kv_cache_gib"):
        kv_cache_bytes(EngineSpec(model=str(tmp_path), max_model_len=10))


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "dynamic", "factor": 4}}, 16384),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 32768),
    ],
)
def test_positions_are_counted_as_vllm_counts_them(
    config: dict[str, object], positions: int | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert max_positions(str(tmp_path)) == positions
