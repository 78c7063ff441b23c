"""The same model, prompts and problems in lm-evaluation-harness: does every problem come out the same?

    python -m tests.benchmarks.versus_lm_eval FOLDER_OF_MODEL [--problems FILE.jsonl] [--first N] [--tokens N]

Both generate greedily in float32, ours in vLLM and theirs in transformers; a problem's prompt is the chat
template around its text. Both read the last number (theirs by the "flexible-extract" rule of its GSM8K task).
Without `--problems` it asks three-digit sums, of which the demo's model, taught two digits, gets some right.
Prints how many responses, extracted answers and verdicts agree, and every problem where one does not, with
the reason. lm-eval runs in an environment of its own, made when missing: it is no part of Whetstone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rlhf.data.tasks import build_task
from rlhf.evaluation import answers
from rlhf.evaluation.runner import Problem
from tests.benchmarks.measuring import markdown

VERSION = "lm-eval==0.4.13"
TASK = "whetstone"
EXTRACT = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
"""lm-eval's own, of the filter "flexible-extract" of its task gsm8k."""
IGNORED = [",", r"\$", r"\.$"]
"""What its gsm8k tasks take out of answers and golds before they compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Theirs:
    """lm-eval on one problem."""

    response: str
    extracted: str
    right: bool


# ---------------------------------------------------------------- problems


def write_problems(path: Path, given: Path | None, first: int) -> None:
    """`problem` and `answer` a line: the first ones of a file, or three-digit sums."""
    if given is not None:
        rows = [json.loads(line) for line in given.read_text().splitlines()[:first]]
        rows = [{"id": str(n), "problem": r["problem"], "answer": r["answer"]} for n, r in enumerate(rows)]
    else:
        sums = build_task("sums", "sums", {"digits": 3, "size": first, "seed": 1})
        rows = [{"id": str(n), "problem": s.text, "answer": str(s.answer)} for n, s in enumerate(sums)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- both sides


def run_ours(model: Path, problems: Path, folder: Path, tokens: int) -> list[Problem]:
    """`rlhf eval`, greedy, float32."""
    settings = [
        f"data.path={problems}", f"model.path={model}", f"run.dir={folder}", "rollout.dtype=float32",
        "protocol.template='{prompt}'", f"protocol.max_new_tokens={tokens}", "rollout.eager=true",
        "protocol.graders.integer={kind: exact_integer, args: {rule: last_number, must_end: false}}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "rlhf.cli", "eval", "jsonl", *settings]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return answers.read(folder)


def run_theirs(python: Path, model: Path, problems: Path, folder: Path, tokens: int) -> list[Theirs]:
    """lm-eval with a task of our own on the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(_task(problems, tokens)))
    arguments = [
        "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks", TASK,
        "--include_path", str(folder), "--apply_chat_template", "--batch_size", "32", "--log_samples",
        "--output_path", str(folder / "out"), "--device", "cpu",
    ]  # fmt: skip
    subprocess.run([python, "-m", "lm_eval", "run", *arguments], check=True, stdout=sys.stderr)
    (samples,) = (folder / "out").rglob(f"samples_{TASK}_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
    return [
        Theirs(
            response=row["resps"][0][0],
            extracted=str(row["filtered_resps"][0]),
            right=row["exact_match"] == 1,
        )
        for row in rows
    ]


def _task(problems: Path, tokens: int) -> dict[str, object]:
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(problems)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{problem}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": tokens},
        "filter_list": [
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": EXTRACT},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": IGNORED,
            }
        ],
        "metadata": {"version": 1.0},
    }


def prepare_venv(folder: Path) -> Path:
    """lm-eval's environment, which borrows our torch and transformers; returns its interpreter."""
    python, done = folder / "bin/python", folder / ".complete"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "whetstone.pth").write_text(ours + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", VERSION], check=True)
        done.touch()
    return python


# ---------------------------------------------------------------- the result


def reason(ours: Problem, theirs: Theirs) -> str:
    """Why answer or verdict differ; empty when both agree."""
    if ours.response.strip() != theirs.response.strip():
        shared = len(_common(ours.response, theirs.response))
        return f"the responses part after {shared} characters: '{_next(ours.response, shared)}' against " + (
            f"'{_next(theirs.response, shared)}'"
        )
    if same_answer(ours.extracted, theirs.extracted) and bool(ours.accuracy) == theirs.right:
        return ""
    return f"one response, other rules: ours reads {ours.extracted}, lm-eval {theirs.extracted}"


def same_answer(ours: str | None, theirs: str) -> bool:
    """Whether both read the same number, however it is spelled."""
    plain = theirs
    for pattern in IGNORED:
        plain = re.sub(pattern, "", plain)
    if ours is None or theirs == "[invalid]":
        return ours is None and theirs == "[invalid]"
    try:
        return float(ours) == float(plain)
    except ValueError:
        return ours == plain


def table(ours: Sequence[Problem], theirs: Sequence[Theirs]) -> str:
    """Counts of agreement, and a row for each problem that differs."""
    pairs = list(zip(ours, theirs, strict=True))
    counts = [
        ("responses", sum(o.response.strip() == t.response.strip() for o, t in pairs)),
        ("extracted answers", sum(same_answer(o.extracted, t.extracted) for o, t in pairs)),
        ("verdicts", sum(bool(o.accuracy) == t.right for o, t in pairs)),
    ]
    rows = [[name, f"{count} of {len(pairs)}"] for name, count in counts]
    rows += [
        ["right, ours", f"{sum(bool(o.accuracy) for o in ours)}"],
        ["right, lm-eval", f"{sum(t.right for t in theirs)}"],
    ]
    found = [
        [o.id, str(o.answer), str(o.extracted), t.extracted, reason(o, t)] for o, t in pairs if reason(o, t)
    ]
    lines = markdown(["agree", "problems"], rows)
    if found:
        lines += "\n\n" + markdown(["problem", "gold", "ours", "lm-eval", "why"], found)
    return lines


def _common(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:length]


def _next(text: str, start: int) -> str:
    return " ".join(text[start : start + 20].split()) or "(end)"


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--problems", type=Path)
    parser.add_argument("--first", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--venv", type=Path, default=Path("/tmp/lm-eval-venv"))
    parser.add_argument("--folder", type=Path, help="files of both; a new one")
    given = parser.parse_args()
    folder = (given.folder or Path(f"/tmp/versus-lm-eval-{int(time.time())}")).absolute()
    folder.mkdir(parents=True)
    problems = folder / "problems.jsonl"
    write_problems(problems, given.problems, given.first)
    python = prepare_venv(given.venv)
    ours = run_ours(given.model.absolute(), problems, folder / "ours", given.tokens)
    theirs = run_theirs(python, given.model.absolute(), problems, folder / "theirs", given.tokens)
    print(table(ours, theirs))


if __name__ == "__main__":
    main()
