"""How long 10 000 answers take: `OMP_NUM_THREADS=1 python -m tests.benchmarks.grading_speed [answers]`.

One line a case, the start of the workers not counted: seconds, answers a second, how the answers ended,
workers replaced. Golds come from GSM8K, MATH-500 and DeepMath when the shared data is there
(`WHETSTONE_DATA`), else from a small list. Half of the answers are right, most of them spelled differently
from the gold, so that text alone does not settle them.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from rlhf.rewards.base import Scorer
from rlhf.rewards.config import RewardConfig, RewardPartConfig
from rollout.types import FinishReason, Group, Prompt, Trajectory

GROUP = 8
HOSTILE = (
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{" + "{" * 5000 + "}" * 5000 + "}",
    r"\boxed{\binom{10^9}{5*10^8}}",
)


def golds(files: tuple[str, ...]) -> list[str]:
    """Gold answers of the named data sets, or a few of our own."""
    folder = Path(os.environ.get("WHETSTONE_DATA", Path(__file__).parents[3] / "shared" / "data"))
    found: list[str] = []
    for name in files:
        path = folder / f"{name}.jsonl"
        if path.exists():
            found += [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    return found or ["540", r"\frac{3}{4}", r"2\sqrt{3}", "(1, 2)", r"x^2 + 1", "7", "-12"] * 200


def respelled(answer: str, rng: random.Random) -> str:
    """The same answer, most often not letter by letter."""
    return rng.choice(
        [answer, f" {answer} ", f"{answer} + 0", rf"\left({answer}\right)", f"1 \\cdot ({answer})"]
    )


def responses(gold: str, others: list[str], rng: random.Random, template: str) -> list[str]:
    """A group of answers: half right in several spellings, half taken from other questions."""
    answers = [respelled(gold, rng) if rng.random() < 0.5 else rng.choice(others) for _ in range(GROUP)]
    return [template.replace("ANSWER", answer) for answer in answers]


def make_groups(answers: int, files: tuple[str, ...], template: str, hostile: int = 0) -> list[Group]:
    """`answers` responses in groups of eight, the first of `hostile` groups being hostile."""
    rng = random.Random(7)
    known = golds(files)
    groups = []
    for index in range(answers // GROUP):
        gold = known[index % len(known)]
        texts = responses(gold, known, rng, template)
        if index < hostile:
            texts[0] = HOSTILE[index % len(HOSTILE)]
        prompt = Prompt(id=f"b:{index}", token_ids=[], text="", answer=gold, source="b")
        groups.append(
            Group(id=str(index), prompt=prompt, born=0, trajectories=[_trajectory(text) for text in texts])
        )
    return groups


def _trajectory(text: str) -> Trajectory:
    return Trajectory(
        prompt_ids=[],
        response_ids=[0] * 20,
        logprobs=[],
        finish_reason=FinishReason.STOP,
        version_spans=[],
        sample_index=0,
        seed=0,
        text=text,
    )


def measure(title: str, kind: str, groups: list[Group], **args: Any) -> None:
    """Score `groups` with a scorer whose workers are up and have seen 64 groups; print one line."""
    with Scorer(RewardConfig(parts={"answer": RewardPartConfig(kind=kind, args=args)})) as scorer:
        scorer.start()
        scorer.score(groups[-64:])
        began = time.perf_counter()
        report = scorer.score(groups)
        seconds = time.perf_counter() - began
    count = sum(len(group.trajectories) for group in groups)
    right = sum(trajectory.accuracy for group in groups for trajectory in group.trajectories) / count
    statuses = {str(status): number for status, number in report.statuses["answer"].items()}
    print(
        f"{title:32} {count:6d} answers {seconds:7.2f} s {count / seconds:8.0f}/s  right {right:.3f}  "
        f"{statuses}  replaced {report.replaced_workers}",
        flush=True,
    )


def main() -> None:
    """Every case once."""
    answers = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    integers, mixed = ("gsm8k_test",), ("math500", "deepmath_5k")
    line, box = "So it is.\nAnswer: ANSWER", r"Hence it is $\boxed{ANSWER}$."
    long = "We add 3 and 4 to get 7. " * 800 + line
    measure("exact_integer", "exact_integer", make_groups(answers, integers, line))
    measure("exact_integer, 20 kB responses", "exact_integer", make_groups(answers, integers, long))
    measure("dapo_math", "dapo_math", make_groups(answers, integers, line))
    measure("math_verify, integers", "math_verify", make_groups(answers, integers, box))
    measure("math_verify, MATH-500 + DeepMath", "math_verify", make_groups(answers, mixed, box))
    measure("math_verify, the same, 6 hostile", "math_verify", make_groups(answers, mixed, box, hostile=6))


if __name__ == "__main__":
    main()
