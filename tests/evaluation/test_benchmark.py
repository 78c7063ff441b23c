"""Benchmarks and protocols: what composes, what is refused, what identifies them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.compose import benchmark_names
from rlhf.errors import UserError
from rlhf.evaluate import _preset_digest, _rounds
from rlhf.evaluation.benchmark import full_name, is_benchmark, load
from rlhf.evaluation.problems import benchmark_name, data_digest, read_problems
from rlhf.evaluation.protocol import AnswerKind, content, digest
from rlhf.evaluation.stamp import protocol_part
from rollout.types import Prompt

NAMES = [
    "aime24", "aime25", "aime26", "amc23", "gsm8k", "jsonl", "math500", "minerva_math", "olympiadbench",
    "svamp",
]  # fmt: skip


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data.path={path}"


def test_every_benchmark_composes() -> None:
    assert benchmark_names() == [f"eval/{name}" for name in NAMES]
    for name in NAMES:
        config = load(name, ["data.path=mine.jsonl"] if name == "jsonl" else [])
        assert config.protocol.reward(config.data.answers).check() == []
    assert full_name("aime24") == "eval/aime24"
    assert full_name("dapo/tiny") == "dapo/tiny"
    assert not is_benchmark("dapo/tiny")


@pytest.mark.parametrize(
    ("protocol", "values"),
    [
        ("dapo", (32, 1.0, 0.7, 0, 20480)),
        ("deepseek_r1", (64, 0.6, 0.95, 0, 32768)),
        ("qwen", (64, 0.6, 0.95, 20, 38912)),
        ("greedy", (1, 0.0, 1.0, 0, 2048)),
    ],
)
def test_protocols_are_those_of_the_papers(protocol: str, values: tuple[float, ...]) -> None:
    found = load("aime24", [f"protocol={protocol}"]).protocol
    assert (
        found.samples, found.temperature, found.top_p, found.top_k, found.max_new_tokens
    ) == values  # fmt: skip
    assert found.label == f"{protocol}@1"


def test_an_overridden_preset_is_another_protocol() -> None:
    preset = load("aime24")
    changed = load("aime24", ["protocol.samples=4"])
    parts = [
        protocol_part(config.protocol, AnswerKind.aime, _preset_digest(config))
        for config in (preset, changed)
    ]
    assert [part["label"] for part in parts] == ["dapo@1", "dapo@1+changed"]
    assert parts[0]["digest"] != parts[1]["digest"]
    assert parts[0]["digest"] == digest(content(preset.protocol, AnswerKind.aime))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["protocol=greedy", "protocol.samples=4"], "4 greedy responses would all be one: set protocol.temp"),
        (["rollout.top_p=0.5"], "rollout.top_p=0.5 is how training samples: set protocol.top_p."),
        (["protocol.samples=0"], "protocol.samples=0 must be at least 1"),
        (["protocol.template=hello"], "protocol.template='hello' has no {prompt}"),
        (["protocol.graders.aime.kind=exact"], "protocol.graders.aime.kind='exact' is not known"),
        (["data.answers=essay"], "data.answers=essay: choose one of aime, integer, expression."),
        (["data.problems=-1"], "data.problems=-1 is negative"),
        (["endpoint.url=localhost:8000"], "endpoint.url=localhost:8000 is no address"),
        (["endpoint.model=mine"], "endpoint.model=mine has no server: set endpoint.url, or use model.path."),
        (["model.init_from=runs/a@3"], "set model.path=runs/a@3 and leave model.init_from empty"),
        (["loop.steps=3"], "Unknown key 'loop.steps'"),
        (["protocol=foo"], "protocol=foo is not known: choose one of dapo, deepseek_r1, greedy, qwen."),
        (["run.round=-1"], "run.round=-1 must be at least 0"),
    ],
)
def test_one_sentence_for_bad_settings(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load("aime24", overrides)
    assert said in str(caught.value)


def test_usual_columns_are_found(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    config = load("jsonl", [lines(path, [{"question": "1 + 1?", "final_answer": ["2"]}])])
    (problem,) = read_problems(config.data, benchmark_name("jsonl", config))
    assert (problem.id, problem.prompt, problem.answer) == ("mine:0", "1 + 1?", "2")
    config = load("jsonl", [lines(path, [{"task": "1 + 1?", "answer": "2"}])])
    with pytest.raises(UserError, match=r"none of the columns problem, question, .* only task, answer"):
        read_problems(config.data, "mine")


def test_a_mark_before_the_answer_is_taken_where_there_is_one(tmp_path: Path) -> None:
    for answer in ("so 2\n#### 2", "2"):
        rows: list[dict[str, Any]] = [{"question": "1 + 1?", "answer": answer}]
        config = load("gsm8k", [lines(tmp_path / "g.jsonl", rows)])
        assert read_problems(config.data, "gsm8k")[0].answer == "2"


def test_repeated_problems_are_asked_once_and_ids_are_unique(tmp_path: Path) -> None:
    twice = [{"id": str(n), "problem": "1 + 1?", "answer": "2"} for n in range(32)]
    rows = [*twice, {"id": "x", "problem": "2?", "answer": "2"}]
    config = load("jsonl", [lines(tmp_path / "a.jsonl", rows)])
    assert [p.id for p in read_problems(config.data, "aime")] == ["aime:0", "aime:x"]
    same = [{"id": "a", "problem": f"{n}?", "answer": "2"} for n in range(2)]
    config = load("jsonl", [lines(tmp_path / "b.jsonl", same)])
    with pytest.raises(UserError, match="two problems are called mine:a"):
        read_problems(config.data, "mine")


def test_a_slice_of_a_file(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"problem": f"{n}?", "answer": str(n)} for n in range(5)])
    found = read_problems(load("jsonl", [path, "data.split='test[:2]'"]).data, "mine")
    assert [problem.answer for problem in found] == ["0", "1"]


def test_the_digest_is_of_the_problems_not_of_the_file(tmp_path: Path) -> None:
    rows = [{"problem": f"{n}?", "answer": str(n)} for n in range(3)]
    other: list[dict[str, Any]] = [
        {"question": row["problem"], "answer": row["answer"], "level": 1} for row in rows
    ]
    digests = [
        data_digest(read_problems(load("jsonl", [lines(tmp_path / f"{i}.jsonl", found)]).data, str(i)))
        for i, found in enumerate((rows, other, rows[::-1]))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("aime24", "aime24", 30), ("aime25", "aime25", 30), ("aime26", "aime26", 30), ("amc23", "amc23", 40),
        ("math500", "math500", 500), ("gsm8k", "gsm8k_test", 1319), ("minerva_math", "minerva_math", 272),
        ("olympiadbench", "olympiadbench", 675), ("svamp", "svamp_test", 200),
    ],
)  # fmt: skip
def test_shared_files_are_read_by_override_alone(name: str, file: str, count: int, data_dir: Path) -> None:
    config = load(name, [f"data.path={data_dir}/{file}.jsonl"])
    assert len(read_problems(config.data, name)) == count


def test_rounds_are_whole_problems() -> None:
    config = load("aime24", ["protocol.samples=4", "run.round=10"])
    prompts = [Prompt(id=str(n), token_ids=[], text="", answer="", source="") for n in range(5)]
    assert [len(part) for part in _rounds(prompts, config)] == [2, 2, 1]
    assert [len(part) for part in _rounds(prompts, load("aime24", ["run.round=1"]))] == [1] * 5


def test_explain_says_how_sure_the_number_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "aime24"]) == 0
    said = capsys.readouterr().out
    assert "protocol dapo@1: 32 responses to each, temperature 1, top-p 0.7, top-k off, at most 20480" in said
    assert "standard error of up to 1.6%" in said  # sqrt(1/4 / (30 * 32))


def test_a_benchmark_is_not_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "eval/aime24"]) == 2
    assert "'eval/aime24' is a benchmark, which `rlhf eval` runs" in capsys.readouterr().err
