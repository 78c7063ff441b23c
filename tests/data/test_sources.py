"""Reading sources: exact values, field mapping, and one sentence for whatever is malformed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.config import DataConfig, SourceConfig, SourceKind
from rlhf.data.examples import Example
from rlhf.data.sources import read_source
from rlhf.data.splits import load_splits
from rlhf.errors import UserError

FIELDS = {"prompt": "prompt", "answer": "answer"}


def read(source: SourceConfig, rows: Any = None, **fields: str) -> list[Example]:
    return list(read_source("s", source, {**FIELDS, **fields}, rows))


def read_rows(rows: Any, **fields: str) -> list[Example]:
    return read(SourceConfig(kind=SourceKind.rows), rows, **fields)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"prompt": f"p{i}", "answer": str(i), "extra": {"level": i}} for i in range(10)]


def test_jsonl_rows_arrive_whole(tmp_path: Path) -> None:
    examples = read(SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl", ROWS))))
    assert [example.row for example in examples] == ROWS
    assert [example.id for example in examples] == [f"s:{i}" for i in range(10)]
    assert (examples[3].prompt, examples[3].answer, examples[3].source) == ("p3", "3", "s")


def test_jsonl_values_are_not_reinterpreted(tmp_path: Path) -> None:
    """`datasets` makes a timestamp of the first, and one type of all."""
    values = ["2024-05-01", 72, 0.5, "007", 12345678901234567890123]
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": str(i), "answer": v} for i, v in enumerate(values)])
    assert [example.answer for example in read(SourceConfig(path=str(file)))] == [
        "2024-05-01",
        "72",
        "0.5",
        "007",
        "12345678901234567890123",
    ]


def test_empty_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "1"}\n\n  \n{"prompt": "b", "answer": "2"}')
    assert [example.prompt for example in read(SourceConfig(path=str(file)))] == ["a", "b"]


def test_folder_and_pattern_read_files_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[5:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:5])
    for path, kind in [(tmp_path, SourceKind.jsonl), (tmp_path / "*.jsonl", SourceKind.auto)]:
        examples = read(SourceConfig(path=str(path), kind=kind))
        assert [example.prompt for example in examples] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize(
    ("split", "expected"), [("train[:3]", [0, 1, 2]), ("train[-2:]", [8, 9]), ("train[50%:70%]", [5, 6])]
)
def test_slices(tmp_path: Path, split: str, expected: list[int]) -> None:
    import datasets

    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(parquet))
    for source, rows in [
        (SourceConfig(path=str(file), split=split), None),
        (SourceConfig(path=str(parquet), split=split), None),
        (SourceConfig(kind=SourceKind.rows, split=split), ROWS),
    ]:
        assert [example.row["extra"]["level"] for example in read(source, rows)] == expected


def test_parquet_in_verl_layout(tmp_path: Path) -> None:
    """DAPO-Math-17k's own columns: chat turns, and the answer inside `reward_model`."""
    import datasets

    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"Solve {i}."}],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
            "extra_info": {"index": f"id-{i}"},
        }
        for i in range(3)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "d.parquet"))
    examples = read(
        SourceConfig(path=str(tmp_path / "d.parquet")),
        answer="reward_model.ground_truth",
        id="extra_info.index",
    )
    assert [example.answer for example in examples] == ["0", "1", "2"]
    assert [example.id for example in examples] == ["s:id-0", "s:id-1", "s:id-2"]
    assert examples[1].prompt == [{"role": "user", "content": "Solve 1."}]
    assert examples[1].row["data_source"] == "math_dapo"


def test_dotted_paths_go_through_lists_and_json_text() -> None:
    row = {"q": {"text": ["first", "second"]}, "meta": '{"gold": [4, 5]}', "a.b": "exact"}
    (example,) = read_rows([row], prompt="q.text.1", answer="meta.gold.0")
    assert (example.prompt, example.answer) == ("second", "4")
    assert read_rows([row], prompt="a.b", answer="meta.gold.1")[0].prompt == "exact"


def test_answer_after_a_mark() -> None:
    row = {"prompt": "p", "answer": "48/2 = 24\n48 + 24 = 72\n#### 72"}
    assert read_rows([row], answer_after="####")[0].answer == "72"


def test_no_answer_column() -> None:
    assert read_rows([{"prompt": "p"}], answer="")[0].answer is None


def test_own_fields_go_over_the_common_ones(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "1"}])
    assert read(SourceConfig(path=str(file), fields={"prompt": "question"}))[0].prompt == "q"


def test_datasets_object_as_rows() -> None:
    import datasets

    assert [example.prompt for example in read_rows(datasets.Dataset.from_list(ROWS))] == [
        r["prompt"] for r in ROWS
    ]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("gsm8k_train", 7473), ("dapo_math_17k_en", 13245), ("svamp_train", 699), ("math_train", 7411)],
)
def test_shared_data_load_as_documented(data_dir: Path, name: str, rows: int) -> None:
    config = DataConfig(
        path=str(data_dir / f"{name}.jsonl"), fields={"prompt": "problem", "answer": "answer"}
    )
    splits = load_splits(config)
    assert len(splits.train[name]) + splits.counts[name].duplicates == rows
    assert splits.counts[name].duplicates == 0
    example = splits.train[name][0]
    assert example.answer == example.row["answer"]


