"""Loading, calling and checking a user's reward function; every misuse is one sentence."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.errors import RewardRaisedError, UserError
from rlhf.rewards.function import BackgroundLoop, Batch, RewardFunction, load_function, singles
from tests.rewards import reward_functions

BATCH = Batch(
    prompts=["p1", "p2"],
    responses=["4", "five"],
    answers=["4", "5"],
    rows=[{"level": 1}, {"level": 2}],
    sources=["s", "s"],
    finished=[True, False],
    lengths=[2, 3],
)


RANGE = "return a float from -1e9 to 1e9, or a dict of such."


def values(function: Callable[..., Any], **args: Any) -> list[dict[str, float]]:
    return [score.values for score in RewardFunction("part", function, args)(BATCH)]


def returning(result: Any) -> Callable[..., Any]:
    def function(prompts: Any, responses: Any, answers: Any, rows: Any) -> Any:
        return result

    return function


def test_floats() -> None:
    scores = RewardFunction("part", reward_functions.plain, {})(BATCH)
    assert [score.values for score in scores] == [{"part": 1.0}, {"part": 0.0}]
    assert [score.accuracy for score in scores] == [1.0, 0.0]


def test_a_float_outside_the_unit_interval_is_no_accuracy() -> None:
    scores = RewardFunction("part", returning([-1.0, 1.5]), {})(BATCH)
    assert [score.values["part"] for score in scores] == [-1.0, 1.5]
    assert [score.accuracy for score in scores] == [None, None]


def test_dicts_become_named_parts() -> None:
    scores = RewardFunction("part", reward_functions.detailed, {})(BATCH)
    assert [score.values for score in scores] == [
        {"part.level": 1.0, "part.short": 1.0},
        {"part.level": 2.0, "part.short": 1.0},
    ]
    assert [score.accuracy for score in scores] == [1.0, 0.0]


def test_dict_with_accuracy_alone_is_worth_its_accuracy() -> None:
    results = [{"accuracy": 1, "extracted": 4}, {"accuracy": 0}]
    scores = RewardFunction("part", returning(results), {})(BATCH)
    assert [score.values for score in scores] == [{"part": 1.0}, {"part": 0.0}]
    assert [score.extracted for score in scores] == ["4", None]
    only_style = RewardFunction("part", returning([{"style": 0.5}, {"style": 1}]), {})(BATCH)
    assert [score.accuracy for score in only_style] == [None, None]


def test_numpy_bools_and_tuples_are_fine() -> None:
    assert values(returning(np.array([0.5, 1.0], dtype=np.float32))) == [{"part": 0.5}, {"part": 1.0}]
    assert values(returning((True, False))) == [{"part": 1.0}, {"part": 0.0}]
    assert values(returning(float(n) for n in (1, 0))) == [{"part": 1.0}, {"part": 0.0}]


def test_extras_go_where_the_signature_has_room() -> None:
    seen: dict[str, Any] = {}

    def some(prompts: Any, responses: Any, answers: Any, rows: Any, lengths: list[int]) -> list[float]:
        seen["some"] = lengths
        return [0.0, 0.0]

    def all_of_them(prompts: Any, responses: Any, answers: Any, rows: Any, **extra: Any) -> list[float]:
        seen["all"] = extra
        return [0.0, 0.0]

    values(some)
    values(all_of_them, limit=7)
    assert seen["some"] == [2, 3]
    assert seen["all"] == {"sources": ["s", "s"], "finished": [True, False], "lengths": [2, 3], "limit": 7}
    assert values(reward_functions.brevity, limit=8) == [{"part": 0.875}, {"part": 0.5}]


def test_async_functions_are_awaited_together() -> None:
    loop = BackgroundLoop()
    function = RewardFunction("part", reward_functions.judged, {}, wait=loop.wait)
    assert [score.values["part"] for score in function(BATCH)] == [1.0, 0.0]
    assert [score.values["part"] for score in function(BATCH)] == [1.0, 0.0]
    loop.close()
    loop.close()
    assert values(reward_functions.judged) == [{"part": 1.0}, {"part": 0.0}]


def test_async_functions_work_inside_a_running_loop() -> None:
    """As in a notebook."""
    loop = BackgroundLoop()

    async def notebook() -> list[float]:
        function = RewardFunction("part", reward_functions.judged, {}, wait=loop.wait)
        return [score.values["part"] for score in function(BATCH)]

    assert asyncio.run(notebook()) == [1.0, 0.0]
    loop.close()


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (
            [1.0],
            "returned 1 scores for 2 responses: return one score (a float or a dict) for each response, in "
            "order.",
        ),
        (3.0, "returned 3.0 (float): return a list with one score a response."),
        ({"a": 1}, "returned {'a': 1} (dict): return a list with one score a response."),
        (None, "returned None (NoneType): return a list with one score a response."),
        (
            [1.0, "good"],
            f"returned 'good' (str) for response 2: {RANGE}",
        ),
        (
            [None, 1.0],
            f"returned None (NoneType) for response 1: {RANGE}",
        ),
        (
            [1e308, 1.0],
            f"returned 1e+308 (float) for response 1: {RANGE}",
        ),
        (
            [1.0, 10**400],
            f"returned 1{'0' * 56}... (int) for response 2: {RANGE}",
        ),
        (
            [float("nan"), 1.0],
            f"returned nan (float) for response 1: {RANGE}",
        ),
        (
            [{"style": "bold"}, 1.0],
            f"returned 'bold' (str) under 'style' for response 1: {RANGE}",
        ),
        ([{"my style": 1}, 1.0], "returned key 'my style': use letters, digits, '_', '-' and '.'."),
        ([{"accuracy": 2}, 1.0], "returned accuracy=2: it must lie between 0 and 1."),
        ([{}, 1.0], "returned a dict without a number for response 1."),
    ],
)
def test_bad_results(result: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        RewardFunction("style", returning(result), {}, label="mine:score")(BATCH)
    assert str(caught.value) == f"reward.parts.style: mine:score {sentence}"


def test_raising_names_the_part_the_function_and_the_cause() -> None:
    def score(prompts: Any, responses: Any, answers: Any, rows: Any) -> list[float]:
        raise KeyError("level")

    with pytest.raises(UserError) as caught:
        RewardFunction("style", score, {}, label="mine:score")(BATCH)
    assert str(caught.value) == (
        "reward.parts.style: mine:score raised KeyError: 'level' (on response 1 of 2)."
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_raising_names_the_response() -> None:
    def picky(prompts: Any, responses: Any, answers: Any, rows: Any) -> Iterator[float]:
        for response in responses:
            if response == "abc":
                sys.exit(3)
            yield 1.0

    def sociable(prompts: Any, responses: Any, answers: Any, rows: Any) -> list[float]:
        if len(responses) > 1:
            raise ValueError
        return [1.0]

    batch = Batch(
        prompts=["?"] * 3,
        responses=["a", "abc", "b"],
        answers=[None] * 3,
        rows=[{}] * 3,
        ids=["s:7", "s:8", "s:9"],
    )
    for function, where in [
        (picky, "raised SystemExit: 3 (on response 2 of 3 to s:8)."),
        (sociable, "raised ValueError (on 3 responses together, on none that was tried alone)."),
    ]:
        with pytest.raises(RewardRaisedError) as caught:
            RewardFunction("style", function, {}, label="mine:score")(batch)
        assert str(caught.value) == f"reward.parts.style: mine:score {where}"


def test_wrong_signatures_are_refused_before_the_first_call() -> None:
    with pytest.raises(
        UserError, match=r"reward\.parts\.p: mine:f\(a, b\) cannot be called as fn\(prompts, "
    ):
        RewardFunction("p", lambda a, b: [], {}, label="mine:f")
    with pytest.raises(UserError, match=r"rows, limit=…\): got an unexpected keyword argument 'limit'"):
        RewardFunction("p", reward_functions.plain, {"limit": 3})


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("score", "must have the form module:function."),
        ("tests.rewards.reward_functions:brevit", "has no 'brevit': did you mean 'brevity'?"),
        ("tests.rewards.reward_functions.brevit", "has no 'brevit': did you mean 'brevity'?"),
        ("tests.rewards.reward_functions:NOT_A_FUNCTION", "is a int, not a function."),
        ("nowhere_at_all:score", "module 'nowhere_at_all' was found neither in "),
    ],
)
def test_bad_paths(path: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_function("style", path)
    assert str(caught.value).startswith(f"reward.parts.style.path={path!r}")
    assert sentence in str(caught.value)


def test_functions_load_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_mine.py").write_text("def score(p, r, a, rows):\n    return [1.0] * len(r)\n")
    (tmp_path / "broken_rewards.py").write_text("import does_not_exist_either\n")
    (tmp_path / "failing_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert values(load_function("p", "rewards_of_mine:score")) == [{"part": 1.0}, {"part": 1.0}]
    assert values(load_function("p", "rewards_of_mine.score")) == [{"part": 1.0}, {"part": 1.0}]
    with pytest.raises(UserError, match="module 'does_not_exist_either' was found neither"):
        load_function("p", "broken_rewards:score")
    with pytest.raises(UserError, match="importing failing_rewards raised ZeroDivisionError"):
        load_function("p", "failing_rewards:score")


def test_singles_cut_a_batch_in_ones() -> None:
    first, second = singles(BATCH)
    assert first["responses"] == ["4"]
    assert second == {
        "prompts": ["p2"],
        "responses": ["five"],
        "answers": ["5"],
        "rows": [{"level": 2}],
        "sources": ["s"],
        "finished": [False],
        "lengths": [3],
    }
