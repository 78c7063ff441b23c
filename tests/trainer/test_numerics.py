"""LayerCast in torch: what it equals bit for bit, what it keeps in memory, and what it leaves as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, PreTrainedModel

from tests.trainer.samples import Reinforce, from_config, random_rows, tiny_model, tiny_shape
from trainer import numerics
from trainer.config import Device, LearnerConfig, LoraConfig, OptimizerConfig, Precision
from trainer.learner import Learner
from trainer.numerics import layercast, layercast_linear, require_float32, rounds_float32, upcast_forwards

KINDS = ["llama", "qwen2", "qwen3"]
"""A tied head, biases of q, k and v, norms of q and k."""


def rounded(kind: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model whose weights are bfloat16 numbers, held in `dtype`; its rotary table stays float32."""
    model = tiny_model(kind)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
    return model


def test_upcasting_loses_nothing_of_any_bfloat16_number() -> None:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    back = patterns.float().to(torch.bfloat16)
    numbers = ~patterns.isnan()
    assert int(numbers.sum()) == (1 << 16) - 2 * 127  # exponent all ones and a payload, of either sign
    assert torch.equal(back.view(torch.int16)[numbers], patterns.view(torch.int16)[numbers])
    assert back[~numbers].isnan().all()


# ---------------------------------------------------------------- one product


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inside", "out"), [(1, 64, 48), (2, 33, 7), (17, 576, 960), (129, 48, 300)])
def test_a_product_is_float32s_bit_for_bit(rows: int, inside: int, out: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inside, generator=generator)
    weight = torch.randn(out, inside, generator=generator).to(torch.bfloat16)
    offset = torch.randn(out, generator=generator).to(torch.bfloat16) if bias else None
    expected = F.linear(x, weight.float(), None if offset is None else offset.float())
    assert torch.equal(layercast_linear(x, weight, offset), expected)
    strided = torch.randn(inside, rows, generator=generator).T
    assert not strided.is_contiguous() or rows == 1
    for shaped in (strided, strided[None]):
        expected = F.linear(shaped, weight.float(), None if offset is None else offset.float())
        assert torch.equal(layercast_linear(shaped, weight, offset), expected)


def test_fused_queries_keys_and_values_are_one_product() -> None:
    parts = [torch.randn(rows, 64).to(torch.bfloat16) for rows in (128, 32, 32)]
    x = torch.randn(5, 64)
    whole = layercast_linear(x, torch.cat(parts))
    assert torch.equal(whole, F.linear(x, torch.cat([part.float() for part in parts])))


def test_gradients_are_float32s_rounded_once() -> None:
    weight = torch.randn(24, 16).to(torch.bfloat16).requires_grad_()
    bias = torch.randn(24).to(torch.bfloat16).requires_grad_()
    x = torch.randn(2, 9, 16, requires_grad=True)
    wide = [tensor.detach().float().requires_grad_() for tensor in (x, weight, bias)]
    slope = torch.randn(2, 9, 24)
    (layercast_linear(x, weight, bias) * slope).sum().backward()
    (F.linear(*wide) * slope).sum().backward()
    for ours, reference in zip((x, weight, bias), wide):
        assert ours.grad is not None
        assert reference.grad is not None
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(ours.grad.float(), reference.grad, rtol=2**-8, atol=1e-6)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wide[0].grad, rtol=1e-6, atol=1e-6)
    assert wide[1].grad is not None
    narrow = wide[1].grad.to(torch.bfloat16)
    assert weight.grad is not None
    assert (weight.grad == narrow).float().mean() > 0.99  # float32 sums in another order, then one rounding


def test_an_activation_that_is_not_float32_is_refused() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        layercast_linear(torch.ones(1, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16))


# ---------------------------------------------------------------- a whole model


