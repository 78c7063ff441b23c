"""What can be checked before a model is loaded: data, rewards, trackers, run folder. Imports no torch."""

from __future__ import annotations

import itertools
from pathlib import Path

from rlhf.config import Config
from rlhf.data.splits import Splits, load_splits
from rlhf.errors import UserError, clear_sentences
from rlhf.rewards.base import Scorer
from rlhf.tracking.base import build as build_trackers


def dry_run(config: Config, recipe: str) -> str:
    """Validate all that can be validated without a model; returns what would run. Writes nothing."""
    folder = run_folder(config, recipe)
    _check_local_model(config.model.path)
    with clear_sentences():
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
    is_file = recipe.endswith((".yaml", ".yml"))
    base = Path("runs") / (Path(recipe).stem if is_file else recipe.replace("/", "-"))
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in itertools.count(1))
    return next(folder for folder in candidates if not _holds_run(folder))


def _holds_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "config.yaml").exists()


def _check_local_model(path: str) -> None:
    """Refuse a path where no model lies; hub ids and `RUN@STEP` are resolved when a run starts."""
    if not path.startswith((".", "/", "~")) or "@" in path:
        return
    folder = Path(path).expanduser()
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"model.path={path} holds no model: name a Hugging Face folder or a PEFT adapter.")


def source_names(splits: Splits) -> list[str]:
    """Every data source that a response can come from."""
    examples = splits.heldout + splits.validation
    return sorted({*splits.train, *(example.source for example in examples)})
