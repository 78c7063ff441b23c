"""What our pool costs over bare `vllm.LLM.generate`, and the pool on Ray over the pool of child processes.

    python -m tests.benchmarks.pool_overhead [--rounds N] [--model FOLDER] [--threads N]

The work of `rollout_speed`: 16 prompts of 46 tokens, 8 samples each, exactly 64 new tokens. All four arms
have the same engine arguments, threads, preloaded libraries, seeds, log-prob and detokenising settings
(none); the bare one is the very `vllm.LLM` that the first pool's engine wraps. The arms take turns on every
round's prompts, in an order that turns too, and what is compared is pairs of the same round, so that a
neighbour's load meets all alike. Run it on a quiet machine. The table is Markdown, for `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rollout.child_engine import _environment
from rollout.config import EngineDtype, EngineProcess, PoolKind, RolloutConfig
from rollout.engine import Sampling
from rollout.engine_spec import EngineSpec
from rollout.pool import Draw, LocalPool, build_engines, open_host
from rollout.types import Prompt, sample_seed
from rollout.vllm_engine import _sampling_params
from tests.benchmarks.measuring import markdown
from tests.benchmarks.rollout_speed import GROUPS, MODEL, PROMPT, RESPONSE, SAMPLES

BARE, INPROCESS, CHILD, RAY = (
    "`vllm.LLM.generate`",
    "our pool, engine in the same process",
    "our pool, engine in a child process",
    "our pool, engine on Ray",
)
AGAINST = {INPROCESS: BARE, CHILD: BARE, RAY: CHILD}
"""What each arm is compared with."""

RUN_SEED = 7

Prompts = Callable[[int], list[list[int]]]

Arm = Callable[[int], int]
"""Generates round `number`; returns the tokens."""


def main() -> None:
    """Measure in a process that has a child engine's variables, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds of every arm")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--threads", type=int, default=0, help="of each engine; 0: all usable cores")
    parser.add_argument("--tokens", type=int, default=RESPONSE, help="of each response")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        os.environ.pop(
            "LD_PRELOAD", None
        )  # in force here; children and Ray's processes choose for themselves
        print(table(measure(settings(arguments), arguments.model, arguments.rounds)))
        return
    spec = EngineSpec(model=str(arguments.model), max_model_len=1, threads=arguments.threads)
    command = [sys.executable, "-m", "tests.benchmarks.pool_overhead", "--here", *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=_environment(spec), check=False).returncode)


def settings(arguments: argparse.Namespace) -> RolloutConfig:
    """One engine."""
    return RolloutConfig(
        dtype=EngineDtype.bfloat16,
        threads=arguments.threads,
        eager=arguments.eager,
        max_new_tokens=arguments.tokens,
        kv_cache_gib=0.5,
    )


def measure(config: RolloutConfig, model: Path, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of every arm in every round."""
    rates: dict[str, list[float]] = {name: [] for name in (BARE, INPROCESS, CHILD, RAY)}
    with ExitStack() as opened:
        arms = _arms(config, model, opened)
        for arm in arms.values():  # first calls compile and allocate
            arm(0)
        for number in range(1, rounds + 1):
            names = list(arms)
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                began = time.perf_counter()
                tokens = arms[name](number)
                rates[name].append(tokens / (time.perf_counter() - began))
    return rates


def _arms(config: RolloutConfig, model: Path, opened: ExitStack) -> dict[str, Arm]:
    pools = {
        name: opened.enter_context(closing(_pool(config, model, process, kind)))
        for name, process, kind in [
            (INPROCESS, EngineProcess.inprocess, PoolKind.local),
            (CHILD, EngineProcess.child, PoolKind.local),
            (RAY, EngineProcess.child, PoolKind.ray),
        ]
    }
    sampling = Sampling(max_tokens=config.max_new_tokens, ignore_eos=True)
    prompts = functools.partial(_prompts, json.loads((model / "config.json").read_text())["vocab_size"])
    arms = {name: _pooled(pool, prompts, sampling) for name, pool in pools.items()}
    engine: Any = pools[INPROCESS].engines[0]
    return {BARE: _bare(engine._llm, prompts, sampling), **arms}


def _prompts(vocabulary: int, number: int) -> list[list[int]]:
    """The `[GROUPS]` prompts of round `number`, which no round before had: no prefix of theirs is cached."""
    rng = random.Random(number)
    return [[rng.randrange(vocabulary // 2, vocabulary) for _ in range(PROMPT)] for _ in range(GROUPS)]


def _pool(config: RolloutConfig, model: Path, process: EngineProcess, kind: PoolKind) -> LocalPool:
    config = replace(config, process=process, pool=kind)
    host = open_host(config)
    length = PROMPT + config.max_new_tokens
    return LocalPool(build_engines(config, model=str(model), length=length, host=host), RUN_SEED, host)


def _bare(llm: Any, prompts: Prompts, sampling: Sampling) -> Arm:
    def generate(number: int) -> int:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts(number) for _ in range(SAMPLES)]
        seeds = [sample_seed(RUN_SEED, f"{number}/{i // SAMPLES}", i % SAMPLES) for i in range(len(asked))]
        parameters = [_sampling_params(sampling, seed) for seed in seeds]
        outputs = llm.generate(asked, parameters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def _pooled(pool: LocalPool, prompts: Prompts, sampling: Sampling) -> Arm:
    def generate(number: int) -> int:
        draws = [
            Draw(
                prompt=Prompt(id=str(i), token_ids=prompt, text="", answer=None, source="x"),
                group_id=f"{number}/{i}",
                samples=SAMPLES,
            )
            for i, prompt in enumerate(prompts(number))
        ]
        groups = pool.generate(draws, sampling, born=0, decode=lambda ids: "")
        assert len(groups) == GROUPS
        return sum(len(made.response_ids) for group in groups for made in group.trajectories)

    return generate


def table(rates: dict[str, list[float]]) -> str:
    """Medians, and by how much longer an arm takes than the one it is compared with, of the same round."""
    rows = [
        [name, f"{statistics.median(values):.0f}", *_longer(name, rates)] for name, values in rates.items()
    ]
    return markdown(["arm", "tokens/s", "takes longer", "than", "quartiles"], rows)


def _longer(name: str, rates: dict[str, list[float]]) -> Sequence[str]:
    if name not in AGAINST:
        return ["-", "-", "-"]
    extra = [theirs / ours - 1 for ours, theirs in zip(rates[name], rates[AGAINST[name]], strict=True)]
    low, middle, high = statistics.quantiles(extra, n=4) if len(extra) > 1 else extra * 3
    return [f"{middle:+.1%}", AGAINST[name], f"{low:+.1%} to {high:+.1%}"]


if __name__ == "__main__":
    main()
