"""How much greedy answers depend on batch size and threads, in bfloat16, LayerCast and float32.

    python -m tests.benchmarks.numerics --model FOLDER [--prompts N] [--out FILE] [RECIPE] [key=value ...]

The held-out problems of RECIPE (by default `dapo/arithmetic`, two-digit sums), rendered by the model's chat
template, are answered greedily by an engine process of its own for each of three number formats, three batch
sizes (`max_num_seqs`) and two thread counts. All read the same checkpoint, which must be in bfloat16, or
float32 would be another model. A problem set in a file: `data.path=set.jsonl data.heldout=30`. Prefixes are
not cached, so that a prompt is computed alike whatever came before it.

Printed: the metrics of LayerCast's section 3 over the six configurations of each format
(`rlhf.evaluation.divergence`), and what each configuration took.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlhf import models
from rlhf.compose import load
from rlhf.config import Config
from rlhf.data.prompts import PromptBuilder
from rlhf.data.splits import load_splits
from rlhf.evaluation.divergence import Divergence, divergence
from rlhf.evaluation.runner import sampling_for
from rlhf.rewards.base import Scorer
from rollout.child_engine import ChildEngine
from rollout.config import EngineDtype, EngineProcess, Numerics, RolloutConfig
from rollout.engine import Sampling
from rollout.engine_spec import text_config
from rollout.host import LocalHost
from rollout.pool import Draw, LocalPool, build_engines
from rollout.types import Prompt
from tests.benchmarks.measuring import PeakMemory, markdown

ARMS = {
    "bfloat16": (EngineDtype.bfloat16, Numerics.standard),
    "LayerCast": (EngineDtype.bfloat16, Numerics.layercast),
    "float32": (EngineDtype.float32, Numerics.standard),
}
BATCHES = (8, 32, 1)
THREADS = (1, 2)


@dataclass(kw_only=True)
class Measured:
    """One format, batch size and thread count."""

    arm: str
    batch: int
    threads: int
    tokens: list[list[int]]
    """Of each problem's response."""
    top1: list[list[float]]
    """Probability of each of them, the largest there was."""
    accuracy: float
    seconds: float
    """Answering all problems, the engine's start not counted."""
    peak: int
    """Highest PSS of the engine's process, bytes."""
    kv_cache: int


@dataclass(kw_only=True)
class Work:
    """What every configuration does."""

    config: Config
    model: models.ResolvedModel
    prompts: list[Prompt]
    sampling: Sampling
    scorer: Scorer
    tokenizer: object


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder in Hugging Face format, or run@step")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--out", type=Path, help="file of a line of JSON a configuration; goes on with it")
    parser.add_argument("rest", nargs="*", metavar="RECIPE or key=value")
    arguments = parser.parse_args()
    recipe = next((word for word in arguments.rest if "=" not in word), "dapo/arithmetic")
    overrides = [word for word in arguments.rest if "=" in word]
    config = load(recipe, [f"model.path={arguments.model}", "rollout.process=child", *overrides])
    with Scorer(config.reward) as scorer:
        work = prepare(config, scorer, arguments.prompts)
        found = read(arguments.out) if arguments.out else []
        done = {(one.batch, one.threads, one.arm) for one in found}
        for threads, batch, arm in itertools.product(THREADS, BATCHES, ARMS):
            if (batch, threads, arm) not in done:
                found.append(measure(work, arm, batch, threads))
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(asdict(found[-1])) + "\n")
    print(tables(found))


def read(file: Path) -> list[Measured]:
    """What an earlier run has measured."""
    return [Measured(**json.loads(line)) for line in file.open()] if file.exists() else []


def prepare(config: Config, scorer: Scorer, limit: int) -> Work:
    """Prompts and settings."""
    scorer.start()
    model = models.resolve(config.model)
    kept = text_config(str(model.folder)).get("dtype")
    if kept != "bfloat16":
        raise SystemExit(f"{model.folder} holds {kept} weights: give a checkpoint in bfloat16.")
    tokenizer = models.load_tokenizer(model, config.model)
    heldout = load_splits(config.data).heldout
    prompts = PromptBuilder(tokenizer, config.data, config.model).build(heldout).prompts[:limit]
    training = config.rollout.sampling(models.end_token_ids(tokenizer, model.folder))
    sampling = sampling_for(config.evaluation, training)
    return Work(
        config=config,
        model=model,
        prompts=prompts,
        sampling=sampling,
        scorer=scorer,
        tokenizer=tokenizer,
    )


