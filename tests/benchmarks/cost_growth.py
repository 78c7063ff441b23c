"""How time and memory grow with group size, response limit, prompt, model and vocabulary.

    python -m tests.benchmarks.cost_growth            # about 15 minutes on two idle cores
    python -m tests.benchmarks.cost_growth --quick    # a smoke test on the smallest model
    python -m tests.benchmarks.cost_growth --table docs/measured/cost_growth.json

One step of the learner on one group, on random weights of SmolLM2-135M's shape unless the model is what
grows; all responses have the limit's length, and one micro-batch holds the whole group unless a token budget
is named. Every point of the learner runs in a process of its own, whose peak the kernel keeps. `step` memory
is that peak during a step, less what the process held before the model was made and less weights, gradient
and Adam's moments. Generation is one group, log-probs included; its memory is the KV cache, which is reserved
at the start, and is not measured. The head is measured alone: log-probs of 2048 tokens and their gradient,
above its weight and the weight's gradient, and the plain log-softmax beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf.figures import Chart, Curve, growth
from tests.benchmarks.measuring import markdown, peak_resident, power_law, reset_peak, resident

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama. vLLM's attention on a CPU takes heads of 32 or 64."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 4096


SMOLLM2 = Shape(hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536, vocabulary=49_152)
MODELS = [
    Shape(hidden=128, layers=3, heads=4, kv_heads=2, intermediate=384),
    Shape(hidden=192, layers=8, heads=6, kv_heads=2, intermediate=512),
    Shape(hidden=320, layers=12, heads=10, kv_heads=2, intermediate=896),
    Shape(hidden=448, layers=20, heads=14, kv_heads=2, intermediate=1216),
    Shape(hidden=576, layers=37, heads=9, kv_heads=3, intermediate=1536),
]
"""About 1, 4, 15, 44 and 133 million parameters, all with one vocabulary."""
NO_LIMIT = 1 << 20
BUDGET = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement."""

    kind: str
    """`learner`, `generation`, `head` or `plain` (a head that holds all logits)."""
    shape: Shape = SMOLLM2
    group_size: int = 8
    prompt: int = 64
    response: int = 64
    token_budget: int = NO_LIMIT
    repeats: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points along one axis."""

    name: str
    axis: str
    points: Sequence[Point]
    x: Sequence[float] = field(default_factory=list)
    """Position of each point; empty where it has to be measured (parameters)."""


def all_series() -> list[Series]:
    """Everything that is measured."""
    learner, generation = Point(kind="learner"), Point(kind="generation", repeats=1)
    sizes, limits, prompts = [4, 8, 16, 32], [64, 128, 256, 512, 1024], [32, 64, 128, 256, 512, 1024]
    vocabularies = [4096, 16_384, 49_152, 151_936]
    made = []
    for name, point in (("learner", learner), ("generation", generation)):
        made += [
            _series(name, "group size", [replace(point, group_size=g) for g in sizes], sizes),
            _series(
                name, "response limit", [replace(point, group_size=4, response=r) for r in limits], limits
            ),
            _series(name, "prompt", [replace(point, prompt=p) for p in prompts], prompts),
            _series(name, "parameters", [replace(point, shape=shape) for shape in MODELS], []),
        ]
    long = [replace(learner, group_size=4, response=r, token_budget=BUDGET) for r in limits]
    made.append(_series(f"learner, {BUDGET} tokens a micro-batch", "response limit", long, limits))
    for kind, name in (("head", "sliced head"), ("plain", "plain log-softmax")):
        points = [Point(kind=kind, shape=replace(SMOLLM2, hidden=64, vocabulary=v)) for v in vocabularies]
        made.append(_series(name, "vocabulary", points, vocabularies))
    return made


def _series(name: str, axis: str, points: Sequence[Point], x: Sequence[float]) -> Series:
    return Series(name=name, axis=axis, points=points, x=x)


def shortened(series: Series) -> Series:
    """The two cheapest points, with the smallest model: a smoke test."""
    small = [
        point if series.axis == "parameters" else replace(point, shape=_small(point))
        for point in series.points
    ]
    return replace(series, points=small[:2], x=series.x[:2])


def _small(point: Point) -> Shape:
    return point.shape if point.kind in ("head", "plain") else MODELS[0]


# ---------------------------------------------------------------- one point, in its own process


def measure(point: Point) -> Json:
    """The numbers of a point of learner or head."""
    return learner_point(point) if point.kind == "learner" else head_point(point)


def learner_point(point: Point) -> Json:
    """Seconds and memory of a step, after one that allocates Adam's moments."""
    from tests.benchmarks.learner_side import tensor_bytes
    from tests.benchmarks.learner_speed import policy_gradient
    from trainer.config import LearnerConfig, OptimizerConfig
    from trainer.learner import Learner

    before = resident()
    config = LearnerConfig(token_budget=point.token_budget, optimizer=OptimizerConfig(lr=1e-6))
    learner = Learner(
        config, random_model(point.shape), loss=policy_gradient, temperature=1.0, total_steps=9, seed=0
    )
    rows = rows_of(point)
    learner.update([rows])
    reset_peak()
    seconds = []
    for _ in range(point.repeats):
        start = time.perf_counter()
        (metrics,) = learner.update([rows])
        seconds.append(time.perf_counter() - start)
    tensors = sum(tensor_bytes(learner).values())
    return {
        "seconds": statistics.median(seconds),
        "peak": peak_resident(),
        "step": peak_resident() - before - tensors,
        "tensors": tensors,
        "parameters": sum(p.numel() for p in learner.policy.parameters()),
        "tokens": metrics["learner/tokens"],
    }


