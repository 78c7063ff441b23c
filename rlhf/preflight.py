"""What can be checked before a model is loaded: data, rewards, trackers, run folder. Imports no torch."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path

from rlhf import initial_weights, models, resume
from rlhf.config import Config
from rlhf.data.splits import Splits, load_splits
from rlhf.errors import UserError, clear_sentences
from rlhf.rewards.base import Scorer
from rlhf.tracking.base import build as build_trackers
from rollout.config import EngineProcess
from rollout.engine_spec import max_positions
from trainer.config import NEEDS_BITSANDBYTES, OptimizerName
from trainer.parallel.config import Launcher
from trainer.parallel.world import World

_WHOLE_ONLY = {
    OptimizerName.muon: "looks at whole matrices",
    OptimizerName.adafactor: "looks at whole matrices",
    OptimizerName.adamw_8bit: "scales blocks of whole matrices",
}
"""Optimizers that do not work on slices of the weights, and why."""


def check_packages(config: Config) -> None:
    """Refuse, with `UserError`, an optimizer whose package is not installed. Imports none."""
    wanted = config.learner.optimizer.name is OptimizerName.adamw_8bit
    if wanted and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(NEEDS_BITSANDBYTES)


def check_ranks(config: Config, world: World) -> None:
    """Refuse, with `UserError`, what does not fit the number of processes that hold the learner."""
    if world.restarts and config.resume == "never":
        raise UserError(
            f"torchrun --max-restarts={world.restarts} starts the run again after a failure, and "
            "resume=never would begin anew: set resume=auto."
        )
    with clear_sentences():
        degrees = config.learner.parallel.degrees(world.size)
    if degrees.tensor > 1 and (config.learner.lora.rank or config.model.adapter):
        raise UserError(
            f"learner.parallel.tensor={degrees.tensor} does not split adapters: set "
            f"learner.parallel.tensor=1."
        )
    optimizer = config.learner.optimizer.name
    if degrees.shard * degrees.tensor > 1 and optimizer in _WHOLE_ONLY:
        raise UserError(
            f"learner.optimizer.name={optimizer} {_WHOLE_ONLY[optimizer]}, which learner.parallel.shard="
            f"{degrees.shard} and tensor={degrees.tensor} cut in slices: choose another, or set both to 1 "
            f"and learner.parallel.replicate={world.size}."
        )
    if world.size > 1 and config.rollout.process is EngineProcess.inprocess:
        raise UserError(
            f"rollout.process=inprocess would put vLLM among the {world.size} ranks of the learner, where it "
            f"hangs: set rollout.process=child."
        )


def dry_run(config: Config, recipe: str) -> str:
    """Validate all that can be validated without a model; returns what would run. Writes nothing."""
    parallel = config.learner.parallel
    on_ray = parallel.launcher is Launcher.ray
    check_ranks(config, World(size=parallel.product) if on_ray else World.from_environment())
    check_packages(config)
    folder = run_folder(config, recipe)
    with clear_sentences():
        models.check_local(config.model)
        initial_weights.find(config)
        here = models.local_config(config.model.path)
        if here is not None:
            check_length(config, here)
        splits = load_splits(config.data)
        with Scorer(config.reward) as scorer:
            scorer.check_sources(source_names(splits))
        build_trackers(config.tracking).close()
        start = resume.find(config, folder)
    where = f"it would write to {folder}" if start is None else f"it would go on in {folder} {_after(start)}"
    return "\n".join([f"{recipe} can run; {where}.", *splits.lines()])


def _after(start: resume.Start) -> str:
    return f"after step {start.step}" if start.step >= 0 else "from its beginning"


def run_folder(config: Config, recipe: str) -> Path:
    """`run.dir`, or `runs/<name>`, or for a run without a name the first free `runs/<recipe>`, `-2`, `-3` …

    With `resume` it is the last of these that holds a run. Raises `UserError` when a new run asked for a
    folder that holds one already (nothing is ever overwritten), or a step for a folder that holds none.
    """
    if config.resume != "never":
        return _folder_to_resume(config, recipe)
    if config.run.dir or config.run.name:
        folder = _named_folder(config)
        if _holds_run(folder):
            key = f"run.dir={folder}" if config.run.dir else f"run.name={config.run.name}"
            raise UserError(
                f"{key}: {folder} already holds a run: choose another, or go on with it (resume=auto)."
            )
        return folder
    return next(folder for folder in _numbered_folders(recipe) if not _holds_run(folder))


def _folder_to_resume(config: Config, recipe: str) -> Path:
    if config.run.dir or config.run.name:
        folder = _named_folder(config)
    else:
        taken = list(itertools.takewhile(_holds_run, _numbered_folders(recipe)))
        folder = taken[-1] if taken else next(_numbered_folders(recipe))
    if config.resume != "auto" and not resume.recorded(folder):
        raise UserError(
            f"resume={config.resume}: {folder} holds no run: name the run's folder with run.dir, or start "
            f"anew with resume=never."
        )
    return folder


def _named_folder(config: Config) -> Path:
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name


def _numbered_folders(recipe: str) -> Iterator[Path]:
    """`runs/<recipe>`, `-2`, `-3` and so on."""
    is_file = recipe.endswith(".yaml")
    base = Path("runs") / (Path(recipe).stem if is_file else recipe.replace("/", "-"))
    yield base
    for number in itertools.count(2):
        yield base.with_name(f"{base.name}-{number}")


def claim_run_folder(config: Config, recipe: str) -> Path:
    """Make `run_folder` and take it with an empty `config.yaml`: of two runs that start together one gets it.

    The other gets the next number, or `UserError` where it asked for that folder. With `resume` the folder
    may hold a run.
    """
    while True:
        folder = run_folder(config, recipe)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_create(folder, error) from error
        try:
            config_file(folder).touch(exist_ok=config.resume != "never")
        except FileExistsError:
            continue
        except OSError as error:
            raise _cannot_create(folder, error) from error
        return folder


def config_file(folder: Path) -> Path:
    """The file that makes a folder a run's."""
    return folder / "config.yaml"


def _cannot_create(folder: Path, error: OSError) -> UserError:
    return UserError(f"run.dir={folder} cannot be created ({error.strerror}): choose another.")


def _holds_run(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return config_file(folder).exists() or (metrics.exists() and metrics.stat().st_size > 0)


def check_length(config: Config, model: Path) -> None:
    """Refuse sequences beyond what the model in folder `model` was made for, which an engine would cut."""
    limit = max_positions(str(model))
    if limit is not None and config.longest_sequence > limit:
        key, response = config.longest_response
        raise UserError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + {key}={response} = "
            f"{config.longest_sequence} tokens are more than model.path={config.model.path} has positions "
            f"(max_position_embeddings={limit}): lower one of them."
        )


def source_names(splits: Splits) -> list[str]:
    """Every data source of the configuration."""
    return sorted(splits.counts)
