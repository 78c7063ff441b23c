from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf.evaluation import runner
from rlhf.evaluation.config import EvaluationConfig
from rlhf.evaluation.graders import second_opinions
from rlhf.evaluation.runner import Evaluation, evaluate, sampling_for
from rlhf.metrics import unknown
from rlhf.rewards.config import RewardConfig, RewardPartConfig
from rollout.engine import Sampling
from rollout.types import FinishReason, Group, Prompt, Trajectory
from tests.tracking.samples import prompt, trajectory

GREEDY = Sampling(max_tokens=16, temperature=0.0, stop_token_ids=(2,))
ANSWERS = [
    trajectory("2", 1.0, length=2),
    trajectory("The sum is 4, I think. 5", 0.0, length=10),
    trajectory("The sum of these two num", 0.0, length=16, finished=False),
    trajectory("8", 1.0, length=4),
]
"""Responses to 1 + 1 ... 4 + 4: right, mentioned but wrong, cut off, right."""


def _generate(prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
    assert sampling is GREEDY
    return [Group(id=f"eval/{p.id}", prompt=p, trajectories=[a], born=0) for p, a in zip(prompts, ANSWERS)]


def _mentioned(prompt: Prompt, response: Trajectory) -> float:
    return float(prompt.answer is not None and prompt.answer in response.text)


def _evaluation() -> Evaluation:
    graded: list[str] = []

    def score(groups: list[Group]) -> None:
        graded.extend(group.id for group in groups)

    found = evaluate(
        [prompt(i) for i in range(1, 5)],
        _generate,
        score,
        GREEDY,
        step=20,
        graders={"any_mention": _mentioned},
    )
    assert graded == [f"eval/sums:{i}" for i in range(1, 5)]
    return found


def test_every_number_by_hand() -> None:
    metrics = _evaluation().metrics()
    # Wilson of 2 in 4: (0.5 +- ...) solves |0.5 - p| = 1.96 sqrt(p (1 - p) / 4), so 0.5 +- 0.349981
    expected = {
        "eval/accuracy": 0.5,
        "eval/accuracy_low": 0.150039,
        "eval/accuracy_high": 0.849961,
        "eval/accuracy_se": 0.288675,  # sd of 1, 0, 0, 1 is sqrt(1/3), over sqrt(4)
        "eval/any_mention": 0.75,
        "eval/format": 0.75,
        "eval/reward": 0.0,
        "eval/length_mean": 8.0,
        "eval/truncated": 0.25,
        "eval/ungraded": 0.0,
        "eval/prompts": 4.0,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert unknown(metrics) == []


def test_problems_are_written_and_read_back(tmp_path: Path) -> None:
    evaluation = _evaluation()
    path = evaluation.write(tmp_path)
    assert path == tmp_path / "evaluations" / "step-20.jsonl"
    assert runner.read(path) == evaluation.problems
    first = json.loads(path.read_text().splitlines()[0])
    assert first["id"] == "sums:1"
    assert first["grades"] == {"format": 1.0, "any_mention": 1.0}
    assert first["rewards"] == {"exact": 1.0}
    summary = json.loads(path.with_suffix(".json").read_text())
    assert summary["sampling"]["temperature"] == 0.0
    assert summary["sampling"]["max_tokens"] == 16
    assert summary["metrics"]["eval/accuracy"] == 0.5
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-20.json", "step-20.jsonl"]


def test_steps_are_found_in_order(tmp_path: Path) -> None:
    evaluation = _evaluation()
    for step in (100, 0, 20):
        evaluation.step = step
        evaluation.write(tmp_path)
    assert list(runner.steps(tmp_path)) == [0, 20, 100]
    assert runner.steps(tmp_path / "none") == {}


def test_odd_line_separators_in_a_response_survive(tmp_path: Path) -> None:
    evaluation = _evaluation()
    evaluation.problems[0].response = "a\u2028b\x85c\r\nd\n"
    assert runner.read(evaluation.write(tmp_path))[0].response == "a\u2028b\x85c\r\nd\n"


def test_responses_that_nobody_graded_are_counted_and_wrong() -> None:
    def generate(prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        responses = [trajectory("2", 1.0), trajectory("4", 0.0), trajectory("6", 1.0)]
        responses[0].finish_reason = FinishReason.ABORT
        responses[1].grade_status = "timeout"
        return [Group(id=p.id, prompt=p, trajectories=[r], born=0) for p, r in zip(prompts, responses)]

    metrics = evaluate(
        [prompt(i) for i in (1, 2, 3)],
        generate,
        lambda groups: None,
        GREEDY,
        step=0,
        graders={"any_mention": _mentioned},
    ).metrics()
    assert metrics["eval/ungraded"] == 2
    assert metrics["eval/accuracy"] == pytest.approx(1 / 3)
    assert metrics["eval/any_mention"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("gold", "reported"), [("8", True), ("008", True), (r"\frac{1}{2}", False)])
def test_any_mention_is_reported_for_integers_alone(gold: str, reported: bool) -> None:
    parts = {"sums": RewardPartConfig(kind="exact_integer"), "rest": RewardPartConfig(kind="math_verify")}
    prompts = [prompt(i) for i in range(1, 5)]
    prompts[3].answer = gold
    graders = second_opinions(RewardConfig(parts=parts))
    found = evaluate(prompts, _generate, lambda groups: None, GREEDY, step=0, graders=graders)
    assert ("eval/any_mention" in found.metrics()) is reported
    assert ("any_mention" in found.problems[3].grades) is reported
    assert found.problems[1].grades["any_mention"] == 1.0
    assert second_opinions(RewardConfig(parts={"rest": RewardPartConfig(kind="math_verify")})) == {}


def test_format_may_be_given() -> None:
    found = evaluate(
        [prompt(1)], _generate, lambda groups: None, GREEDY, step=0, graders={"format": lambda p, t: 0.25}
    )
    assert found.metrics()["eval/format"] == 0.25


def test_one_response_to_each_prompt_in_order_is_checked() -> None:
    def reversed_groups(prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return _generate(prompts, sampling)[::-1]

    with pytest.raises(
        ValueError, match="one response to each of 4 prompts, in order, and got 4 in 4 groups"
    ):
        evaluate([prompt(i) for i in range(1, 5)], reversed_groups, lambda groups: None, GREEDY, step=0)
    with pytest.raises(ValueError, match="held-out set is empty"):
        evaluate([], _generate, lambda groups: None, GREEDY, step=0)


def test_sampling_is_evaluations_own_but_for_stops_and_the_default_limit() -> None:
    training = Sampling(
        max_tokens=16, temperature=1.0, top_p=0.9, top_k=50, stop=("\n",), stop_token_ids=(2, 7)
    )
    assert sampling_for(EvaluationConfig(), training) == Sampling(
        max_tokens=16, temperature=0.0, stop=("\n",), stop_token_ids=(2, 7)
    )
    own = sampling_for(EvaluationConfig(temperature=0.6, top_p=0.95, max_new_tokens=64), training)
    assert (own.temperature, own.top_p, own.top_k, own.max_tokens) == (0.6, 0.95, 0, 64)
    assert sampling_for(EvaluationConfig(top_p=0.5), training).top_p == 1.0
