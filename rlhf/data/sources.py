"""Rows of a source as `Example`s: JSONL, parquet, hub sets, tasks, or rows handed over in Python.

JSONL is read line by line with Python's own parser: `datasets` turns an answer such as "2024-05-01" into a
timestamp and does not say which line is broken. Parquet and hub sets, which carry their types, come through
`datasets`.
"""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.config import JSONL_SUFFIXES, PARQUET_SUFFIX, SourceConfig, SourceKind
from rlhf.data.examples import Example, Message, text_key
from rlhf.data.tasks import build_task
from rlhf.errors import UserError
from rlhf.hub import hub_reachable, why_offline
from trainer.errors import described

Row = Mapping[str, Any]

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can spell and no tokenizer takes."""


def read_source(
    name: str,
    source: SourceConfig,
    fields: Mapping[str, str],
    rows: Iterable[Row] | None = None,
    path_key: str = "data.path",
) -> Iterator[Example]:
    """The examples of one source, in the order of its rows.

    `fields` is `data.fields`, over which the source's own go; `rows` are those given to `rlhf.train`;
    `path_key` is the config key that the path came from, for errors.
    Raises `UserError` with file, row or column in one sentence.
    """
    kind = source.resolved_kind(path_key)
    if kind is SourceKind.task:
        return build_task(source.path, name, source.args)
    place = _Place(name=name, shown="dataset" if kind is SourceKind.rows else f"{path_key}={source.path}")
    return _examples(_read(kind, source, place, rows), {**fields, **source.fields}, place)


def first_row(name: str, source: SourceConfig, path_key: str = "data.path") -> Row:
    """The first row of a source that is no task. Raises `UserError` as `read_source`, and without rows."""
    kind = source.resolved_kind(path_key)
    place = _Place(name=name, shown=f"{path_key}={source.path}")
    for row in _read(kind, source, place, None):
        return row
    raise UserError(f"{place.shown} has no rows.")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """How errors name a source."""

    name: str
    shown: str
    """`key=path`."""

    def key(self, field: str) -> str:
        """The config key of one of the source's settings."""
        return f"data.sources.{self.name}.{field}"


def _read(kind: SourceKind, source: SourceConfig, place: _Place, rows: Iterable[Row] | None) -> Iterable[Row]:
    """The rows of anything but a task."""
    if kind is SourceKind.jsonl:
        return _cut(_read_jsonl(_files(source.path, JSONL_SUFFIXES, place)), source.split, place)
    if kind is SourceKind.parquet:
        return _read_parquet(_files(source.path, (PARQUET_SUFFIX,), place), source, place)
    if kind is SourceKind.hub:
        return _read_hub(source, place)
    if rows is None:
        raise UserError(
            f"{place.key('kind')}=rows needs rows from Python: call rlhf.train(..., dataset=rows)."
        )
    return _cut(_checked_rows(rows), source.split, place)