MALFORMED_FILES = [
    (b'{"prompt": "a", "answer": "1"}\n{"prompt": "b", "ans', "{file} line 2 is not JSON ("),
    (b'{"prompt": "a", "answer": "1"}\n\n{oops}\n', "{file} line 3 is not JSON ("),
    (b'{"prompt": "a"} {"prompt": "b"}\n', "{file} line 1 is not JSON (Extra data at column 17): mend it."),
    (b"\x89PNG\r\n", "{file} line 1 is not UTF-8 (invalid start byte): save the file as UTF-8."),
    (b'{"prompt": "caf\xe9", "answer": "1"}\n', "{file} line 1 is not UTF-8 ("),
    (b'["a", "b"]\n', "{file} is one JSON list: write it as JSONL, one object a line."),
    (b'[\n{"prompt": "a", "answer": "1"}\n]\n', "{file} is one JSON document: write it as JSONL"),
    (b'{\n"prompt": "a", "answer": "1"\n}\n', "{file} is one JSON document: write it as JSONL"),
    (b"[" * 100_000 + b"\n", "{file} line 1 could not be read (RecursionError: maximum recursion depth"),
    (
        b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}\n",
        "{file} line 1 could not be read (ValueError: E",
    ),
    (
        b'{"prompt": "a \\ud83d", "answer": "1"}\n',
        "{file} line 1 has half a character (\\ud800 to \\udfff alone): mend it.",
    ),
    (b'{"prompt": "a", "answer": "1"}\n7\n', "{file} line 2 is a int and not an object: write {...}."),
    (
        b'{"question": "a", "answer": "1"}\n',
        "{file} line 1 has no 'prompt' for the field prompt; its columns are question, answer: set "
        "data.fields.prompt.",
    ),
    (
        b'{"prompt": "a \\ud83d\\ude00", "answer": "1"}\n\n{"prompt": "b", "gold": "1"}\n',
        "{file} line 3 has no 'answer' for the field answer; its columns are prompt, gold: set "
        "data.fields.answer.",
    ),
    (b'{"prompt": "  ", "answer": "1"}\n', "{file} line 1 has an empty prompt: remove the row"),
    (
        b'{"prompt": null, "answer": "1"}\n',
        "{file} line 1 has a NoneType as prompt: it must be text",
    ),
    (
        b'{"prompt": 7, "answer": "1"}\n',
        "{file} line 1 has a int as prompt: it must be text or a list",
    ),
    (b'{"prompt": [], "answer": "1"}\n', "{file} line 1 has a list as prompt"),
    (
        b'{"prompt": ["hi"], "answer": "1"}\n',
        "{file} line 1 has a chat turn without text under role",
    ),
    (
        b'{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}\n',
        "{file} line 1 has a chat turn without text under role and content:",
    ),
    (
        b'{"prompt": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}], "answer": 1}\n',
        "{file} line 1 ends with a turn of 'bot': a prompt must end with the user's turn.",
    ),
    (
        b'{"prompt": "a", "answer": null}\n',
        "{file} line 1 has an empty answer: remove the row, or set",
    ),
    (b'{"prompt": "a", "answer": " "}\n', "{file} line 1 has an empty answer"),
    (
        b'{"prompt": "a", "answer": ["1", "2"]}\n',
        "{file} line 1 has a list as answer: name what is inside, such as data.fields.answer=",
    ),
    (b'{"prompt": "a", "answer": {"x": 1}}\n', "{file} line 1 has a dict as answer"),
]


def test_a_file_that_the_system_does_not_read(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.symlink_to("/proc/self/mem")  # whose first page no process may read
    with pytest.raises(UserError) as caught:
        read(SourceConfig(path=str(file)))
    assert str(caught.value) == f"{file} could not be read (Input/output error): mend it or its rights."


@pytest.mark.parametrize(("content", "sentence"), MALFORMED_FILES, ids=range(len(MALFORMED_FILES)))
def test_malformed_file(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(SourceConfig(path=str(file)))
    assert str(caught.value).startswith(sentence.replace("{file}", str(file)))


def test_mark_that_is_not_there() -> None:
    with pytest.raises(
        UserError, match=r"dataset row 1 has no '####' in its answer: correct data.fields.answer_after"
    ):
        read_rows([{"prompt": "p", "answer": "72"}], answer_after="####")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(
        UserError, match=r"data.path=.*trian.jsonl does not exist: did you mean .*/train.jsonl\?"
    ):
        read(SourceConfig(path=str(tmp_path / "trian.jsonl")))
    with pytest.raises(UserError, match=r"does not exist: relative paths start at"):
        read(SourceConfig(path="nowhere/at/all.jsonl"))


def test_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without .jsonl or .ndjson or .json files"):
        read(SourceConfig(path=str(tmp_path), kind=SourceKind.jsonl))


@pytest.mark.parametrize("split", ["test", "train[:x]", "train[:5]+test"])
def test_split_that_a_file_has_not(tmp_path: Path, split: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        UserError, match=r"data.sources.s.split=.* does not fit: a file or a list of rows has the split"
    ):
        read(SourceConfig(path=str(file), split=split))


def test_broken_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"data.path=.*a.parquet could not be read \("):
        read(SourceConfig(path=str(file)))


def test_rows_that_were_not_given_and_rows_that_are_none() -> None:
    with pytest.raises(UserError, match=r"data.sources.s.kind=rows needs rows from Python"):
        read(SourceConfig(kind=SourceKind.rows))
    with pytest.raises(UserError, match=r"dataset: row 2 is a str: give dictionaries, one a row"):
        read_rows([{"prompt": "a", "answer": "1"}, "b"])


def test_hub_set_without_a_network_is_one_quick_sentence() -> None:
    with pytest.raises(UserError, match=r"data.path=nobody/nothing is not in the Hugging Face cache and"):
        read(SourceConfig(path="nobody/nothing"))