def random_model(shape: Shape) -> Any:
    """A Llama of that shape with random float32 weights and a tied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def rows_of(point: Point) -> list[Any]:
    """One group of random tokens, every response as long as the limit."""
    from trainer.batch import Row

    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, point.shape.vocabulary) for _ in range(count)]

    prompt, length = tokens(point.prompt), point.response
    return [
        Row(
            prompt_ids=prompt,
            response_ids=tokens(length),
            group=0,
            advantages=[draw.gauss(0, 1)] * length,
            token_weights=[1e-3] * length,
            rollout_logprobs=[-10.0] * length,
        )
        for _ in range(point.group_size)
    ]


HEAD_TOKENS = 2048
"""So many that the logits of the smallest vocabulary in the test outweigh what malloc asks for anew."""


def head_point(point: Point) -> Json:
    """Log-probs and their gradient at the head alone, above its inputs, weight and the weight's gradient."""
    import torch

    logprobs = _sliced if point.kind == "head" else _plain
    torch.manual_seed(0)
    _head_step(torch, logprobs, 512, point.shape.hidden)  # what the first call loads and keeps
    weight = torch.randn(point.shape.vocabulary, point.shape.hidden, dtype=torch.bfloat16, requires_grad=True)
    before = resident()
    reset_peak()
    start = time.perf_counter()
    _head_step(torch, logprobs, point.shape.vocabulary, point.shape.hidden, weight)
    seconds = time.perf_counter() - start
    gradient = weight.numel() * weight.element_size()
    return {
        "seconds": seconds,
        "peak": peak_resident(),
        "step": max(peak_resident() - before - gradient, 1),
        "weight": gradient,
        "gradient": gradient,
    }


def _head_step(
    torch: Any, logprobs: Callable[..., Any], vocabulary: int, hidden: int, weight: Any = None
) -> None:
    weight = (
        torch.randn(vocabulary, hidden, dtype=torch.bfloat16, requires_grad=True)
        if weight is None
        else weight
    )
    states = torch.randn(HEAD_TOKENS, hidden, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (HEAD_TOKENS,))
    logprobs(states, weight, targets).sum().backward()


def _sliced(states: Any, weight: Any, targets: Any) -> Any:
    import torch

    from trainer.logprobs import HeadOptions, head_logprobs

    options = HeadOptions(scale=1.0, entropy_gradient=False)
    return head_logprobs(states, weight, None, torch.arange(len(states)), targets, options)[0]


def _plain(states: Any, weight: Any, targets: Any) -> Any:
    return (states @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


# ---------------------------------------------------------------- generation, an engine for each model


def generation_points(points: Sequence[Point], threads: int) -> list[Json]:
    """Seconds of each point; points of one model share an engine."""
    import torch

    from rlhf.tiny_models import build_tiny
    from rollout.child_engine import ChildEngine
    from rollout.engine_spec import EngineSpec

    found: list[Json] = []
    for shape in dict.fromkeys(point.shape for point in points):
        mine = [point for point in points if point.shape == shape]
        with tempfile.TemporaryDirectory(prefix="whetstone-growth-") as folder:
            model = random_model(shape)
            parameters = sum(p.numel() for p in model.parameters())
            model.to(torch.bfloat16).save_pretrained(folder)
            spec = EngineSpec(
                model=folder,
                tokenizer=str(build_tiny("llama", Path(folder) / "tokenizer")),  # vLLM wants one to load
                max_model_len=max(point.prompt + point.response for point in mine),
                threads=threads,
                eager=True,
            )
            engine = ChildEngine(spec)
            try:
                engine.wait()
                _generate(engine, replace(mine[0], response=8))
                found += [{**_generate(engine, point), "parameters": parameters} for point in mine]
            finally:
                engine.close()
    return found


def _generate(engine: Any, point: Point) -> Json:
    from rollout.engine import Request, Sampling

    prompt = rows_of(point)[0].prompt_ids
    requests = [Request(prompt_ids=prompt, seed=index) for index in range(point.group_size)]
    start = time.perf_counter()
    made = engine.generate(requests, Sampling(max_tokens=point.response, ignore_eos=True))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(len(completion.token_ids) for completion in made)}


