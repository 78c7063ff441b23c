"""The tiny models: they load, they carry the traps of real ones, and digits and ends are likely."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.tiny_models import TinyShape, build_tiny, byte_tokenizer

KINDS = ["tiny_llama", "tiny_qwen"]


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_loads_in_transformers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.architectures == [type(model).__name__]
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (
        4,
        2,
        32,
    )
    assert model.num_parameters() < 200_000
    assert model.get_input_embeddings().num_embeddings == len(AutoTokenizer.from_pretrained(folder)) == 259


def test_one_head_is_tied_and_the_other_is_not(tiny_llama: Path, tiny_qwen: Path) -> None:
    for path, tied in ((tiny_llama, True), (tiny_qwen, False)):
        model = AutoModelForCausalLM.from_pretrained(path)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_pad_is_the_end_token_and_there_is_a_second_end(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_the_qwen_brings_sampling_settings_that_training_must_ignore(tiny_qwen: Path) -> None:
    settings = json.loads((tiny_qwen / "generation_config.json").read_text())
    assert (settings["temperature"], settings["top_k"]) == (0.6, 20)


@pytest.mark.parametrize("text", ["What is 11 + 21?", "naïve 7\n\t  x", "日本 3.14", "", "\x00\x7f"])
def test_tokenizer_is_one_token_a_byte_and_lossless(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_one_token_each() -> None:
    assert byte_tokenizer()("<|im_start|>a<|im_end|><|endoftext|>")["input_ids"][::3] == [1, 0]
    assert byte_tokenizer()("<|im_end|>")["input_ids"] == [2]


def test_digits_and_ends_are_likely_from_the_start(folder: Path) -> None:
    """Within a factor of 1.5 of the shares that were asked for, averaged over every position of a prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(
        "<|im_start|>user\nWhat is 48 + 17?<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt"
    )
    with torch.no_grad():
        share = model(**ids).logits[0].softmax(-1).mean(0)
    digits = share[tokenizer.convert_tokens_to_ids(list("0123456789"))].sum().item()
    assert 0.55 / 1.5 < digits < 0.55 * 1.5
    assert 0.35 / 1.5 < share[2].item() < 0.35 * 1.5


def test_the_prompt_matters(folder: Path) -> None:
    """A constant dimension must not drown the content: other prompts give other distributions."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in ("1 + 2 =", "1 + 7 =")])
    with torch.no_grad():
        logits = model(ids).logits[:, -1].log_softmax(-1)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_same_seed_same_bytes(tmp_path: Path, kind: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (build_tiny(kind, tmp_path / str(i), seed=s) for i, s in enumerate((1, 1, 2)))
    names = sorted(file.name for file in first.iterdir())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"


def test_shape_is_settable(tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "m", shape=TinyShape(hidden=96, layers=3, heads=6, kv_heads=3))
    assert len(AutoModelForCausalLM.from_pretrained(folder).model.layers) == 3


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny model kind 'mamba' is unknown: use one of llama, qwen"):
        build_tiny("mamba", tmp_path)
