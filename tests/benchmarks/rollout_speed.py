"""How fast responses are generated: `vllm.LLM` with its defaults against our engines, on the same work.

    python -m tests.benchmarks.rollout_speed [--only WORDS] [--rounds N] [--model FOLDER]

The work: 16 prompts of 46 tokens, 8 samples each, exactly 64 new tokens, the sampled token's log-prob. Every
row runs in a process of its own, one after another; every round has prompts of its own, as after a publish no
prefix is left in the cache. Run it on a quiet machine. The table is Markdown, for `docs/performance.md`.

vLLM's defaults run without seeds: with them, vLLM 0.32 fails on a CPU as soon as a step's token budget cuts a
prompt in two ("CPU Generator does not use offset").
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GROUPS, SAMPLES, PROMPT, RESPONSE = 16, 8, 46, 64

MODEL = Path("~/.cache/whetstone/models/smollm2-135m-instruct").expanduser()

KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 31), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    kind: str
    """`defaults` (vllm.LLM), `inprocess` or `child`."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Changes to `EngineSpec`."""
    environment: dict[str, str] = field(default_factory=dict)
    vllm_sampler: bool = False
    """Keep vLLM's sampler instead of ours (in process only)."""


def rows() -> list[Row]:
    """Cumulative steps from one eager thread to our defaults, then variations of these."""
    two = {"threads": 2, "max_num_seqs": 256}
    bound = {"GOMP_CPU_AFFINITY": "0 1"}
    old_blocks = two | {"block_size": 128}
    return [
        Row("vllm.LLM, defaults (own processes, threads bound: auto)", "defaults"),
        Row("vllm.LLM, bound to 0,1", "defaults", environment={"VLLM_CPU_OMP_THREADS_BIND": "0,1"}),
        Row("vllm.LLM, bound to 0-1", "defaults", environment={"VLLM_CPU_OMP_THREADS_BIND": "0-1"}),
        Row("in process, 1 thread, eager", "inprocess", old_blocks | {"threads": 1, "eager": True}, {}, True),
        Row("in process, 2 threads, eager", "inprocess", old_blocks | {"eager": True}, {}, True),
        Row("+ compiled", "inprocess", old_blocks, {}, True),
        Row("+ blocks of 32 tokens", "inprocess", two, {}, True),
        Row("+ our sampler", "inprocess", two),
        Row("+ memory kept by malloc", "inprocess", two, KEEP_MEMORY),
        Row("child process (the default)", "child", two),
        Row("child, nothing preloaded", "child", two | {"preload": False}),
        Row("child, threads bound", "child", two | {"preload": False}, bound),
        Row("child, eager", "child", two | {"eager": True}),
        Row("child, 1 thread", "child", two | {"threads": 1}),
        Row("child, max_num_seqs=64", "child", two | {"max_num_seqs": 64}),
        Row("child, max_num_seqs=128", "child", two | {"max_num_seqs": 128}),
    ]


def main() -> None:
    """Measure the rows that `--only` names (all by default) and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name has one of these, separated by |")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds a row; the median counts")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(
            "RESULT "
            + json.dumps(_measure(Row(**json.loads(arguments.one)), arguments.model, arguments.rounds))
        )
        return
    words = arguments.only.split("|")
    chosen = [row for row in rows() if any(word in row.name for word in words)]
    results = [(row, _in_own_process(row, arguments.model, arguments.rounds)) for row in chosen]
    print(_table(results))


def _in_own_process(row: Row, model: Path, rounds: int) -> dict[str, float]:
    print(f"{row.name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "tests.benchmarks.rollout_speed", "--one", json.dumps(asdict(row))]
    done = subprocess.run(
        [*command, "--model", str(model), "--rounds", str(rounds)],
        env=os.environ | row.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    raise RuntimeError(f"'{row.name}' failed:\n{done.stderr[-2000:]}")


def _table(results: list[tuple[Row, dict[str, float]]]) -> str:
    base = next(
        (values["rate"] for row, values in results if row.name.startswith("vllm.LLM, defaults")), None
    )
    lines = ["| engine | tokens/s | x defaults | spread | start s |", "|---|---:|---:|---:|---:|"]
    for row, values in results:
        ratio = f"{values['rate'] / base:.2f}" if base else "-"
        cells = [
            row.name,
            f"{values['rate']:.0f}",
            ratio,
            f"{values['spread']:.0%}",
            f"{values['start']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _measure(row: Row, model: Path, rounds: int) -> dict[str, float]:
    started = time.perf_counter()
    generate = _defaults(model) if row.kind == "defaults" else _ours(row, model)
    start = time.perf_counter() - started
    generate(0)  # first calls compile and allocate
    rates = []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        tokens = generate(number)
        rates.append(tokens / (time.perf_counter() - began))
    rate = statistics.median(rates)
    return {"rate": rate, "spread": (max(rates) - min(rates)) / rate, "start": start}


def _prompts(number: int) -> list[list[int]]:
    """The `[GROUPS * SAMPLES]` prompts of round `number`; the samples of a group share theirs."""
    rng = random.Random(number)
    groups = [[rng.randrange(1000, 40_000) for _ in range(PROMPT)] for _ in range(GROUPS)]
    return [prompt for prompt in groups for _ in range(SAMPLES)]


def _defaults(model: Path) -> Callable[[int], int]:
    from vllm import LLM, SamplingParams

    # An explicit cache size changes no speed; by default vLLM wants 92 % of the machine's memory to be free.
    llm = LLM(str(model), kv_cache_memory_bytes=1 << 30)
    params = SamplingParams(temperature=1.0, max_tokens=RESPONSE, ignore_eos=True, logprobs=0)

    def prompts(number: int) -> list[Any]:
        return [{"prompt_token_ids": prompt} for prompt in _prompts(number)]

    def generate(number: int) -> int:
        outputs = llm.generate(prompts(number), params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def _ours(row: Row, model: Path) -> Callable[[int], int]:
    from rollout.child_engine import ChildEngine
    from rollout.engine import Request, Sampling
    from rollout.engine_spec import EngineSpec
    from rollout.vllm_engine import VllmEngine

    spec = EngineSpec(**{"model": str(model), "max_model_len": PROMPT + RESPONSE, **row.spec})
    if row.vllm_sampler:
        import rollout.vllm_sampler

        rollout.vllm_sampler.install = lambda worker: None
    engine: Any = ChildEngine(spec) if row.kind == "child" else VllmEngine(spec)
    if row.kind == "child":
        engine.wait()
    sampling = Sampling(max_tokens=RESPONSE, ignore_eos=True)

    def generate(number: int) -> int:
        requests = [
            Request(prompt_ids=prompt, seed=number * 1000 + index)
            for index, prompt in enumerate(_prompts(number))
        ]
        return sum(len(made.token_ids) for made in engine.generate(requests, sampling))

    return generate


if __name__ == "__main__":
    main()
