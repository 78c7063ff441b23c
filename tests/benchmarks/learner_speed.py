"""Seconds of one learner step by phase, on the demo's shape.

`python -m tests.benchmarks.learner_speed --help` says what can be varied.

A step is 16 prompts of 46 tokens with 8 responses each. Every line is the median of several steps on
SmolLM2-135M-Instruct (or a model folder of your own); the last column is the share of this machine's measured
matrix-product rate that forward and backward reach.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.batch import Row
from trainer.config import LearnerConfig, LoraConfig, OptimizerConfig, Precision
from trainer.learner import Learner
from trainer.loss import LossInputs, LossOutput
from trainer.memory.config import ActivationCheckpointing, MemoryConfig
from trainer.model import load_model

SMOLLM2 = Path.home() / ".cache/whetstone/models/smollm2-135m-instruct"


_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
now = _CLOCKS["wall"]


def policy_gradient(inputs: LossInputs) -> LossOutput:
    """The smallest loss with a ratio."""
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    return LossOutput(loss=-(ratio * inputs.advantages * inputs.token_weights).sum())


def rows_of(prompts: int, samples: int, prompt_tokens: int, response_tokens: int) -> list[Row]:
    """Random rows; response lengths vary by half around `response_tokens`, as real ones do."""
    draw = random.Random(0)
    rows = []
    for group in range(prompts):
        prompt = [draw.randrange(49_000) for _ in range(prompt_tokens)]
        for _ in range(samples):
            length = max(1, round(response_tokens * draw.uniform(0.5, 1.5)))
            rows.append(
                Row(
                    prompt_ids=prompt,
                    response_ids=[draw.randrange(49_000) for _ in range(length)],
                    group=group,
                    advantages=[draw.gauss(0, 1)] * length,
                    token_weights=[1e-3] * length,
                    rollout_logprobs=[-1.0] * length,
                )
            )
    return rows


class _Stopwatch:
    """Seconds by phase of one step, taken at the learner's own seams."""

    def __init__(self, learner: Learner) -> None:
        self.seconds: dict[str, float] = {}
        self._wrap(learner.policy, "forward", "forward")
        self._wrap(learner, "_optimize", "optimizer")

    def _wrap(self, owner: Any, method: str, phase: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now() - start

    def take(self) -> dict[str, float]:
        """The phases since the last call; what is neither forward nor optimizer is backward."""
        seconds, self.seconds = self.seconds, {}
        seconds["backward"] = seconds["step"] - seconds["forward"] - seconds["optimizer"]
        return seconds


def measure(learner: Learner, rows: list[Row], repeats: int) -> dict[str, float]:
    """Median seconds by phase over `repeats` steps, after one that warms up."""
    stopwatch = _Stopwatch(learner)
    taken = []
    for _ in range(repeats + 1):
        with stopwatch("step"):
            (metrics,) = learner.update([rows])
        taken.append(stopwatch.take())
    medians = {phase: statistics.median(seconds[phase] for seconds in taken[1:]) for phase in taken[0]}
    return {**medians, "first": taken[0]["step"], "tokens": metrics["learner/tokens"]}


def product_rate(dtype: torch.dtype) -> float:
    """Matrix-product rate of this machine in FLOP/s, at the shape of the model's MLP."""
    left, right = torch.randn(1600, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    times = []
    for _ in range(30):
        start = now()
        torch.mm(left, right.T)
        times.append(now() - start)
    return 2 * 1600 * 576 * 1536 / statistics.median(times)


def product_flops(model: nn.Module, tokens: float, targets: int) -> float:
    """FLOP of the matrix products of one step: decoder 3 x forward, head 4 x (logits twice)."""
    body = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    )
    head = model.get_output_embeddings().weight.numel()  # type: ignore[operator]
    return 2 * (3 * body * tokens + 4 * head * targets)


VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "unshared": {"share_prompts": False},
    "compiled": {"compile": True},
    "checkpointed": {"memory": MemoryConfig(ActivationCheckpointing.full)},
    "checkpointed selectively": {"memory": MemoryConfig(ActivationCheckpointing.selective)},
    "lora": {"lora": LoraConfig(rank=16)},
    "float32": {"dtype": Precision.float32},
}


def main() -> None:
    """Print one line a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "variants", nargs="*", default=["shared", "unshared"], help=f"of {', '.join(VARIANTS)}"
    )
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=46)
    parser.add_argument("--response-tokens", type=int, default=8)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--clock", choices=_CLOCKS, default="wall", help="cpu: seconds of CPU, for busy machines"
    )
    args = parser.parse_args()
    global now
    now = _CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    rows = rows_of(args.prompts, args.samples, args.prompt_tokens, args.response_tokens)
    targets = sum(len(row.response_ids) for row in rows)
    print("variant       tokens   step  first forward backward optimizer tokens/s  of product rate")
    for name in args.variants:
        config = LearnerConfig(
            token_budget=args.token_budget, optimizer=OptimizerConfig(lr=1e-6), **VARIANTS[name]
        )
        learner = Learner(
            config, load_model(args.model), loss=policy_gradient, temperature=1.0, total_steps=9, seed=0
        )
        rate = product_rate(learner.dtype)
        m = measure(learner, rows, args.repeats)
        share = (
            product_flops(learner.policy.model, m["tokens"], targets) / rate / (m["forward"] + m["backward"])
        )
        seconds = " ".join(f"{m[phase]:6.2f}" for phase in ("step", "first"))
        phases = f"{m['forward']:7.2f} {m['backward']:8.2f} {m['optimizer']:9.2f}"
        print(
            f"{name:13s} {m['tokens']:6.0f} {seconds} {phases} {m['tokens'] / m['step']:8.0f} {share:11.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
