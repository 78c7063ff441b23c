"""Dynamic sampling: the filter, refills, caps, surplus, order, state."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable

import pytest

from rlhf.algorithms.config import DynamicSamplingConfig, OverlongConfig, Surplus, WhenExhausted
from rlhf.algorithms.dynamic_sampling import Selection, Selector, why_useless
from rlhf.algorithms.overlong import shape_rewards
from rollout.types import FinishReason, Group
from tests.algorithms.toy import group

MIXED, WRONG, RIGHT = [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]


def on(**changes: object) -> DynamicSamplingConfig:
    return DynamicSamplingConfig(**{"enabled": True, **changes})  # type: ignore[arg-type]


def one_round(config: DynamicSamplingConfig, wanted: int, groups: list[Group]) -> Selection:
    selector = Selector(config, wanted)
    selector.start(0)
    selector.offer(groups)
    return selector.finish()


def names(groups: list[Group]) -> list[str]:
    return [item.id for item in groups]


def test_constant_groups_go_even_when_their_shaped_rewards_differ() -> None:
    groups = [
        group("wrong", WRONG, rewards=[-1, -1, -2, -1]),
        group("right", RIGHT, rewards=[1, 0.5, 1, 1]),
        group("mixed", MIXED),
    ]
    selection = one_round(on(), 1, groups)
    assert names(selection.groups) == ["mixed"]
    assert [item.verdict for item in groups] == ["all_wrong", "all_right", "kept"]
    assert selection.counts["selection/dropped_all_wrong"] == 1
    assert selection.counts["selection/dropped_all_right"] == 1
    assert selection.counts["selection/zero_variance"] == pytest.approx(2 / 3)
    assert selection.counts["selection/acceptance"] == pytest.approx(1 / 3)


def test_counter_example_of_filtering_on_the_shaped_reward() -> None:
    """15 wrong and short, one wrong and overlong: the shaped reward varies, the accuracy does not.

    A filter on the reward would keep it and give +0.25 to fifteen wrong answers.
    """
    trap = group("trap", [0] * 16, rewards=[-1.0] * 16, lengths=[5] * 15 + [20])
    shape_rewards([trap], OverlongConfig(buffer=10), limit=20)
    assert len({t.reward for t in trap.trajectories}) == 2
    assert why_useless(trap) == "all_wrong"


def test_reasons() -> None:
    aborted, unread, crashed = group("a", MIXED), group("b", MIXED), group("c", MIXED)
    aborted.trajectories[0].finish_reason = FinishReason.ABORT
    unread.trajectories[1].grade_status = "gold_unparsable"
    crashed.trajectories[1].grade_status = "timeout"
    assert [why_useless(item) for item in (aborted, unread, crashed)] == ["ungraded", "ungraded", None]
    assert why_useless(group("d", [0.25, 0.25])) == "all_equal"
    assert why_useless(group("e", [0.25, 0.5])) is None
    assert why_useless(group("f", [float("nan"), 0.5])) == "ungraded"
    assert why_useless(group("g", [1])) == "all_right"


def test_off_lets_every_group_pass() -> None:
    groups = [group("a", WRONG), group("b", RIGHT), group("c", MIXED), group("d", [0.5, 0.5])]
    selection = one_round(DynamicSamplingConfig(), 4, groups)
    assert selection.groups == groups
    assert selection.dropped == selection.carried == []
    assert selection.shortage is None
    assert selection.counts["selection/zero_variance"] == 0.75


def test_refills_until_exactly_the_wanted_number() -> None:
    selector = Selector(on(oversample=3.0), 4)
    selector.start(0)
    assert (selector.missing(), selector.draws()) == (4, 12)
    selector.offer([group(f"a{i}", MIXED if i % 6 == 0 else WRONG) for i in range(12)])
    assert (selector.missing(), selector.draws()) == (2, 6)
    selector.offer([group(f"b{i}", RIGHT if i < 1 else MIXED) for i in range(6)])
    assert selector.missing() == 0
    selection = selector.finish()
    assert names(selection.groups) == ["a0", "a6", "b1", "b2"]
    assert selection.counts["selection/rounds"] == 2
    assert selection.counts["selection/dropped_surplus"] == 3
    assert selection.shortage is None
    assert all(len(item.trajectories) == 4 for item in selection.groups), "groups are never split"


def test_fractions_of_a_draw_are_rounded_up_and_off_draws_what_is_missing() -> None:
    for config, expected in ((on(oversample=1.5), 5), (DynamicSamplingConfig(oversample=1.5), 3)):
        selector = Selector(config, 3)
        selector.start(0)
        assert selector.draws() == expected


@pytest.mark.parametrize("when", list(WhenExhausted))
def test_cap_ends_the_step_and_says_so(when: WhenExhausted) -> None:
    selector = Selector(on(max_rounds=3, when_exhausted=when), 2)
    selector.start(0)
    rounds = 0
    while selector.missing():
        selector.offer([group(f"{rounds}.{i}", MIXED if rounds == i == 0 else WRONG) for i in range(2)])
        rounds += 1
    selection = selector.finish()
    assert rounds == 3
    assert names(selection.groups) == ["0.0"]
    assert selection.stop is (when is WhenExhausted.stop)
    outcome = {
        WhenExhausted.go_on: "The step goes on with what it has.",
        WhenExhausted.stop: "The run stops (algorithm.dynamic_sampling.when_exhausted=stop).",
    }[when]
    assert selection.shortage == (
        "Only 1 of 2 groups were found and algorithm.dynamic_sampling.max_rounds=3 is reached; "
        f"groups offered: 5 all_wrong, 1 useful. {outcome}"
    )
    assert selection.counts["selection/missing"] == 1


def test_running_out_of_data_ends_the_step_and_says_so() -> None:
    selector = Selector(on(), 2)
    selector.start(0)
    selector.offer([group("a", MIXED)])
    selector.exhaust("the data ran out")
    assert selector.missing() == 0
    selection = selector.finish()
    assert selection.shortage is not None
    assert selection.shortage.startswith("Only 1 of 2 groups were found and the data ran out;")
    assert not selection.stop


def test_surplus_is_carried_first_in_line_until_stale() -> None:
    selector = Selector(on(surplus=Surplus.carry, max_age=1), 2)
    selector.start(0)
    first = [group(f"a{i}", MIXED, born=0) for i in range(5)]
    selector.offer(first)
    selection = selector.finish()
    assert names(selection.carried) == ["a2", "a3", "a4"]
    assert [item.verdict for item in first] == ["kept", "kept", "carried", "carried", "carried"]

    selector.start(1)
    assert selector.missing() == 0, "the carried groups fill the step"
    selection = selector.finish()
    assert names(selection.groups) == ["a2", "a3"]
    assert selection.counts["selection/carried_in"] == 3
    assert selection.counts["selection/rounds"] == 0

    selector.start(2)
    assert selector.missing() == 2, "a4 is two steps old"
    selector.offer([group("b0", MIXED, born=2), group("b1", MIXED, born=2)])
    selection = selector.finish()
    assert names(selection.groups) == ["b0", "b1"]
    assert first[4].verdict == "stale"
    assert names(selection.dropped) == ["a4"]
    assert selection.counts["selection/dropped_stale"] == 1


def test_groups_fill_in_order_of_submission() -> None:
    """Response lengths, which decide who completes first, play no part."""
    groups = [group(f"g{i}", MIXED, lengths=[100 - i] * 4) for i in range(8)]
    assert names(one_round(on(), 3, groups).groups) == ["g0", "g1", "g2"]


def test_state_survives_json() -> None:
    config = on(surplus=Surplus.carry)
    selector = Selector(config, 1)
    selector.start(4)
    carried = group("b", [1, 0.5], born=4)
    carried.trajectories[0].finish_reason = FinishReason.LENGTH
    selector.offer([group("a", MIXED, born=4), carried])
    with pytest.raises(ValueError, match="a step is open"):
        selector.state_dict()
    selector.finish()
    state = json.loads(json.dumps(selector.state_dict()))
    restored = Selector(config, 1)
    restored.load_state_dict(state)
    restored.start(5)
    got = restored.finish().groups
    carried.verdict = "kept"
    assert got == [carried]
    assert isinstance(got[0].trajectories[0].finish_reason, FinishReason)


def test_calls_out_of_order_are_refused() -> None:
    selector = Selector(on(), 1)
    for call in (selector.missing, selector.finish, lambda: selector.offer([])):
        with pytest.raises(ValueError, match=r"call start\(\) first"):
            call()
    selector.start(0)
    with pytest.raises(ValueError, match=r"call finish\(\) before start\(\)"):
        selector.start(1)
    with pytest.raises(ValueError, match="a step of 0 groups"):
        Selector(on(), 0)


def sampler(seed: int, chances: list[float], size: int) -> Callable[[str], Group]:
    chance = random.Random(seed)

    def draw(name: str) -> Group:
        p = chance.choice(chances)
        return group(name, [float(chance.random() < p) for _ in range(size)], lengths=[1] * size)

    return draw


def test_expected_number_of_prompts() -> None:
    """With acceptance `a = mean of 1 - p^G - (1-p)^G`, filling P groups takes P / a prompts on average."""
    chances, size, wanted = [0.02, 0.3, 0.9, 1.0], 4, 6
    acceptance = statistics.mean(1 - p**size - (1 - p) ** size for p in chances)
    draw = sampler(0, chances, size)
    drawn = []
    for trial in range(400):
        selector = Selector(on(max_rounds=10_000), wanted)
        selector.start(0)
        count = 0
        while selector.missing():
            selector.offer([draw(f"{trial}.{count}")])
            count += 1
        drawn.append(count)
    error = statistics.stdev(drawn) / len(drawn) ** 0.5
    assert statistics.mean(drawn) == pytest.approx(wanted / acceptance, abs=3 * error)
    assert error < 0.03 * wanted / acceptance


def test_four_steps_equal_two_and_a_resume_and_two() -> None:
    """Data order, carried groups and batches are the same after a round trip through JSON."""

    def steps(selector: Selector, cursor: int, first: int, count: int) -> tuple[list[list[str]], int]:
        batches = []
        for step in range(first, first + count):
            selector.start(step)
            while selector.missing():
                names_now = [str(cursor + i) for i in range(selector.draws())]
                cursor += len(names_now)
                selector.offer([seeded(name, step) for name in names_now])
            batches.append(names(selector.finish().groups))
        return batches, cursor

    def seeded(name: str, step: int) -> Group:
        item = sampler(int(name), [0.2, 0.6], 4)(name)
        item.born = step
        return item

    config = on(surplus=Surplus.carry, oversample=4.0, max_age=2)
    whole = steps(Selector(config, 5), 0, 0, 4)
    before = Selector(config, 5)
    batches, cursor = steps(before, 0, 0, 2)
    state = json.loads(json.dumps({"selector": before.state_dict(), "cursor": cursor}))
    assert state["selector"]["carried"], "something must be carried for the test to mean anything"
    after = Selector(config, 5)
    after.load_state_dict(state["selector"])
    more, cursor = steps(after, state["cursor"], 2, 2)
    assert (batches + more, cursor) == whole
