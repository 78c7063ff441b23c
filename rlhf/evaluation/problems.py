"""The problems of a benchmark, in the order of its rows, and what identifies them."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.config import DataConfig, OverlongPrompts, SourceConfig, SourceKind, short_name
from rlhf.data.examples import Example
from rlhf.data.sources import first_row, read_source
from rlhf.errors import UserError
from rlhf.evaluation.benchmark import BenchmarkConfig, BenchmarkDataConfig
from rlhf.evaluation.protocol import digest

USUAL = {
    "prompt": ("problem", "question", "question_concat", "prompt"),
    "answer": ("answer", "final_answer", "Answer", "ground_truth", "reward_model.ground_truth"),
    "id": ("id", "unique_id", "problem_idx"),
}
"""Columns that are looked for in this order where `data.fields` names none."""
_NAME = string.ascii_letters + string.digits + "_-"
"""Characters of a split's name, before a slice such as `[:100]`."""
FIRST_OF_LIST = ".0"
"""OlympiadBench has its answers in lists of one."""


def read_problems(config: BenchmarkDataConfig, name: str) -> list[Example]:
    """Every problem that is asked, in order; rows that repeat another's text are left out.

    `name` is the benchmark's, and the source of every example. Raises `UserError` for a file, a column or an
    answer that is missing, and for ids that repeat.
    """
    source = SourceConfig(path=config.path, split=config.split, args=dict(config.args))
    if source.resolved_kind("data.path") is SourceKind.task:
        found = list(read_source(name, source, {}))
    else:
        if source.resolved_kind("data.path") is not SourceKind.hub:
            source.split = "train" + source.split.lstrip(_NAME)  # what files call their only split
        found = list(
            read_source(name, source, _fields(config, first_row(name, source)), path_key="data.path")
        )
    unique = {example.text.strip(): example for example in reversed(found)}
    asked = [example for example in found if unique[example.text.strip()] is example]
    _check_ids(asked)
    return asked[: config.problems or None]


def data_digest(problems: Sequence[Example]) -> str:
    """Of texts and answers in order: the same for the same problems, whatever file they came from."""
    return digest([[problem.prompt, problem.answer] for problem in problems])


def data_config(config: BenchmarkConfig) -> DataConfig:
    """What a `PromptBuilder` needs to know: the protocol's texts. A prompt that is too long stops all."""
    return DataConfig(
        system_prompt=config.protocol.system_prompt,
        template=config.protocol.template,
        max_prompt_tokens=config.data.max_prompt_tokens,
        overlong_prompts=OverlongPrompts.fail,
    )


def benchmark_name(recipe: str, config: BenchmarkConfig) -> str:
    """Short name: of a shipped benchmark its own, else that of the data."""
    own = recipe.rpartition("/")[2].removesuffix(".yaml")
    return short_name(config.data.path) if own == "jsonl" else own


def _fields(config: BenchmarkDataConfig, row: Mapping[str, Any]) -> dict[str, str]:
    """The columns in effect: those named, else the usual ones that the first row has."""
    fields = {name: value for name, value in config.fields.items() if name != "answer_after"}
    for name, usual in USUAL.items():
        if name not in fields:
            found = next((column for column in usual if _has(row, column)), None)
            if found is None and name != "id":
                raise UserError(
                    f"data.path={config.path} has none of the columns {', '.join(usual)}, only "
                    f"{', '.join(row)}: name the one with the {name} in data.fields.{name}."
                )
            fields |= {name: found} if found else {}
    answer = row.get(fields["answer"])
    if isinstance(answer, list) and len(answer) == 1:
        fields["answer"] += FIRST_OF_LIST
    mark = config.fields.get("answer_after", "")
    if mark and isinstance(answer, str) and mark in answer:
        fields["answer_after"] = mark
    return fields


def _has(row: Mapping[str, Any], column: str) -> bool:
    head, _, rest = column.partition(".")
    inner = row.get(head)
    return head in row and (not rest or (isinstance(inner, Mapping) and _has(inner, rest)))


def _check_ids(problems: Sequence[Example]) -> None:
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UserError(
                f"two problems are called {problem.id}: set data.fields.id to a column without repeats."
            )
        seen.add(problem.id)
