from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf import report
from rlhf.errors import UserError
from rlhf.report import distinct
from rlhf.tracking import jsonl
from tests.report.runs import make


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 20 steps."""
    folder = make(tmp_path_factory.mktemp("runs") / "demo")
    path = report.write(folder)
    assert path == folder / "report.md"
    return path


def test_page_of_a_whole_run(whole: Path) -> None:
    text = whole.read_text()
    assert text.startswith("# demo\n\n20 steps in 70 s.\n")
    # Wilson of 0 in 40 and of 40 in 40
    assert (
        "**Held-out accuracy: 0.0 % [0.0, 8.8] → 100.0 % [91.2, 100.0].** 40 problems, greedy, at most 16"
        in text
    )
    assert "| `eval/accuracy` | 0.0 % [0.0, 8.8] | 100.0 % [91.2, 100.0] |" in text
    # means of steps 1 to 5 and 16 to 20: 3 / 25 and 18 / 25
    assert "| `train/accuracy` | 12.0 % | 72.0 % |" in text
    assert "| `learner/grad_norm` | 1 | 1 |" in text
    # 2 * step of 40 are right: 50 % at step 10 (2 s an evaluation, 3 s a step), 80 % and more at step 20
    assert "| 50 % | 10 | 36 s |\n| 80 % | 20 | 70 s |\n| 90 % | 20 | 70 s |\n| 95 % | 20 | 70 s |" in text
    assert (
        "Where the time went: update 56.9 %, rollout 28.6 %, evaluation 14.3 %, reward 0.3 %, other 0.0 %."
        in text
    )
    assert "40 problems became right and 0 became wrong." in text
    assert "| `algorithm.clip.high` | 0.28 |" in text
    assert "lr: 1.0e-05" in text


def test_every_picture_of_the_page_is_there(whole: Path) -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", whole.read_text())
    assert pictures == [f"report/{name}.png" for name in ("learning_curve", "training", "time", "memory")]
    for picture in pictures:
        assert (whole.parent / picture).read_bytes().startswith(b"\x89PNG\r\n")


def test_responses_are_escaped_and_stay_one_line_each(whole: Path) -> None:
    text = whole.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| What is 35 + 35? |"))
    assert line == r"| What is 35 + 35? | 70 | ✗ a \`lot\` of \*it\*\|⏎&lt;b> | ✓ 70 |"
    assert "```\n<|im_start|>user\nWhat is 0 + 0?<|im_end|>\n<|im_start|>assistant\n```" in text


def test_cut_off_run_reports_what_it_has(tmp_path: Path) -> None:
    folder = make(tmp_path / "demo", steps=7)
    with (folder / jsonl.METRICS).open("a") as file:
        file.write('{"step": 8, "train/')
    text = report.write(folder).read_text()
    assert "**Not finished:** 7 of 20 steps in 25 s." in text
    assert "→ 25.0 % [14.2, 40.2].**" in text
    assert "## Time to accuracy" not in text


def test_one_logged_step_and_nothing_else_is_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(jsonl.encode(1, 0.0, {"train/accuracy": 0.25}) + "\n")
    text = report.write(str(tmp_path)).read_text()
    assert "1 steps in 0.00 s." in text
    assert "No evaluation was logged." in text
    assert "| `train/accuracy` | 25.0 % | 25.0 % |" in text
    assert (tmp_path / "report" / "learning_curve.png").exists()
    for heading in ("Responses", "Settings", "Machine", "Memory", "Time by phase"):
        assert f"## {heading}" not in text


def test_only_the_first_evaluation(tmp_path: Path) -> None:
    folder = make(tmp_path / "demo", steps=0)
    text = report.write(folder).read_text()
    assert "**Held-out accuracy at step 0: 0.0 % [0.0, 8.8].**" in text
    assert "0 problems became right and 0 became wrong" in text


def test_validation_is_never_called_held_out(tmp_path: Path) -> None:
    text = report.write(make(tmp_path / "demo", split="validation")).read_text()
    assert "**Validation accuracy: 0.0 % [0.0, 8.8] → 100.0 % [91.2, 100.0].**" in text
    assert "Evaluations (`eval/`, validation problems) are the first and the last" in text
    assert "| validation accuracy | first at step | wall clock |" in text
    assert "8 of the 40 validation problems, spread evenly" in text
    assert "| `evaluation.split` | validation |" in text
    assert "held-out" not in text.lower()


def test_nothing_logged_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no logged step \(metrics\.jsonl is missing or empty\)"):
        report.write(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="there is no report yet"):
        report.write(tmp_path)


def test_machine_section_and_writing_again(whole: Path) -> None:
    folder, before = whole.parent, whole.read_text()
    found = json.loads((folder / "environment.json").read_text())
    found["git"] = {"commit": "abc123", "modified": True}
    (folder / "environment.json").write_text(json.dumps(found))
    text = report.write(folder).read_text()
    added = "\n- commit abc123 with local changes"
    assert added in text
    assert re.sub(r"\n- commit .*", "", text) == re.sub(r"\n- commit .*", "", before)
    assert f"Python {found['python']}" in text


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["<|u|>\nA: 1 + 1?<|e|>\n<|a|>\n", "<|u|>\nA: 2 + 1?<|e|>\n<|a|>\n"], ["A: 1 + 1?", "A: 2 + 1?"]),
        (["1 + 1?", "2 + 2?"], ["1 + 1?", "2 + 2?"]),
        (["same", "same"], ["same", "same"]),
        (["head\none\ntail", "head\ntwo\ntail"], ["one", "two"]),
        (["x"], ["x"]),
    ],
)
def test_what_tells_prompts_apart(texts: list[str], expected: list[str]) -> None:
    assert distinct(texts) == expected
