"""What can be checked before a model is loaded: data, rewards, trackers, run folder. Imports no torch."""

from __future__ import annotations

import itertools
from pathlib import Path

from rlhf import models
from rlhf.config import Config
from rlhf.data.splits import Splits, load_splits
from rlhf.errors import UserError, clear_sentences
from rlhf.rewards.base import Scorer
from rlhf.tracking.base import build as build_trackers
from rollout.vllm_engine import max_positions


def dry_run(config: Config, recipe: str) -> str:
    """Validate all that can be validated without a model; returns what would run. Writes nothing."""
    folder = run_folder(config, recipe)
    with clear_sentences():
        models.check_local(config.model)
        here = models.local_config(config.model.path)
        if here is not None:
            check_length(config, here)
        splits = load_splits(config.data)
        with Scorer(config.reward) as scorer:
            scorer.check_sources(source_names(splits))
        build_trackers(config.tracking).close()
    return "\n".join([f"{recipe} can run; it would write to {folder}.", *splits.lines()])


def run_folder(config: Config, recipe: str) -> Path:
    """`run.dir`, or `runs/<name>`, or for a run without a name the first free `runs/<recipe>`, `-2`, `-3` …

    Raises `UserError` when a folder that was asked for holds a run already: nothing is ever overwritten.
    """
    if config.run.dir or config.run.name:
        folder = Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name
        if _holds_run(folder):
            key = f"run.dir={folder}" if config.run.dir else f"run.name={config.run.name}"
            raise UserError(f"{key}: {folder} already holds a run: choose another, or move it away.")
        return folder
    is_file = recipe.endswith(".yaml")
    base = Path("runs") / (Path(recipe).stem if is_file else recipe.replace("/", "-"))
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in itertools.count(1))
    return next(folder for folder in candidates if not _holds_run(folder))


def claim_run_folder(config: Config, recipe: str) -> Path:
    """Make `run_folder` and take it with an empty `config.yaml`: of two runs that start together one gets it.

    The other gets the next number, or `UserError` where it asked for that folder.
    """
    while True:
        folder = run_folder(config, recipe)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_create(folder, error) from error
        try:
            config_file(folder).touch(exist_ok=False)
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
