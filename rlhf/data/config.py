"""`DataConfig`: where prompts and answers come from, and how a prompt is written. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

FIELD_NAMES = ("prompt", "answer", "answer_after", "id")
TASK_NAMES = ("sums", "products")
REASONING_GYM = "reasoning_gym:"
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX = ".parquet"
ROWS = "rows"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


class SourceKind(StrEnum):
    """What a source is read from."""

    auto = "auto"
    """Seen from the path: a task name, the suffix, a folder of files that lies here, or a hub id."""
    task = "task"
    """Made here: `sums`, `products` or `reasoning_gym:<name>`."""
    jsonl = "jsonl"
    """One JSON object a line; a file, a folder of files or a pattern."""
    parquet = "parquet"
    """A file, a folder of files or a pattern."""
    hub = "hub"
    """A data set on the Hugging Face hub."""
    rows = "rows"
    """The rows handed to `rlhf.train(dataset=...)`."""


class SourceUse(StrEnum):
    """What the rows of a source are for."""

    all = "all"
    """Training, after the validation and held-out rows have been taken out."""
    train = "train"
    """Training only; nothing is taken out."""
    validation = "validation"
    """Settings and checkpoints are chosen on it."""
    heldout = "heldout"
    """Evaluation only."""


class OverlongPrompts(StrEnum):
    """What becomes of a prompt over `data.max_prompt_tokens`. It is never cut."""

    drop = "drop"
    """Leave it out; how many is reported."""
    fail = "fail"
    """Stop with a sentence that names it."""


@dataclass
class SourceConfig:
    """One source of a mixture."""

    kind: SourceKind = SourceKind.auto
    """What it is read from; `auto` sees it from the path."""
    path: str = ""
    """Task name, file, folder, pattern (`data/*.jsonl`) or hub id. Relative paths start where `rlhf` runs."""
    split: str = "train"
    """Split of a hub set; slices such as `train[:1000]` or `train[:10%]` work for every kind but tasks."""
    use: SourceUse = SourceUse.all
    """What its rows are for."""
    weight: float = 1.0
    """Share of the training draws, relative to the other sources. Above 0."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task (`{digits: 2, terms: 3}`) or of `datasets.load_dataset` (`{name: main}`)."""
    fields: dict[str, str] = field(default_factory=dict)
    """Where prompt and answer lie in a row of this source; what is left out comes from `data.fields`."""

    def resolved_kind(self, key: str) -> SourceKind:
        """`kind`, or what `path` shows when it is `auto`.

        `key` is the config key of the path. Raises `UserError` when the path shows nothing.
        """
        return infer_kind(self.path, key) if self.kind is SourceKind.auto else self.kind