def measure(work: Work, arm: str, batch: int, threads: int) -> Measured:
    """Answer all problems in an engine process of their own."""
    print(f"{arm}, batch {batch}, {threads} thread(s) ...", file=sys.stderr, flush=True)
    dtype, numerics = ARMS[arm]
    rollout = replace(
        work.config.rollout,
        dtype=dtype,
        numerics=numerics,
        max_num_seqs=batch,
        threads=threads,
        prefix_caching=False,
    )
    with tempfile.TemporaryDirectory(prefix="whetstone-numerics-") as logs:
        (engine,) = started(work, rollout, Path(logs))
        with closing(LocalPool([engine], work.config.run.seed)) as pool, PeakMemory(engine.pid) as memory:
            draws = [Draw(prompt=p, group_id=f"eval/{p.id}", samples=1) for p in work.prompts]
            begun = time.perf_counter()
            groups = pool.generate(
                draws, work.sampling, born=0, decode=functools.partial(decoded, work.tokenizer)
            )
            seconds = time.perf_counter() - begun
            kv_cache = int(engine.memory()["kv_cache"])
    work.scorer.score(groups)
    answers = [group.trajectories[0] for group in groups]
    return Measured(
        arm=arm,
        batch=batch,
        threads=threads,
        tokens=[list(answer.response_ids) for answer in answers],
        top1=[[math.exp(value) for value in answer.logprobs] for answer in answers],
        accuracy=statistics.fmean(float(answer.accuracy or 0) for answer in answers),
        seconds=seconds,
        peak=memory.peak,
        kv_cache=kv_cache,
    )


def started(work: Work, rollout: RolloutConfig, logs: Path) -> list[ChildEngine]:
    """The engine, when it is ready."""
    engines = build_engines(
        rollout,
        model=str(work.model.folder),
        length=work.config.data.max_prompt_tokens + work.sampling.max_tokens,
        seed=work.config.run.seed,
        tokenizer=str(work.model.tokenizer_folder),
        log_folder=logs,
        host=LocalHost(EngineProcess.child),
    )
    return [engine for engine in engines if isinstance(engine, ChildEngine)]


def decoded(tokenizer: object, token_ids: list[int]) -> str:
    """Text without special tokens."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))  # type: ignore[attr-defined]


# ---------------------------------------------------------------- tables


def tables(found: Sequence[Measured]) -> str:
    """Spread by number format, and cost by configuration, in Markdown."""
    spread = [[arm, *cells(compared(of(found, arm)), of(found, arm))] for arm in ARMS]
    cost = [
        [
            one.arm,
            f"{one.batch}",
            f"{one.threads}",
            f"{one.seconds:.1f}",
            f"{sum(map(len, one.tokens)) / one.seconds:.0f}",
            f"{one.peak / 1e6:.0f}",
            f"{one.kv_cache / 1e6:.0f}",
            f"{one.accuracy:.1%}",
        ]
        for one in found
    ]
    head = ["format", "diverging", "mean index", "std top-1 x1e4", "std length", "accuracy", "Std@Acc"]
    columns = ["format", "batch", "threads", "seconds", "tokens/s", "peak MB", "of it KV", "accuracy"]
    return markdown(head, spread) + "\n\n" + markdown(columns, cost)


def of(found: Sequence[Measured], arm: str) -> list[Measured]:
    """The configurations of one number format."""
    return [one for one in found if one.arm == arm]


def compared(ours: Sequence[Measured]) -> Divergence:
    """The metrics over some configurations."""
    return divergence(
        examples=list(zip(*(one.tokens for one in ours), strict=True)),
        top1=list(zip(*(one.top1 for one in ours), strict=True)),
        accuracies=[one.accuracy for one in ours],
    )


def cells(spread: Divergence, ours: Sequence[Measured]) -> list[str]:
    """One line of the first table."""
    return [
        f"{spread.percent:.1f} %",
        f"{spread.index:.1f}",
        f"{spread.std_top1 * 1e4:.4f}",
        f"{spread.std_length:.3f}",
        f"{statistics.fmean(one.accuracy for one in ours):.1%}",
        f"{spread.std_accuracy:.2%}",
    ]


if __name__ == "__main__":
    main()
