"""Tiny random Llama and Qwen3 models with a byte tokenizer, built offline in under a second.

They carry the traps of real models on purpose: pad is the end token (as in SmolLM2), `generation_config.json`
lists a second end token, the Llama ties its head, and the Qwen3 ships sampling settings that training must
ignore. The weights are random, except for one direction that acts as a bias of the head: digits and the end
token are likely from the start, so that a random model is right now and then and RL has something to learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TINY_KINDS = ("llama", "qwen")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2, as in SmolLM2; the 256 bytes follow."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TinyShape:
    """Sizes of a tiny model. `head_dim` 32 is the smallest that vLLM's CPU attention takes."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 128
    max_positions: int = 1024


def build_tiny(
    kind: str,
    folder: Path,
    *,
    seed: int = 0,
    shape: TinyShape | None = None,
    digit_share: float = 0.55,
    end_share: float = 0.35,
) -> Path:
    """Write a tiny random model of `kind` (llama or qwen) and its tokenizer into `folder`; returns `folder`.

    At the start a sampled token is a digit with probability of about `digit_share`, an end with `end_share`.
    The same arguments give the same bytes. Raises ValueError for an unknown kind.
    """
    if kind not in TINY_KINDS:
        raise ValueError(f"tiny model kind '{kind}' is unknown: use one of {', '.join(TINY_KINDS)}.")
    folder = Path(folder)
    tokenizer = byte_tokenizer()
    model = _random_model(kind, len(tokenizer), shape or TinyShape(), seed)
    _favour_digits(model, tokenizer, digit_share, end_share)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token a byte (every digit its own), ChatML specials and pad = end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *letters))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def _random_model(kind: str, vocabulary: int, shape: TinyShape, seed: int) -> PreTrainedModel:
    """A float32 causal model with random weights; leaves torch's global generator as it was."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }
    ends: dict[str, Any] = {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [2, 0]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
            model.generation_config = GenerationConfig(**ends)
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=False))
            model.generation_config = GenerationConfig(
                **ends, do_sample=True, temperature=0.6, top_p=0.95, top_k=20
            )
    return model


_GAIN = 16.0
"""Strength of the constant dimension after the final norm."""


def _favour_digits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, digit_share: float, end_share: float
) -> None:
    """Make hidden dimension 0 a constant and put the wanted log-odds into column 0 of the head.

    Every embedding gets the same large entry in dimension 0, which the residual stream carries to the final
    norm; the layers' own norms leave it out (weight 0) and scale the rest back up. The final norm makes it
    `_GAIN` strong, so a head column of `logit / _GAIN` is a bias. With a tied head the constant itself shifts
    all logits alike and cancels in the softmax.
    """
    import torch

    net: Any = model
    root = math.sqrt(net.config.hidden_size)
    logits = _wanted_logits(tokenizer, digit_share, end_share)
    with torch.no_grad():
        embedding = net.model.embed_tokens.weight
        head = net.lm_head.weight
        constant = float(embedding.std()) * root * 4
        embedding[:, 0] = constant
        head[:, 0] = logits / _GAIN + (constant if head is embedding else 0.0)
        net.model.norm.weight[0] = _GAIN / root
        for layer in net.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.fill_(4.0)[0] = 0.0
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)


def _wanted_logits(tokenizer: PreTrainedTokenizerFast, digit_share: float, end_share: float) -> torch.Tensor:
    """`[V]` logits under which digits share `digit_share`, the end token has `end_share`, others the rest."""
    import torch

    size = len(tokenizer)
    rest = (1.0 - digit_share - end_share) / (size - 11)
    probabilities = torch.full((size,), rest)
    probabilities[tokenizer.convert_tokens_to_ids(list("0123456789"))] = digit_share / 10
    probabilities[tokenizer.eos_token_id] = end_share
    return torch.log(probabilities / rest)