def _checked_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows from Python as a list; each has to be a mapping."""
    found = list(rows)
    for number, row in enumerate(found, 1):
        if not isinstance(row, Mapping):
            raise UserError(f"dataset: row {number} is a {type(row).__name__}: give dictionaries, one a row.")
    return found


# ---------------------------------------------------------------- files


def _files(path: str, suffixes: Sequence[str], place: _Place) -> list[Path]:
    """The files that a path, folder or pattern names, sorted."""
    wanted = Path(path).expanduser()
    if wanted.is_dir():
        found = sorted(file for file in wanted.iterdir() if file.suffix in suffixes)
        if not found:
            raise UserError(f"{place.shown} is a folder without {' or '.join(suffixes)} files.")
        return found
    found = [wanted] if wanted.is_file() else sorted(Path(match) for match in glob.glob(str(wanted)))
    if found:
        return found
    beside = [file.name for file in wanted.parent.iterdir()] if wanted.parent.is_dir() else []
    close = difflib.get_close_matches(wanted.name, beside, n=1)
    hint = f"did you mean {wanted.parent / close[0]}?" if close else f"relative paths start at {Path.cwd()}."
    raise UserError(f"{place.shown} does not exist: {hint}")


class _Line(dict[str, Any]):
    """A row that knows which line of which file it is."""

    __slots__ = ("where",)

    def __init__(self, row: Row, where: str) -> None:
        super().__init__(row)
        self.where = where


def _read_jsonl(files: Sequence[Path]) -> list[Row]:
    """One JSON object a line; empty lines are passed over."""
    rows: list[Row] = []
    for file in files:
        try:
            with file.open("rb") as lines:
                rows += [_parse_line(line, file, n) for n, line in enumerate(lines, 1) if line.strip()]
        except OSError as error:
            raise UserError(f"{file} could not be read ({error.strerror}): mend it or its rights.") from error
    return rows


def _parse_line(line: bytes, file: Path, number: int) -> Row:
    """One line as a row; the sentence names file and line."""
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} line {number} is not UTF-8 ({error.reason}): save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        if number == 1 and line.strip() in (b"[", b"{"):
            raise UserError(f"{file} is one JSON document: write it as JSONL, one object a line.") from None
        raise UserError(
            f"{file} line {number} is not JSON ({error.msg} at column {error.colno}): mend it."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise UserError(f"{file} line {number} could not be read ({described(error)}): mend it.") from None
    if isinstance(row, list) and number == 1:
        raise UserError(f"{file} is one JSON list: write it as JSONL, one object a line.")
    if not isinstance(row, dict):
        raise UserError(f"{file} line {number} is a {type(row).__name__} and not an object: write {{...}}.")
    if b"\\u" in line and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{file} line {number} has half a character (\\ud800 to \\udfff alone): mend it.")
    return _Line(row, where=f"{file} line {number}")


def _cut(rows: list[Row], split: str, place: _Place) -> list[Row]:
    """The slice `train[a:b]` of rows that know one split only."""
    if split == "train":
        return rows
    from datasets import ReadInstruction

    try:
        slices = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (AssertionError, ValueError):
        raise UserError(
            f"{place.key('split')}={split} does not fit: a file or a list of rows has the split train alone, "
            f"of which slices such as train[:1000] may be taken."
        ) from None
    return [row for part in slices for row in rows[part.from_ : part.to]]


# ---------------------------------------------------------------- parquet and the hub


def _read_parquet(files: Sequence[Path], source: SourceConfig, place: _Place) -> Iterable[Row]:
    from datasets import load_dataset

    paths = [str(file) for file in files]
    try:
        return load_dataset("parquet", data_files=paths, split=source.split, **source.args)
    except Exception as error:
        raise UserError(_trouble(source, place, error)) from error


def _read_hub(source: SourceConfig, place: _Place) -> Iterable[Row]:
    """A hub set; without a network, the copy that an earlier load left in the cache."""
    import datasets

    offline = not hub_reachable()
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or before
    try:
        return datasets.load_dataset(source.path, split=source.split, **source.args)
    except Exception as error:
        if offline:
            raise UserError(
                f"{place.shown} is not in the Hugging Face cache and {why_offline(False)}: name a local "
                f".jsonl or .parquet file, or load it once on a connected machine."
            ) from error
        raise UserError(_trouble(source, place, error)) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _trouble(source: SourceConfig, place: _Place, error: Exception) -> str:
    """One sentence for what `datasets` raised."""
    what = place.shown
    reason = (str(error.__cause__ or error).splitlines() or [""])[0][:200]
    if "Config name is missing" in str(error):
        names = " ".join(str(error).split())[:300]
        return f"{what} has several configurations: choose one with {place.key('args.name')} ({names})."
    if "split" in reason.lower():
        return f"{what} has no split {source.split}: set {place.key('split')} ({reason})."
    if type(error).__name__ == "DatasetNotFoundError":
        return f"{what} is not on the hub, or is gated: correct it or log in with `hf auth login`."
    return f"{what} could not be read ({type(error).__name__}: {reason})."


# ---------------------------------------------------------------- rows -> examples


def _examples(rows: Iterable[Row], fields: Mapping[str, str], place: _Place) -> Iterator[Example]:
    """Rows as examples, fields taken where the mapping says."""
    for index, row in enumerate(rows):
        where = row.where if isinstance(row, _Line) else f"{place.shown} row {index + 1}"
        prompt = _prompt(_field(row, fields["prompt"], "prompt", where), where)
        example = Example(
            id=f"{place.name}:{_field(row, fields['id'], 'id', where) if fields.get('id') else index}",
            source=place.name,
            prompt=prompt,
            answer=_answer(row, fields, where),
            key="",
            row=dict(row),
        )
        example.key = text_key(example)
        yield example


def _field(row: Row, path: str, name: str, where: str) -> Any:
    """The value at a column or dotted path. The sentence for a missing one names the columns that exist."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, str) and value[:1] in "{[":
            value = _decoded(value)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and part.isdigit()
            and int(part) < len(value)
        ):
            value = value[int(part)]
        else:
            raise UserError(
                f"{where} has no '{path}' for the field {name}; its columns are {', '.join(map(str, row))}: "
                f"set data.fields.{name}."
            )
    return value


def _decoded(text: str) -> Any:
    """A column that holds JSON as text, as some parquet sets do; other text stays as it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _prompt(value: Any, where: str) -> str | list[Message]:
    """A prompt as text or as checked chat turns that end with the user's."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where} has an empty prompt: remove the row or correct data.fields.prompt.")
        return value
    if not isinstance(value, Sequence) or not value:
        raise UserError(
            f"{where} has a {type(value).__name__} as prompt: it must be text or a list of {{role, content}}."
        )
    turns = []
    for turn in value:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if not isinstance(content, str) or not isinstance(turn.get("role"), str):
            raise UserError(f"{where} has a chat turn without text under role and content: {str(turn)[:80]}.")
        turns.append({"role": turn["role"], "content": content})
    if turns[-1]["role"] != "user":
        raise UserError(
            f"{where} ends with a turn of '{turns[-1]['role']}': a prompt must end with the user's turn."
        )
    return turns


def _answer(row: Row, fields: Mapping[str, str], where: str) -> str | None:
    """The answer as text, or None where the mapping says that there is none."""
    path = fields.get("answer", "")
    if not path:
        return None
    value = _field(row, path, "answer", where)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(
            f"{where} has an empty answer: remove the row, or set data.fields.answer='' if none has one."
        )
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        raise UserError(
            f"{where} has a {type(value).__name__} as answer: name what is inside, such as "
            f"data.fields.answer={path}.0."
        )
    text, mark = str(value), fields.get("answer_after", "")
    if not mark:
        return text
    if mark not in text:
        raise UserError(f"{where} has no '{mark}' in its answer: correct data.fields.answer_after.")
    return text.rpartition(mark)[2].strip()
