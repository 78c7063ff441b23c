"""`Scorer` end to end on groups: parts, weights, routing, accuracy, real workers, counts."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.metrics import unknown
from rlhf.rewards.base import Scorer
from rlhf.rewards.config import RewardConfig, RewardPartConfig
from rollout.types import FinishReason, Group, Prompt, Trajectory
from tests.rewards import reward_functions

HERE = "tests.rewards.reward_functions"


def trajectory(text: str, finish: FinishReason = FinishReason.STOP, length: int = 3) -> Trajectory:
    return Trajectory(
        prompt_ids=[1],
        response_ids=[5] * length,
        logprobs=[0.0] * length,
        finish_reason=finish,
        version_spans=[],
        sample_index=0,
        seed=0,
        text=text,
    )


def group(
    texts: Sequence[str | Trajectory], gold: str | None = "32", source: str = "sums", **row: Any
) -> Group:
    prompt = Prompt(id="sums:0", token_ids=[1], text="10 + 22?", answer=gold, source=source, row=row)
    members = [text if isinstance(text, Trajectory) else trajectory(text) for text in texts]
    return Group(id="g", prompt=prompt, trajectories=members, born=0)


def scorer_of(**parts: RewardPartConfig) -> Scorer:
    return Scorer(RewardConfig(parts=parts))


def part(kind: str, **keys: Any) -> RewardPartConfig:
    return RewardPartConfig(kind=kind, **keys)


@pytest.fixture(scope="module")
def math_scorer() -> Iterator[Scorer]:
    """Two workers with math-verify up, two seconds an answer."""
    config = RewardConfig(parts={"answer": part("math_verify")}, workers=2, timeout_s=2.0)
    with Scorer(config) as scorer:
        scorer.start()
        scorer.score([group([rf"\boxed{{{n}x}}" for n in range(8)], gold="x")])
        yield scorer


def test_demo_rule_fills_the_trajectory() -> None:
    members = [
        trajectory("It is 32"),
        trajectory("It is 33"),
        trajectory("It is 32", FinishReason.LENGTH),
        trajectory("It is 32", FinishReason.ABORT),
        trajectory("what?"),
    ]
    with scorer_of(answer=part("exact_integer")) as scorer:
        report = scorer.score([group(members)])
    assert [member.accuracy for member in members] == [1, 0, 0, 0, 0]
    assert [member.reward for member in members] == [1, 0, 0, 0, 0]
    assert [member.rewards for member in members[:2]] == [{"answer": 1.0}, {"answer": 0.0}]
    assert [member.extracted for member in members] == ["32", "33", None, None, None]
    assert [member.grade_status for member in members] == ["ok", "ok", "no_answer", "no_answer", "no_answer"]
    assert report.statuses["answer"] == {"ok": 2, "no_answer": 3}
    assert scorer.graders() == {"answer": "exact_integer@1"}
    assert report.failures() == {
        "reward/answer_no_answer": 3,
        "reward/answer_gold_unparsable": 0,
        "reward/answer_timeout": 0,
        "reward/answer_error": 0,
        "reward/replaced_workers": 0,
    }
    assert unknown(report.failures()) == []


def test_reward_is_the_weighted_sum_and_accuracy_stays_raw() -> None:
    members = [trajectory("a\nAnswer: 32", length=10), trajectory("33", length=30)]
    with scorer_of(
        answer=part("dapo_math", values=[-1.0, 1.0]),
        form=part("format", weight=0.1, args={"pattern": r".*\nAnswer: \d+"}),
        size=part("length", weight=0.5, args={"free": 10, "limit": 50}),
    ) as scorer:
        scorer.score([group(members)])
    assert members[0].rewards == {"answer": 1.0, "form": 1.0, "size": 0.0}
    assert members[0].reward == pytest.approx(1.1)
    assert members[1].rewards == {"answer": -1.0, "form": 0.0, "size": -0.5}
    assert members[1].reward == pytest.approx(-1.25)
    assert [member.accuracy for member in members] == [1.0, 0.0]


def test_scoring_twice_equals_scoring_once() -> None:
    groups = [group(["32", "31"])]
    with scorer_of(
        answer=part("exact_integer"), loose=part("exact_integer", args={"rule": "any_mention"})
    ) as scorer:
        scorer.score(groups)
        first = [(member.rewards, member.reward) for member in groups[0].trajectories]
        scorer.score(groups)
    assert [(member.rewards, member.reward) for member in groups[0].trajectories] == first
    assert first[0] == ({"answer": 1.0, "loose": 1.0}, 2.0)


def test_routing_by_source() -> None:
    sums = group(["32", r"\boxed{32}"], source="sums")
    contest = group(["32", r"\boxed{32}"], source="aime")
    with scorer_of(
        exact=part("exact_integer", sources=["sums"]),
        boxed=part("exact_integer", sources=["aime"], args={"rule": "boxed"}),
        form=part("format", weight=0.0, args={"pattern": ".*"}),
    ) as scorer:
        report = scorer.score([sums, contest])
        with pytest.raises(UserError) as caught:
            scorer.score([sums, group(["32"], source="gsm8k")])
        with pytest.raises(UserError, match="no reward part grades data source 'gsm8k'"):
            scorer.check_graded(["sums", "gsm8k"])
    assert [member.rewards for member in sums.trajectories] == [{"exact": 1.0, "form": 1.0}] * 2
    assert [member.rewards.get("boxed") for member in contest.trajectories] == [0.0, 1.0]
    assert "exact" not in contest.trajectories[0].rewards
    assert [member.accuracy for member in contest.trajectories] == [0.0, 1.0]
    assert report.statuses["form"]["ok"] == 4
    assert str(caught.value) == (
        "no reward part grades data source 'gsm8k': add a part of kind exact_integer, aime, "
        "math_verify, dapo_math or function for it."
    )


def test_every_source_that_a_part_lists_must_exist() -> None:
    parts = {
        "answer": part("exact_integer"),
        "form": part("format", sources=["sums", "gsm8k_tset"], args={"pattern": "."}),
    }
    with scorer_of(**parts) as scorer:
        scorer.check_sources(["gsm8k_tset", "other", "sums"])
        scorer.score([group(["32"], source="other")])
        with pytest.raises(UserError) as caught:
            scorer.check_sources(["gsm8k_test", "sums"])
    assert str(caught.value) == (
        "reward.parts.form.sources lists 'gsm8k_tset', which no data source is called: "
        "did you mean 'gsm8k_test'?"
    )


def test_which_part_decides_accuracy() -> None:
    parts = {
        "loose": part("exact_integer", args={"rule": "any_mention"}),
        "strict": part("exact_integer"),
        "style": part("function", path=f"{HERE}:brevity"),
    }
    responses = ["32 is 10 + 22"]
    for decider, accuracy in (("", 1.0), ("loose", 1.0), ("strict", 0.0), ("style", 0.87)):
        scored = group(responses)
        with Scorer(RewardConfig(parts=parts, accuracy_from=decider)) as scorer:
            scorer.score([scored])
        assert scored.trajectories[0].accuracy == pytest.approx(accuracy)


def test_accuracy_from_must_cover_and_grade() -> None:
    parts = {"a": part("exact_integer", sources=["x"]), "b": part("exact_integer")}
    with (
        Scorer(RewardConfig(parts=parts, accuracy_from="a")) as scorer,
        pytest.raises(UserError, match=r"'y': let reward\.parts\.a\.sources list it"),
    ):
        scorer.check_graded(["x", "y"])
    parts["form"] = part("format", args={"pattern": "."})
    with pytest.raises(UserError, match=r"reward.accuracy_from='form' is a format part, which says nothing"):
        Scorer(RewardConfig(parts=parts, accuracy_from="form"))
    with (
        scorer_of(form=part("format", args={"pattern": "."})) as scorer,
        pytest.raises(UserError, match="no reward part grades data source 'sums'"),
    ):
        scorer.score([group(["32"])])


def test_missing_golds_are_counted() -> None:
    scored = group(["32"], gold=None)
    with scorer_of(answer=part("exact_integer", values=[-1.0, 1.0])) as scorer:
        report = scorer.score([scored])
    assert scored.trajectories[0].grade_status == "gold_unparsable"
    assert scored.trajectories[0].reward == -1.0
    assert report.failures()["reward/answer_gold_unparsable"] == 1


# ---- user functions ----


def test_python_function_gets_every_column() -> None:
    seen: list[Any] = []

    def fn(
        prompts: list[str], responses: list[str], answers: list[str], rows: list[dict[str, Any]], **extra: Any
    ) -> list[float]:
        seen.append((prompts, responses, answers, rows, extra))
        return [float(row["level"]) for row in rows]

    scored = group(["a", "b"], level=0.5, topic="sums")
    with Scorer(RewardConfig(), {"mine": fn}) as scorer:
        scorer.score([scored])
    prompts, responses, answers, rows, extra = seen[0]
    assert (prompts, responses, answers) == (["10 + 22?"] * 2, ["a", "b"], ["32", "32"])
    assert rows == [{"level": 0.5, "topic": "sums"}] * 2
    assert extra == {"sources": ["sums"] * 2, "finished": [True, True], "lengths": [3, 3]}
    assert [member.reward for member in scored.trajectories] == [0.5, 0.5]
    assert [member.accuracy for member in scored.trajectories] == [0.5, 0.5]


def test_function_beside_a_grader_and_dict_results() -> None:
    scored = group(["32", "no way"], level=2)
    parts = {"style": part("function", path=f"{HERE}:detailed", weight=0.5), "answer": part("exact_integer")}
    with Scorer(RewardConfig(parts=parts)) as scorer:
        scorer.score([scored])
    right, wrong = scored.trajectories
    assert right.rewards == {"style.level": 2.0, "style.short": 1.0, "answer": 1.0}
    assert right.reward == pytest.approx(0.5 * 3.0 + 1.0)
    assert (right.accuracy, wrong.accuracy, right.extracted) == (1.0, 0.0, "32")
    with Scorer(RewardConfig(parts=parts, accuracy_from="style")) as scorer:
        scorer.score([scored])
    assert right.accuracy == 1.0
    assert right.extracted is None


def test_function_must_tell_accuracy_when_it_decides_it() -> None:
    with (
        Scorer(RewardConfig(), {"mine": lambda p, r, a, rows: [3.0]}) as scorer,
        pytest.raises(UserError) as caught,
    ):
        scorer.score([group(["32"])])
    assert str(caught.value).startswith("reward.parts.mine: ")
    assert "decides accuracy but returned mine=3: return a float in [0, 1], or a dict" in str(caught.value)


def test_async_function_inside_a_running_loop() -> None:
    scored = group(["abc", "ab"])

    async def notebook() -> None:
        with Scorer(RewardConfig(), {"judge": reward_functions.judged}) as scorer:
            scorer.score([scored])

    asyncio.run(notebook())
    assert [member.accuracy for member in scored.trajectories] == [1.0, 0.0]


def test_functions_given_twice_or_not_at_all() -> None:
    config = RewardConfig(parts={"mine": part("exact_integer")})
    with pytest.raises(UserError, match=r"reward\.parts\.mine is configured already"):
        Scorer(config, {"mine": reward_functions.plain})
    with pytest.raises(UserError, match=r"reward\.parts\.mine\.path is empty: give module:function"):
        scorer_of(mine=part("function"))
    named = RewardConfig(parts={"mine": part("function", weight=2.0)})
    scored = group(["32"])
    with Scorer(named, {"mine": reward_functions.plain}) as scorer:
        scorer.score([scored])
    assert scored.trajectories[0].reward == 2.0


def test_function_in_the_sandbox_fails_one_answer_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["fine"] * 6 + ["hang", "crash", "raise"] + ["fine"] * 3
    scored = group(texts)
    config = RewardConfig(
        parts={"judge": part("function", path=f"{HERE}:hostile", sandbox=True)}, workers=2, timeout_s=1.0
    )
    with Scorer(config) as scorer:
        report = scorer.score([scored])
        assert [member.reward for member in scored.trajectories] == [1.0] * 6 + [0.0] * 3 + [1.0] * 3
        assert [member.grade_status for member in scored.trajectories[6:9]] == ["timeout", "error", "error"]
        assert report.statuses["judge"] == {"ok": 9, "timeout": 1, "error": 2}
        assert caplog.messages == [
            "reward.parts.judge: an answer to sums:0 could not be graded: no answer within 1 s "
            "(reward.timeout_s); more are counted in reward/judge_error and reward/judge_timeout."
        ]
        assert report.failures()["reward/replaced_workers"] == 1
        with pytest.raises(UserError) as caught:
            scorer.score([group(["raise", "raise"])])
        assert str(caught.value) == (
            f"reward.parts.judge: {HERE}:hostile failed on all 2 responses: RuntimeError: no judge"
        )


def test_misuse_in_the_sandbox_is_the_authors_mistake() -> None:
    config = RewardConfig(parts={"judge": part("function", path=f"{HERE}:words", sandbox=True)}, workers=1)
    with Scorer(config) as scorer, pytest.raises(UserError, match=r"returned 'good' \(str\) for response 1"):
        scorer.score([group(["a", "b"])])
    config = RewardConfig(parts={"judge": part("function", path=f"{HERE}:judged", sandbox=True)}, workers=1)
    scored = group(["abc", "ab"])
    with Scorer(config) as scorer:
        scorer.score([scored])
    assert [member.reward for member in scored.trajectories] == [1.0, 0.0]


# ---- workers ----


def test_runaway_pattern_in_the_sandbox() -> None:
    scored = group(["a" * 40 + "!", "aaa"])
    parts = {
        "answer": part("exact_integer"),
        "form": part("format", args={"pattern": "(a+)+"}),
    }
    with Scorer(RewardConfig(parts=parts, workers=1, timeout_s=0.5)) as scorer:
        report = scorer.score([scored])
    assert [member.rewards["form"] for member in scored.trajectories] == [0.0, 1.0]
    assert report.statuses["form"] == {"timeout": 1, "ok": 1}


@pytest.mark.parametrize(
    "answer",
    [
        r"9^{9^{9^9}}",
        r"\binom{10^9}{5*10^8}",
        "10!!!!!",
        "{" * 5_000 + "}" * 5_000,
        "{" * 10_000,
        "(" * 500,
        r"\frac{1}{" * 50 + "x" + "}" * 50,
        "1" * 500,
        "\x00\ud800",
    ],
)
def test_hostile_answers_end_within_the_limit(math_scorer: Scorer, answer: str) -> None:
    scored = group([rf"\boxed{{{answer}}}", r"\boxed{2x}", r"\boxed{x + x}"], gold="2x")
    began = time.monotonic()
    math_scorer.score([scored])
    assert time.monotonic() - began < 2.0 + 1.0 + 6.0  # limit, grace, a worker's replacement
    assert [member.accuracy for member in scored.trajectories] == [0.0, 1.0, 1.0]


def test_hung_answer_is_a_counted_failure(math_scorer: Scorer) -> None:
    scored = group([r"\boxed{9^{9^{9^9}}}", r"\boxed{\frac{6}{4}}"], gold=r"\frac{3}{2}")
    report = math_scorer.score([scored])
    assert scored.trajectories[0].grade_status == "timeout"
    assert report.statuses["answer"] == {"timeout": 1, "ok": 1}
    assert report.failures()["reward/answer_timeout"] == 1
    assert scored.trajectories[1].accuracy == 1.0


def test_equal_answers_get_equal_verdicts_and_order_does_not_matter(math_scorer: Scorer) -> None:
    texts = [r"\boxed{x+1}", r"so \boxed{1+x}", r"\boxed{x+1}", r"\boxed{x-1}"] * 3
    forward, shuffled = group(texts, gold="x+1"), group(texts, gold="x+1")
    order = list(range(len(texts)))
    random.Random(1).shuffle(order)
    shuffled.trajectories = [shuffled.trajectories[index] for index in order]
    math_scorer.score([forward])
    math_scorer.score([shuffled])
    expected = [1.0, 1.0, 1.0, 0.0] * 3
    assert [member.accuracy for member in forward.trajectories] == expected
    assert [member.accuracy for member in shuffled.trajectories] == [expected[index] for index in order]


def test_math_works_from_a_thread(math_scorer: Scorer) -> None:
    """The library itself refuses threads (`signal.alarm`)."""
    scored = group([r"\boxed{\frac{2}{4}x}"], gold=r"\frac{x}{2}")
    thread = threading.Thread(target=math_scorer.score, args=([scored],))
    thread.start()
    thread.join()
    assert scored.trajectories[0].accuracy == 1.0


def test_ten_thousand_answers(math_scorer: Scorer) -> None:
    """10 000 answers, one of them hung, all counted; 500 distinct formulas go through the library."""
    groups = []
    for number in range(1250):
        texts = [
            rf"\boxed{{{number}}}",
            rf"\boxed{{{number + 1}}}",
            rf"\boxed{{{number % 250} + 1}}",
            "none",
        ] * 2
        groups.append(group(texts, gold=str(number % 250)))
    groups[7].trajectories[0].text = r"\boxed{9^{9^{9^9}}}"
    began = time.monotonic()
    report = math_scorer.score(groups)
    assert time.monotonic() - began < 20
    assert sum(report.statuses["answer"].values()) == 10_000
    assert report.statuses["answer"] == {"ok": 7_499, "no_answer": 2_500, "timeout": 1}
    right = sum(member.accuracy for scored in groups for member in scored.trajectories)
    assert right == 2 * 250 - 1


def test_ten_thousand_answers_inline() -> None:
    groups = [
        group([f"It is {number + extra}" for extra in range(8)], gold=str(number)) for number in range(1250)
    ]
    with scorer_of(answer=part("exact_integer")) as scorer:
        began = time.monotonic()
        scorer.score(groups)
        assert time.monotonic() - began < 5
    assert sum(member.accuracy for scored in groups for member in scored.trajectories) == 1250


def test_close_is_final_for_workers_and_safe_to_repeat(math_scorer: Scorer) -> None:
    scorer = scorer_of(answer=part("exact_integer"))
    scorer.close()
    scorer.close()
