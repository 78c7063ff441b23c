"""`Ledger`, and the independent reader that accounts for every sample in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf.algorithms.dynamic_sampling import Selection
from rlhf.ledger import LEDGER, Ledger
from rollout.recorder import Recorder
from rollout.types import Group, Prompt
from tests.benchmarks import accounts
from tests.loop.groups import trajectory

PROMPT = Prompt(id="sums:0", token_ids=[1, 2], text="?", answer="7", source="sums")


def group(number: int, verdict: str = "kept") -> Group:
    """A group of two samples."""
    members = [trajectory(2, 1.0), trajectory(2, 0.0)]
    for index, member in enumerate(members):
        member.sample_index = index
    return Group(id=f"{number:08d}", prompt=PROMPT, trajectories=members, born=0, verdict=verdict)


def made(kept: list[int], carried: list[int], dropped: list[int]) -> Selection:
    return Selection(
        groups=[group(n) for n in kept],
        carried=[group(n, "carried") for n in carried],
        dropped=[group(n, "all_wrong") for n in dropped],
        counts={},
    )


class Books:
    """A ledger and a recorder, written as the loop writes them."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.recorder = Ledger(folder), Recorder(folder / "rollouts")

    def drawn(self, step: int, groups: list[int]) -> None:
        self.ledger.drawn(step, [f"{number:08d}" for number in groups], samples=2)

    def step(self, step: int, selection: Selection, trained: bool = True) -> None:
        self.recorder.write(step, selection.groups + selection.carried + selection.dropped)
        self.ledger.selected(step, selection)
        if trained:
            self.ledger.trained(step, selection.groups)


@pytest.fixture
def books(tmp_path: Path) -> Books:
    """Step 1 is trained and saved, steps 2 and 3 are lost to a kill; then 2 is trained, 3 has been drawn."""
    found = Books(tmp_path)
    found.ledger.begin(0)
    found.drawn(1, [0, 1, 2])
    found.ledger.again(1, ["00000001"])
    found.drawn(1, [3])
    found.step(1, made([0, 1], [3], [2]))
    found.drawn(2, [4, 5])
    found.step(2, made([3, 4], [5], []))
    found.drawn(3, [6])
    found.ledger.close()
    found.ledger = Ledger(tmp_path)
    found.ledger.begin(1)
    found.drawn(2, [4, 5])
    found.step(2, made([3, 5], [], [4]))
    found.drawn(3, [6, 7])
    return found


def test_every_sample_is_accounted_for(books: Books, tmp_path: Path) -> None:
    found = accounts.read(tmp_path)
    assert found.problems == []
    assert (found.steps, found.begins, found.redone) == (2, 2, 1)
    assert dict(found.samples) == {
        "drawn": 16, "trained": 8, "dropped": 4, "carried": 0, "ahead": 4, "again": 2, "lost": 6,
    }  # fmt: skip


def trained_twice(books: Books) -> None:
    books.step(3, made([6, 5], [], [7]))


def one_left_out(books: Books) -> None:
    books.step(3, made([6], [], []))


def never_drawn(books: Books) -> None:
    books.step(3, made([6, 7, 8], [], []))


def drawn_again(books: Books) -> None:
    books.drawn(3, [5])


def a_gap(books: Books) -> None:
    books.drawn(3, [9])


def other_verdicts(books: Books) -> None:
    books.step(3, made([6, 7], [], []))
    books.recorder.write(3, [group(6), group(7, "all_right")])


def a_step_left_out(books: Books) -> None:
    books.step(4, made([6, 7], [], []))


@pytest.mark.parametrize(
    ("mistake", "problem"),
    [
        (trained_twice, "00000005 was trained 2 times"),
        (one_left_out, "step 3 did not part what came into trained, dropped and carried"),
        (never_drawn, "step 3 did not part what came into trained, dropped and carried"),
        (drawn_again, "00000005 was drawn twice"),
        (a_gap, "draw 8 is missing"),
        (other_verdicts, "step_000003.parquet does not hold what the ledger says"),
        (a_step_left_out, "step 4 was not trained once and in its turn"),
    ],
)
def test_mistakes_are_found(mistake: Any, problem: str, books: Books, tmp_path: Path) -> None:
    mistake(books)
    assert problem in accounts.read(tmp_path).problems


def test_half_a_line_is_cut_off_and_whole_ones_stay(books: Books, tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    before = path.read_text()
    path.write_text(before + '{"event":"drawn","st')
    ledger = Ledger(tmp_path)
    assert path.read_text() == before
    ledger.begin(2)
    last = json.loads(path.read_text().splitlines()[-1])
    assert (last["event"], last["after"]) == ("begin", 2)


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    ledger, device = Ledger(tmp_path), os.open("/dev/full", os.O_WRONLY)
    os.dup2(device, ledger._descriptor)
    os.close(device)
    with pytest.raises(OSError, match="No space left on device"):
        ledger.begin(0)