@dataclass
class DataConfig:
    """Prompts, answers, splits and the order in which they are drawn."""

    path: str = ""
    """One source in short: a task, a `.jsonl` or `.parquet` file, a folder of them, or a hub id. Replaces
    `data.sources`."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name; the name routes the reward and is shown in the metrics."""
    fields: dict[str, str] = field(default_factory=lambda: {"prompt": "prompt", "answer": "answer"})
    """Column, or dotted path into one (`reward_model.ground_truth`), of `prompt` and `answer`; an empty
    `answer` means that there is none. `answer_after: "####"` takes what follows a mark, `id` names rows."""
    validation: int = 0
    """Rows set apart to choose settings on; at most so many (0: all) where a source is `use: validation`."""
    heldout: int = 0
    """Rows set apart for evaluation; at most so many (0: all) where a source is `use: heldout`."""
    system_prompt: str = ""
    """System message put before every prompt that brings none. Empty adds none, but a template may."""
    template: str = "{prompt}"
    """Text of the user's turn; `{prompt}` stands for the prompt."""
    max_prompt_tokens: int = 512
    """Longest rendered prompt in tokens. At least 1."""
    overlong_prompts: OverlongPrompts = OverlongPrompts.drop
    """What becomes of longer ones."""
    deduplicate: bool = True
    """Keep one row of those that ask the same (DAPO-Math-17k holds each problem about 100 times)."""
    epochs: int = 0
    """Passes over the training rows before data run out; 0 never ends. At least 0."""

    def check(self) -> list[str]:
        """Sentences about values that cannot work; of the disk, only whether a path is a folder is asked."""
        found = [
            f"data.{name}={value} must be at least {least}: raise it."
            for name, value, least in [
                ("validation", self.validation, 0),
                ("heldout", self.heldout, 0),
                ("max_prompt_tokens", self.max_prompt_tokens, 1),
                ("epochs", self.epochs, 0),
            ]
            if value < least
        ]
        if "{prompt}" not in self.template:
            found.append(f"data.template='{self.template}' has no {{prompt}}: say where the prompt goes.")
        found += _check_fields("data.fields", self.fields)
        if self.path:
            found += _check_kind("data.path", SourceConfig(path=self.path))
        else:
            for name, source in self.sources.items():
                found += _check_source(f"data.sources.{name}", source)
        return found

    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources in effect, by name: `path` in short replaces `sources`."""
        return {short_name(self.path): SourceConfig(path=self.path)} if self.path else dict(self.sources)


def _check_fields(key: str, fields: dict[str, str]) -> list[str]:
    return [
        f"{key}.{name} is unknown: the fields are {', '.join(FIELD_NAMES)}."
        for name in fields
        if name not in FIELD_NAMES
    ]


def _check_source(key: str, source: SourceConfig) -> list[str]:
    """Sentences about one source."""
    found = _check_fields(f"{key}.fields", source.fields)
    if not source.weight > 0:
        found.append(f"{key}.weight={source.weight} must be above 0: raise it or remove the source.")
    if not source.path and source.kind is not SourceKind.rows:
        return [*found, f"{key}.path is empty: name a task, a file or a hub id."]
    if source.fields and _is_task(source.path):
        found.append(f"{key}.fields has no effect on the task {source.path}: remove it.")
    return found + _check_kind(f"{key}.path", source)


def _check_kind(key: str, source: SourceConfig) -> list[str]:
    try:
        source.resolved_kind(key)
    except UserError as error:
        return [str(error)]
    return []


def _is_task(path: str) -> bool:
    return path in TASK_NAMES or path.startswith(REASONING_GYM)


def infer_kind(path: str, key: str) -> SourceKind:
    """The kind of a source, seen from its path; `key` is the config key in the error."""
    if _is_task(path):
        return SourceKind.task
    if path.endswith(JSONL_SUFFIXES):
        return SourceKind.jsonl
    if path.endswith(PARQUET_SUFFIX):
        return SourceKind.parquet
    if Path(path).expanduser().is_dir():
        return _kind_of_folder(path, key)
    if _HUB_ID.match(path) and not path.startswith("."):
        return SourceKind.hub
    raise UserError(
        f"{key}={path} is neither a task ({', '.join(TASK_NAMES)}, {REASONING_GYM}<name>), a .jsonl or "
        f".parquet file, a folder of them, nor a hub id (owner/name): correct it."
    )


def _kind_of_folder(path: str, key: str) -> SourceKind:
    """What the files in a folder are; of one kind, or which are meant cannot be seen."""
    suffixes = {file.suffix for file in Path(path).expanduser().iterdir()}
    kinds = [SourceKind.jsonl] if suffixes & set(JSONL_SUFFIXES) else []
    kinds += [SourceKind.parquet] if PARQUET_SUFFIX in suffixes else []
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise UserError(f"{key}={path} holds .jsonl and .parquet files: name a pattern, {path}/*.jsonl.")
    raise UserError(f"{key}={path} is a folder without .jsonl or .parquet files: name one that has them.")


def short_name(path: str) -> str:
    """The name of a source given by path alone: a file's stem, a folder's name, the task or the hub id."""
    suffixes = (*JSONL_SUFFIXES, PARQUET_SUFFIX)
    local = path.endswith((*suffixes, "/")) or path.startswith((".", "/", "~"))
    name = path.rstrip("/").rpartition("/")[2] if local else path
    for suffix in suffixes:
        name = name.removesuffix(suffix)
    return name.replace("*", "all")
