"""Degrees and the number of ranks; what torchrun says."""

from __future__ import annotations

import pytest

from trainer.parallel.config import Degrees, Launcher, ParallelConfig, RayConfig
from trainer.parallel.world import World


@pytest.mark.parametrize(
    ("replicate", "shard", "ranks", "expected"),
    [(1, 0, 1, (1, 1)), (1, 0, 8, (1, 8)), (2, 0, 8, (2, 4)), (2, 4, 8, (2, 4)), (4, 1, 4, (4, 1))],
)
def test_degrees(replicate: int, shard: int, ranks: int, expected: tuple[int, int]) -> None:
    assert ParallelConfig(replicate, shard).degrees(ranks) == Degrees(*expected)


@pytest.mark.parametrize(
    ("replicate", "shard", "ranks", "said"),
    [
        (1, 4, 2, "replicate=1 x learner.parallel.shard=4 = 4 ranks, but there are 2: start 4 "),
        (3, 0, 4, "replicate=3 x learner.parallel.shard=1 = 3 ranks, but there are 4: start 3 "),
        (2, 0, 1, "replicate=2 x learner.parallel.shard=1 = 2 ranks, but there are 1: start 2 "),
    ],
)
def test_degrees_that_do_not_multiply_to_the_ranks_are_refused(
    replicate: int, shard: int, ranks: int, said: str
) -> None:
    with pytest.raises(ValueError, match="or set degrees whose product is") as caught:
        ParallelConfig(replicate, shard).degrees(ranks)
    assert said in str(caught.value)


def test_three_degrees() -> None:
    assert ParallelConfig(tensor=2).degrees(8) == Degrees(1, 4, 2)
    assert ParallelConfig(replicate=2, shard=2, tensor=2).degrees(8) == Degrees(2, 2, 2)
    with pytest.raises(
        ValueError, match=r"shard=1 x learner\.parallel\.tensor=4 = 4 ranks, but there are 2: "
    ):
        ParallelConfig(tensor=4).degrees(2)
    assert ParallelConfig(tensor=0).check() == ["learner.parallel.tensor=0 must be at least 1: raise it."]


def test_ranges() -> None:
    assert ParallelConfig().check() == []
    assert ParallelConfig(0, -1).check() == [
        "learner.parallel.replicate=0 must be at least 1: raise it.",
        "learner.parallel.shard=-1 is negative: set a number of ranks, or 0 for all.",
    ]


def test_ray_starts_as_many_ranks_as_the_degrees_ask_for() -> None:
    asked = ParallelConfig(2, 3, tensor=2, launcher=Launcher.ray, places=["a"])
    assert (asked.product, asked.check(), asked.degrees(12)) == (12, [], Degrees(2, 3, 2))
    assert ParallelConfig(launcher=Launcher.ray).check() == [
        "learner.parallel.launcher=ray starts replicate x shard x tensor ranks, which are 1: set "
        "learner.parallel.shard to the number of ranks."
    ]
    assert ParallelConfig(places=["a"]).check() == [
        "learner.parallel.places=['a'] is for Ray, and learner.parallel.launcher=torchrun: set launcher=ray, "
        "or leave places empty."
    ]


def test_which_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert [RayConfig(address).cluster for address in ("", "local", "auto", "h:1")] == ["", "", "auto", "h:1"]
    monkeypatch.setenv("RAY_ADDRESS", "h:2")
    assert [RayConfig(address).cluster for address in ("", "local", "h:1")] == ["h:2", "", "h:1"]


def test_the_world_is_what_torchrun_says() -> None:
    assert World.from_environment({}) == World(0, 1, 0, 1)
    assert not World.from_environment({}).follows
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    found = World.from_environment(variables)
    assert (found, found.follows) == (World(5, 8, 1, 4), True)