def bits(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_checkpoint_loaded_in_float32(kind: str, held: torch.dtype) -> None:
    """Same kernels, thread count and batch: equal to the bit, also token after token from a cache."""
    wide, model = rounded(kind), rounded(kind, held)
    ids = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    options: Any = {"max_new_tokens": 256, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), layercast(model), require_float32(model):
        assert torch.equal(model(ids).logits, wide(ids).logits)
        ours = model.generate(ids[:1], **options)  # type: ignore[operator]
    reference = wide.generate(ids[:1], **options)  # type: ignore[operator]
    assert ours.shape == (1, 40 + 256)
    assert torch.equal(ours, reference)
    with torch.no_grad():
        narrow = rounded(kind, torch.bfloat16)(ids).logits
    assert (narrow - wide(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_out_as_it_went_in(kind: str) -> None:
    for held in (torch.bfloat16, torch.float32):
        model = rounded(kind, held)
        before, ids = bits(model), torch.arange(20)[None]
        expected = model(ids).logits
        with layercast(model):
            inside = model(ids).logits
            with layercast(model):
                assert torch.equal(model(ids).logits, inside)
            assert torch.equal(model(ids).logits, inside)
        assert torch.equal(model(ids).logits, expected)
        after = bits(model)
        assert [tensor.dtype for tensor in after.values()] == [tensor.dtype for tensor in before.values()]
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert not any("forward" in vars(module) for module in model.modules())


def test_bytes_are_two_a_matrix_and_four_a_norm() -> None:
    """§9.8 of the notes: 2 bytes for linear layers and embeddings, 4 for the rest, a tied head once."""
    for kind in KINDS:
        model = rounded(kind)
        names = dict(model.named_parameters())
        norms = sum(p.numel() for name, p in names.items() if "norm" in name)
        total = sum(p.numel() for p in names.values())
        with layercast(model):
            held = sum(p.numel() * p.element_size() for p in model.parameters())
            largest = max(p.numel() for p in model.parameters()) * 4
        assert held == 2 * (total - norms) + 4 * norms
        assert largest == 300 * 48 * 4  # the head: no larger float32 copy is ever made
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == (kind == "llama")


def test_weights_that_are_no_bfloat16_numbers_are_refused_untouched() -> None:
    model = tiny_model()
    refusal = r"^model\.embed_tokens\.weight holds values that bfloat16 does not"
    with pytest.raises(ValueError, match=refusal), layercast(model):
        pass
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_layer_norms_are_computed_in_float32_too() -> None:
    sizes = {name: value for name, value in tiny_shape().items() if name != "num_key_value_heads"}
    wide = from_config(GPTNeoXConfig(**sizes)).to(torch.bfloat16).float()  # type: ignore[arg-type]
    model = copy.deepcopy(wide).to(torch.bfloat16)
    undo = upcast_forwards(model)  # storage as a learner's: norms in bfloat16 as well
    ids = torch.arange(20)[None]
    with torch.no_grad(), require_float32(model):
        assert torch.equal(model(ids).logits, wide(ids).logits)
    undo()


class Narrow(nn.Module):
    """Returns what its input must not become."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


def test_a_module_that_leaves_float32_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Narrow())
    named = pytest.raises(ValueError, match=r"^1 \(Narrow\) returns bfloat16 where LayerCast computes in")
    with named, require_float32(model):
        model(torch.ones(1, 4))
    refused = pytest.raises(ValueError, match=r"^Sequential does not run in LayerCast \(.*dtype")
    with refused, require_float32(model):
        model(torch.ones(1, 4, dtype=torch.bfloat16))
    model(torch.ones(1, 4))


# ---------------------------------------------------------------- the learner


def learner(model: Any, dtype: Precision, **options: Any) -> Learner:
    config = LearnerConfig(dtype=dtype, device=Device.cpu, optimizer=OptimizerConfig(lr=1e-3))
    for name in [name for name in options if hasattr(config, name)]:
        setattr(config, name, options.pop(name))
    fixed: dict[str, Any] = {"loss": Reinforce(), "temperature": 0.8, "total_steps": 10, "seed": 0}
    return Learner(config, model, **fixed, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_scores_as_a_float32_one_with_rounded_weights(kind: str) -> None:
    """Before and after updates: its masters are float32, what it computes with is what engines are sent."""
    rows = random_rows()
    cast = learner(tiny_model(kind), Precision.bfloat16, layercast=True, needs_reference=True)
    assert cast.reference_logprobs(rows) == learner(rounded(kind), Precision.float32).logprobs(rows)
    for _ in range(3):
        cast.update([rows])
        masters = dict(zip(cast.master.names, cast.master.parameters))
        assert any(not torch.equal(p, p.to(torch.bfloat16).float()) for p in masters.values())
        wide: Any = tiny_model(kind)
        with torch.no_grad():
            for name, parameter in wide.named_parameters():
                parameter.copy_(masters[f"model.{name}"].to(torch.bfloat16))
        assert cast.logprobs(rows) == learner(wide, Precision.float32).logprobs(rows)
    sent = dict(cast.weights())
    assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16}
    assert all(torch.equal(sent[name], p.to(torch.bfloat16)) for name, p in wide.named_parameters())


def test_a_learners_gradients_are_float32s_rounded_once() -> None:
    rows = random_rows()
    grads = []
    for made in (
        learner(rounded("qwen2"), Precision.float32),
        learner(rounded("qwen2"), Precision.bfloat16, layercast=True),
    ):
        kept: dict[str, Tensor] = {}
        made._optimize = lambda made=made, kept=kept: (  # type: ignore[method-assign, misc]
            kept.update({n: p.grad.clone() for n, p in made.master.named if p.grad is not None}) or 1.0
        )
        made.update([rows])
        grads.append(kept)
    assert set(grads[0]) == set(grads[1])
    for name, reference in grads[0].items():
        scale = reference.abs().max()
        assert (grads[1][name] - reference).abs().max() < 2**-8 * scale, name


def test_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^rollout\.numerics=layercast does not train adapters"):
        learner(tiny_model(), Precision.bfloat16, layercast=True, lora=LoraConfig(rank=4))


# ---------------------------------------------------------------- float32 that is float32


def test_products_on_the_cpu_are_float32s() -> None:
    assert not rounds_float32("cpu")
    numerics.require_exact_products("cpu")


@pytest.mark.parametrize("format", ["tf32", "bfloat16"])
def test_rounded_factors_are_found(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector on a product whose factors lose the bits that the format does not have."""
    lost = {"tf32": 13, "bfloat16": 16}[format]

    def rounding(x: Tensor, weight: Tensor) -> Tensor:
        keep = (x.view(torch.int32) + (1 << (lost - 1))) >> lost << lost
        return keep.view(torch.float32) @ weight.T

    monkeypatch.setattr(numerics.F, "linear", rounding)
    assert rounds_float32()
    with pytest.raises(ValueError, match=r"^rollout\.numerics=layercast computes in float32, but matrix"):
        numerics.require_exact_products()


@pytest.mark.gpu
def test_tf32_on_a_gpu_is_found_and_refused() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert not rounds_float32("cuda")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert rounds_float32("cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---------------------------------------------------------------- why: sums depend on their order


@pytest.mark.parametrize(
    ("numbers", "dtype", "first", "second"),
    [
        ((0.1, -0.1, 0.2), torch.float32, 0x3E4CCCCD, 0x3E4CCCCE),
        ((0.1, -0.1, 0.2), torch.bfloat16, 0x3E4D, 0x3E4E),
        ((0.0016, 0.0027, 1.0), torch.float32, 0x3F808CE7, 0x3F808CE7),
        ((0.0016, 0.0027, 1.0), torch.bfloat16, 0x3F81, 0x3F80),
    ],
)
def test_the_papers_sums(numbers: tuple[float, ...], dtype: torch.dtype, first: int, second: int) -> None:
    a, b, c = torch.tensor(numbers).to(dtype)
    pattern = torch.int32 if dtype == torch.float32 else torch.int16
    assert ((a + b) + c).view(pattern) == first
    assert ((a + c) + b).view(pattern) == second


def test_splitting_a_sum_matters_65536_times_less_in_float32() -> None:
    """4 096 products, added up in 1, 2, 4 and 8 parts: 24 significant bits against 8."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(256, 4096, generator=generator).to(torch.bfloat16) for _ in range(2))
    products = x.float() * weight.float()  # exact
    spread = {}
    for dtype in (torch.float32, torch.bfloat16):
        sums = torch.stack([split_sum(products, parts, dtype) for parts in (1, 2, 4, 8)])
        spread[dtype] = (sums.amax(0) - sums.amin(0)).mean().item()
    assert 2**14.5 < spread[torch.bfloat16] / spread[torch.float32] < 2**17.5


def split_sum(products: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """`[rows]`: each of `parts` runs of a row added up term by term in `dtype`, then the runs."""
    terms = products.to(dtype).view(len(products), parts, -1).unbind(-1)
    runs = torch.zeros_like(terms[0])
    for term in terms:
        runs += term
    total = runs[:, 0].clone()
    for run in runs.unbind(-1)[1:]:
        total += run
    return total.float()


def test_splitting_a_layercast_product_matters_as_in_float32() -> None:
    x = torch.randn(16, 4096, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(8, 4096, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    for parts in (1, 2, 4, 8):
        pieces = list(zip(x.chunk(parts, 1), weight.chunk(parts, 1)))
        ours = sum(layercast_linear(a, b) for a, b in pieces)
        assert torch.equal(ours, sum(F.linear(a, b.float()) for a, b in pieces))  # type: ignore[arg-type]
