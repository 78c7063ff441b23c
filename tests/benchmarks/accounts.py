"""An independent reader of a run's `ledger.jsonl`: accounts for every sample that was ever drawn.

It shares no code with the run, and asks neither its counters nor its checkpoints. What it knows is the
meaning of the events (`rlhf/ledger.py`), the rule that ids count from 0, and, as a second witness, the groups
that `rollouts/` recorded.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

Event = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Accounts:
    """What became of all samples. Groups and steps are those of the history that counts, unless said."""

    steps: int = 0
    """Steps that were trained, 1 to this."""
    begins: int = 0
    """How often the run was started."""
    redone: int = 0
    """Steps that were trained, lost, and trained again."""
    samples: Counter[str] = field(default_factory=Counter)
    """`drawn`, and of these `trained`, `dropped`, `carried` into a step yet to come, `ahead` of it; beside
    them `again`: generated again because their engine died, and `lost`: drawn by what was cut off."""
    problems: list[str] = field(default_factory=list)
    """Sentences about samples that are not accounted for; empty when all are."""


def read(folder: Path) -> Accounts:
    """The accounts of the run in a folder."""
    lines = (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    accounts = Accounts(begins=sum(event["event"] == "begin" for event in events))
    history = _surviving(events, accounts)
    sizes = _sizes(history, accounts)
    _settle(history, sizes, accounts)
    _compare(folder / "rollouts", history, sizes, accounts)
    return accounts


def _surviving(events: list[Event], accounts: Accounts) -> list[Event]:
    """Without what a later `begin` declared void."""
    history: list[Event] = []
    for event in events:
        if event["event"] == "begin":
            void = [old for old in history if old["step"] > event["after"]]
            accounts.redone += sum(old["event"] == "trained" for old in void)
            accounts.samples["lost"] += _drawn(void)
            history = [old for old in history if old["step"] <= event["after"]]
        else:
            history.append(event)
    return history


def _drawn(events: list[Event]) -> int:
    return sum(len(event["groups"]) * event["samples"] for event in events if event["event"] == "drawn")


def _sizes(history: list[Event], accounts: Accounts) -> Counter[str]:
    """Samples of every group drawn: each once, none left out."""
    sizes: Counter[str] = Counter()
    for event in history:
        if event["event"] != "drawn":
            continue
        for group in event["groups"]:
            if group in sizes:
                accounts.problems.append(f"{group} was drawn twice")
            sizes[group] = event["samples"]
    missing = set(range(len(sizes))) - {int(group) for group in sizes}
    accounts.problems += [f"draw {number} is missing" for number in sorted(missing)]
    accounts.samples["drawn"] = sum(sizes.values())
    return sizes


def _settle(history: list[Event], sizes: Counter[str], accounts: Accounts) -> None:
    """Step by step: what was drawn or carried in is trained, dropped or carried out, and nothing else is."""
    by_step: dict[int, dict[str, list[Event]]] = {}
    for event in history:
        by_step.setdefault(event["step"], {}).setdefault(event["event"], []).append(event)
    carried: list[str] = []
    trained: Counter[str] = Counter()
    for step in sorted(by_step):
        events = by_step[step]
        accounts.samples["again"] += _count(events.get("again", []), sizes)
        came = carried + [group for event in events.get("drawn", []) for group in event["groups"]]
        if "trained" not in events:
            accounts.samples["ahead"] += sum(sizes[group] for group in came if group not in carried)
            continue
        accounts.steps += 1
        if step != accounts.steps or len(events["trained"]) > 1 or len(events["selected"]) != 1:
            accounts.problems.append(f"step {step} was not trained once and in its turn")
        (selected,) = events["selected"][-1:]
        dropped = [group for groups in selected["dropped"].values() for group in groups]
        learned = events["trained"][-1]["groups"]
        carried = selected["carried"]
        if Counter(came) != Counter(learned) + Counter(dropped) + Counter(carried):
            accounts.problems.append(f"step {step} did not part what came into trained, dropped and carried")
        if learned != selected["kept"]:
            accounts.problems.append(f"step {step} did not learn from what it kept")
        trained.update(learned)
        accounts.samples["dropped"] += sum(sizes[group] for group in dropped)
    accounts.problems += [f"{group} was trained {n} times" for group, n in trained.items() if n > 1]
    accounts.samples["trained"] = sum(sizes[group] for group in trained)
    accounts.samples["carried"] = sum(sizes[group] for group in carried)
    settled = sum(accounts.samples[name] for name in ("trained", "dropped", "carried", "ahead"))
    if settled != accounts.samples["drawn"]:
        accounts.problems.append(f"{accounts.samples['drawn']} samples were drawn, {settled} are settled")


def _count(events: list[Event], sizes: Counter[str]) -> int:
    return sum(sizes[group] for event in events for group in event["groups"])


def _compare(rollouts: Path, history: list[Event], sizes: Counter[str], accounts: Accounts) -> None:
    """Every sample of every group that a step looked at is recorded, under the same verdict."""
    for event in history:
        if event["event"] != "selected":
            continue
        verdicts = dict.fromkeys(event["kept"], "kept") | dict.fromkeys(event["carried"], "carried")
        for reason, groups in event["dropped"].items():
            verdicts |= dict.fromkeys(groups, reason)
        expected = {(g, i): verdict for g, verdict in verdicts.items() for i in range(sizes[g])}
        path = rollouts / f"step_{event['step']:06d}.parquet"
        rows = pq.read_table(path, columns=["group", "sample_index", "verdict"]).to_pylist()
        recorded = {(row["group"], row["sample_index"]): row["verdict"] for row in rows}
        if recorded != expected or len(rows) != len(expected):
            accounts.problems.append(f"{path.name} does not hold what the ledger says")
