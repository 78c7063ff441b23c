"""`DataConfig`: kinds seen from paths, range checks, structured-config round trip."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf.data.config import DataConfig, SourceConfig, SourceKind, SourceUse, infer_kind, short_name
from rlhf.errors import UserError


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("sums", "task"),
        ("products", "task"),
        ("reasoning_gym:chain_sum", "task"),
        ("a/b/train.jsonl", "jsonl"),
        ("train.ndjson", "jsonl"),
        ("../data/*.jsonl", "jsonl"),
        ("x.json", "jsonl"),
        ("a/train.parquet", "parquet"),
        ("openai/gsm8k", "hub"),
    ],
)
def test_kind_is_seen_from_the_path(path: str, kind: str) -> None:
    assert infer_kind(path, "data.path").value == kind


@pytest.mark.parametrize(("suffix", "kind"), [("jsonl", "jsonl"), ("json", "jsonl"), ("parquet", "parquet")])
def test_a_folder_that_lies_here_comes_before_the_hub(
    suffix: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "problems"
    folder.mkdir(parents=True)
    (folder / "README.md").touch()
    (folder / f"a.{suffix}").touch()
    for path in ("data/problems", "./data/problems", "data/problems/", str(folder)):
        assert infer_kind(path, "data.path").value == kind
    assert infer_kind("openai/gsm8k", "data.path").value == "hub"


def test_a_folder_without_or_with_two_kinds_of_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.path=.* is a folder without \.jsonl or \.parquet files"):
        infer_kind(str(tmp_path), "data.path")
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.parquet").touch()
    with pytest.raises(UserError, match=r"holds \.jsonl and \.parquet files: name a pattern, .*/\*\.jsonl"):
        infer_kind(str(tmp_path), "data.path")


@pytest.mark.parametrize("path", ["sumz", "../folder", "/abs/folder", "a/b/c", "train.csv"])
def test_unclear_path_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=f"data.path={path} is neither a task"):
        infer_kind(path, "data.path")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("sums", "sums"),
        ("a/b/gsm8k_train.jsonl", "gsm8k_train"),
        ("d/*.parquet", "all"),
        ("./problems", "problems"),
        ("../data/problems/", "problems"),
        ("openai/gsm8k", "openai/gsm8k"),
    ],
)
def test_short_name(path: str, name: str) -> None:
    assert short_name(path) == name


def test_path_replaces_sources() -> None:
    config = DataConfig(path="sums", sources={"other": SourceConfig(path="products")})
    assert list(config.named_sources()) == ["sums"]
    assert list(DataConfig(sources={"other": SourceConfig(path="products")}).named_sources()) == ["other"]


def test_defaults_have_nothing_to_complain_about() -> None:
    assert DataConfig(path="sums").check() == []
    assert DataConfig().check() == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"validation": -1}, "data.validation=-1 must be at least 0: raise it."),
        ({"heldout": -2}, "data.heldout=-2 must be at least 0: raise it."),
        ({"max_prompt_tokens": 0}, "data.max_prompt_tokens=0 must be at least 1: raise it."),
        ({"epochs": -1}, "data.epochs=-1 must be at least 0: raise it."),
        ({"template": "Solve."}, "data.template='Solve.' has no {prompt}: say where the prompt goes."),
        (
            {"fields": {"question": "q"}},
            "data.fields.question is unknown: the fields are prompt, answer, answer_after, id.",
        ),
        (
            {"sources": {"a": SourceConfig(path="sums", weight=0.0)}},
            "data.sources.a.weight=0.0 must be above 0: raise it or remove the source.",
        ),
        (
            {"sources": {"a": SourceConfig()}},
            "data.sources.a.path is empty: name a task, a file or a hub id.",
        ),
        (
            {"sources": {"a": SourceConfig(path="sums", fields={"prompt": "q"})}},
            "data.sources.a.fields has no effect on the task sums: remove it.",
        ),
        (
            {"sources": {"a": SourceConfig(path="x.jsonl", fields={"gold": "q"})}},
            "data.sources.a.fields.gold is unknown: the fields are prompt, answer, answer_after, id.",
        ),
        (
            {"path": "sumz"},
            "data.path=sumz is neither a task (sums, products, reasoning_gym:<name>), a .jsonl or .parquet "
            "file, a folder of them, nor a hub id (owner/name): correct it.",
        ),
        (
            {"sources": {"a": SourceConfig(path="sumz")}},
            "data.sources.a.path=sumz is neither a task (sums, products, reasoning_gym:<name>), a .jsonl or "
            ".parquet file, a folder of them, nor a hub id (owner/name): correct it.",
        ),
    ],
)
def test_check_sentences(changes: dict[str, Any], sentence: str) -> None:
    assert dataclasses.replace(DataConfig(), **changes).check() == [sentence]


def test_an_explicit_kind_needs_no_suffix() -> None:
    source = SourceConfig(path="folder", kind=SourceKind.jsonl)
    assert DataConfig(sources={"a": source}).check() == []
    assert DataConfig(sources={"mine": SourceConfig(kind=SourceKind.rows)}).check() == []


def test_survives_omegaconf() -> None:
    given = {
        "sources": {"a": {"path": "sums", "use": "heldout", "args": {"digits": 3}}},
        "fields": {"prompt": "q"},
    }
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), given))
    assert isinstance(config, DataConfig)
    assert config.sources["a"] == SourceConfig(path="sums", use=SourceUse.heldout, args={"digits": 3})
    assert config.fields == {"prompt": "q", "answer": "answer"}


def test_at_most_eighteen_keys() -> None:
    assert len(dataclasses.fields(DataConfig)) + len(dataclasses.fields(SourceConfig)) <= 18
