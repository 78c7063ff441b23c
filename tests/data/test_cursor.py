"""`Cursor`: order, mixture, epochs and resume, against closed forms."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlhf.data.cursor import Cursor
from rlhf.errors import UserError

SIZES = {"a": 30, "b": 7, "c": 11}
WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}


def test_one_source_is_a_permutation_each_epoch() -> None:
    cursor = Cursor({"a": 10}, seed=0)
    epochs = [[pick.index for pick in cursor.draw(10)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert cursor.draw(1)[0].epoch == 3


def test_order_is_a_function_of_the_seed() -> None:
    first, again, other = (Cursor(SIZES, seed=seed, weights=WEIGHTS).draw(100) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_batch_size_does_not_change_the_order() -> None:
    whole, pieces = Cursor(SIZES, seed=1, weights=WEIGHTS), Cursor(SIZES, seed=1, weights=WEIGHTS)
    assert whole.draw(60) == [pick for n in (1, 9, 0, 20, 30) for pick in pieces.draw(n)]


def test_serials_number_the_draws() -> None:
    cursor = Cursor(SIZES, seed=1)
    assert [pick.serial for n in (5, 3) for pick in cursor.draw(n)] == list(range(8))
    assert cursor.consumed == 8
    assert sum(cursor.consumed_by_source.values()) == 8


@pytest.mark.parametrize("count", [1, 2, 10, 99, 1000])
def test_mixture_never_lags_a_whole_draw_behind_its_share(count: int) -> None:
    drawn = Counter(pick.source for pick in Cursor(SIZES, seed=0, weights=WEIGHTS).draw(count))
    for name, weight in WEIGHTS.items():
        assert abs(drawn[name] - count * weight) < len(SIZES) - 1
    two = Counter(
        pick.source for pick in Cursor({"a": 5, "b": 9}, seed=0, weights={"a": 3, "b": 1}).draw(count)
    )
    assert abs(two["a"] - count * 0.75) < 1


def test_weights_default_to_equal_shares() -> None:
    drawn = Counter(pick.source for pick in Cursor(SIZES, seed=0).draw(300))
    assert drawn == {"a": 100, "b": 100, "c": 100}


def test_epochs_run_out() -> None:
    cursor = Cursor(SIZES, seed=0, weights=WEIGHTS, epochs=2)
    picks = cursor.draw(10_000)
    assert len(picks) == 2 * sum(SIZES.values())
    assert Counter((p.source, p.index) for p in picks) == {
        (s, i): 2 for s, n in SIZES.items() for i in range(n)
    }
    assert cursor.exhausted
    assert cursor.draw(1) == []
    assert cursor.epoch == 2.0


def test_endless_by_default() -> None:
    cursor = Cursor({"a": 2}, seed=0)
    assert len(cursor.draw(1001)) == 1001
    assert not cursor.exhausted


@pytest.mark.parametrize("before", [0, 1, 17, 48, 200])
def test_resume_is_exact(before: int) -> None:
    straight = Cursor(SIZES, seed=5, weights=WEIGHTS, epochs=9)
    straight.draw(before)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = Cursor(SIZES, seed=5, weights=WEIGHTS, epochs=9)
    resumed.load_state_dict(state)
    assert resumed.draw(150) == straight.draw(150)
    assert resumed.consumed == straight.consumed


def test_resume_refuses_other_data_and_another_seed() -> None:
    state = Cursor({"a": 10}, seed=5).state_dict()
    with pytest.raises(UserError, match=r"made with prompts \{'a': 10\} and the data now give \{'a': 11\}"):
        Cursor({"a": 11}, seed=5).load_state_dict(state)
    with pytest.raises(UserError, match=r"made with run.seed=5"):
        Cursor({"a": 10}, seed=6).load_state_dict(state)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match=r"source 'b' has no prompts"):
        Cursor({"a": 1, "b": 0}, seed=0)
    with pytest.raises(ValueError, match=r"no sources"):
        Cursor({}, seed=0)


def test_first_picks_of_seed_zero_never_change() -> None:
    picks = Cursor({"a": 100, "b": 100}, seed=0).draw(6)
    assert [pick.source for pick in picks] == ["a", "b", "a", "b", "a", "b"]
    assert [pick.index for pick in picks] == FIRST_PICKS


FIRST_PICKS = [12, 68, 59, 59, 11, 11]
"""Read off once: a change of the order would silently change every run of a seed."""