# ---------------------------------------------------------------- all points


def run(series: Sequence[Series], threads: int) -> list[Json]:
    """Measure every point; one result a series, with positions and numbers."""
    done = []
    for one in series:
        print(f"{one.name} over {one.axis} ...", file=sys.stderr, flush=True)
        if one.points[0].kind == "generation":
            values = generation_points(one.points, threads)
        else:
            values = [_in_own_process(point, threads) for point in one.points]
        x = list(one.x) or [value["parameters"] for value in values]
        done.append({"name": one.name, "axis": one.axis, "x": x, "values": values})
    return done


def _in_own_process(point: Point, threads: int) -> Json:
    command = [sys.executable, "-m", "tests.benchmarks.cost_growth", "--one", json.dumps(asdict(point))]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    raise RuntimeError(f"{point} failed:\n{done.stderr[-2000:]}")


def _point_of(text: str) -> Point:
    plain = json.loads(text)
    return Point(**{**plain, "shape": Shape(**plain["shape"])})


# ---------------------------------------------------------------- the result


def table(result: Json) -> str:
    """The Markdown for docs/performance.md: first and last values, exponents and what lies off the fit."""
    columns = [
        "what",
        "grows",
        "from - to",
        "seconds",
        "time ~ x^",
        "off",
        "step memory, MB",
        "memory ~ x^",
        "off",
    ]
    return markdown(columns, [_row(series) for series in result["series"]])


def _row(series: Json) -> list[str]:
    x = series["x"]
    span = f"{_short(x[0])} - {_short(x[-1])}"
    seconds = [value["seconds"] for value in series["values"]]
    cells = [series["name"], series["axis"], span, f"{seconds[0]:.2f} - {seconds[-1]:.2f}", *_fit(x, seconds)]
    if "step" not in series["values"][0]:
        return [*cells, "-", "-", "-"]
    memory = [value["step"] / 1e6 for value in series["values"]]
    return [*cells, f"{memory[0]:.0f} - {memory[-1]:.0f}", *_fit(x, memory)]


def _fit(x: Sequence[float], y: Sequence[float]) -> list[str]:
    fit = power_law(x, y)
    return [f"{fit.exponent:.2f}", f"{fit.residual:.0%}"]


def _short(value: float) -> str:
    return f"{value / 1e6:.0f}M" if value >= 1e6 else f"{value:,.0f}".replace(",", " ")


def charts(result: Json) -> list[Chart]:
    """Seconds over every axis but the vocabulary, then memory over every axis."""
    axes = list(dict.fromkeys(series["axis"] for series in result["series"]))
    made = [_chart(result, axis, "seconds", "seconds", 1.0) for axis in axes if axis != "vocabulary"]
    made += [_chart(result, axis, "step", "step memory, MB", 1e6) for axis in axes]
    return [chart for chart in made if chart.curves]


def _chart(result: Json, axis: str, key: str, label: str, unit: float) -> Chart:
    curves = [
        Curve(series["name"], series["x"], [value[key] / unit for value in series["values"]])
        for series in result["series"]
        if series["axis"] == axis and key in series["values"][0]
    ]
    return Chart(f"{label.partition(',')[0].capitalize()} over {axis}", axis, label, curves)


def _chosen(only: str, quick: bool) -> Iterator[Series]:
    for series in all_series():
        if any(word in f"{series.name} {series.axis}" for word in only.split("|")):
            yield shortened(series) if quick else series


def main() -> None:
    """Measure, write JSON and picture, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two points a series, on the smallest model")
    parser.add_argument("--only", default="", help="series that have one of these words, separated by |")
    parser.add_argument("--table", type=Path, help="print the table of a result instead of measuring")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/measured/cost_growth.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/cost_growth.png")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(measure(_point_of(arguments.one))))
        return
    if arguments.table:
        result = json.loads(arguments.table.read_text())
    else:
        series = list(_chosen(arguments.only, arguments.quick))
        result = {"threads": arguments.threads, "series": run(series, arguments.threads)}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    growth(charts(result)).savefig(arguments.picture, dpi=130)
    print(table(result))


if __name__ == "__main__":
    main()
