"""Which scores may be subtracted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf.errors import UserError
from rlhf.evaluation import answers as store
from rlhf.evaluation.answers import Answers
from rlhf.evaluation.compare import compare, parse
from rlhf.evaluation.result import summarize
from rlhf.evaluation.stamp import Stamp, differences, weights_digest
from tests.evaluation.test_result import rows


def stamp(**changed: Any) -> Stamp:
    values: dict[str, Any] = {
        "protocol": {"label": "greedy@1", "digest": "p", "temperature": 0.0},
        "data": {"path": "a.jsonl", "digest": "d", "problems": 3},
        "prompts": "r",
        "grader": {"label": "exact_integer@1"},
        "model": {"description": "a", "weights": "w"},
        "engine": {"kind": "vllm", "device": "cpu"},
        "numerics": {"dtype": "bfloat16"},
        "versions": {"torch": "2.13.0", "vllm": "0.32.0"},
        "seed": 0,
        "round": 8,
    }
    return Stamp(**(values | changed))


def plain(one: Stamp) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(one.plain()))
    return found


def evaluation(folder: Path, marks: str, **changed: Any) -> str:
    """A whole evaluation, one response to each problem, on the disk."""
    answers = Answers(folder, stamp(**changed))
    answers.append(rows(*marks))
    answers.finish(stamp(**changed), summarize(answers.problems, 1).plain())
    return str(folder)


def test_model_seed_and_place_of_the_data_may_differ() -> None:
    other = stamp(
        model={"description": "b", "weights": "v"},
        seed=1,
        data={"path": "hub/b", "digest": "d", "problems": 3},
        protocol={"label": "mine@1", "digest": "p", "temperature": 0.0},
    )
    assert differences(plain(stamp()), plain(other)) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"protocol": {"label": "greedy@1+changed", "digest": "q", "temperature": 0.6}},
            "protocol (how the problems are asked, sampled and graded) differs: temperature 0.0 against 0.6",
        ),
        ({"data": {"path": "a", "digest": "e", "problems": 3}}, "data (which problems) differs: digest 'd' "),
        ({"numerics": {"dtype": "float32"}}, "numerics (number formats) differs: dtype 'bfloat16' against "),
        ({"versions": {"torch": "2.13.0", "vllm": "0.33.0"}}, "differs: vllm '0.32.0' against '0.33.0'"),
        ({"grader": {"label": "exact_integer@2"}}, "label 'exact_integer@1' against 'exact_integer@2'"),
        ({"prompts": "s"}, "prompts (the rendered prompts, the chat template with them) differs: r aga"),
        ({"engine": {"kind": "vllm", "device": "cuda"}}, "device 'cpu' against 'cuda'"),
    ],
)
def test_what_matters_is_named(changed: dict[str, Any], said: str) -> None:
    (found,) = differences(plain(stamp()), plain(stamp(**changed)))
    assert said in found
    assert differences(plain(stamp()), plain(stamp(**changed)), [next(iter(changed))]) == []


def test_compare_subtracts_problem_by_problem(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", "110000")
    second = evaluation(tmp_path / "b", "111100", model={"description": "better", "weights": "v"})
    said = compare(first, second)
    assert "second - first: +33.3%" in said
    assert "standard error 21.08%" in said  # sd of (0, 0, 1, 1, 0, 0) over sqrt 6
    assert "p 0.5 (all sign flips)" in said  # two signs of two flips
    assert "better" in said


def test_compare_refuses_and_can_be_told(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", "110000")
    second = evaluation(tmp_path / "b", "111100", numerics={"dtype": "float32"})
    with pytest.raises(UserError, match=r"must not be subtracted: numerics .* say allow=numerics"):
        compare(first, second)
    assert "+33.3%" in compare(first, second, ["numerics"])
    with pytest.raises(UserError, match="allow=speed is no part of a stamp: the parts are protocol, data"):
        compare(first, second, ["speed"])


def test_compare_wants_two_whole_evaluations(tmp_path: Path) -> None:
    first = evaluation(tmp_path / "a", "10")
    Answers(tmp_path / "b", stamp()).append(rows("1"))
    with pytest.raises(UserError, match="has not come to its end"):
        compare(first, str(tmp_path / "b"))
    with pytest.raises(UserError, match="is no evaluation"):
        compare(first, str(tmp_path / "c"))
    with pytest.raises(UserError, match="takes two folders"):
        parse([first])
    assert parse(["a", "b", "allow=numerics,versions"]) == ("a", "b", ["numerics", "versions"])


def test_answers_go_on_after_the_last_whole_round(tmp_path: Path) -> None:
    answers = Answers(tmp_path, stamp())
    answers.append(rows("10"))
    answers.append(rows("11")[:1])  # killed in its midst
    with (tmp_path / store.LINES).open("a") as file:
        file.write('{"id": "p')
    again = Answers(tmp_path, stamp())
    assert again.whole([2, 2, 2]) == 1
    assert [problem.accuracy for problem in store.read(tmp_path)] == [1.0, 0.0]


def test_another_evaluation_keeps_its_folder(tmp_path: Path) -> None:
    Answers(tmp_path, stamp())
    with pytest.raises(UserError, match=r"holds another evaluation \(seed differs\)"):
        Answers(tmp_path, stamp(seed=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        Answers(tmp_path / "other", stamp())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run.dir=.*file/inside cannot be made \(Not a directory\)"):
        Answers(tmp_path / "file" / "inside", stamp())


def test_the_weights_decide_not_their_place(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, value in zip(folders, (1.0, 1.0, 2.0), strict=True):
        folder.mkdir()
        save_file({"w": torch.tensor([value])}, folder / "model.safetensors")
    first, second, third = map(weights_digest, folders)
    assert first == second != third
    assert weights_digest(folders[0], folders[2]) != first
    assert weights_digest(folders[0], None) == first
