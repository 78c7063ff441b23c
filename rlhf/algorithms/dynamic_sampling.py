"""Dynamic sampling: keep whole groups that teach something, draw again until enough are found.

A group whose responses are all equally right has zero advantages and teaches nothing (DAPO, section 3.2).
The filter reads the *raw* accuracy: a shaped reward differs inside an all-wrong group when lengths do,
and would give the shorter nonsense a positive advantage.

Groups are taken in the order in which they were submitted, never in that of completion, which would
prefer short responses. A step always ends: rounds are capped and running out of data is reported.

    selector.start(step)
    while selector.missing():
        draws = cursor.take(selector.draws())
        if not draws:
            selector.exhaust("the data ran out")
            break
        selector.offer(scored groups of these draws)
    selection = selector.finish()
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlhf.algorithms.config import DynamicSamplingConfig, Surplus, WhenExhausted
from rollout.types import FinishReason, Group, Prompt, Trajectory, VersionSpan

UNGRADED = frozenset({"ungraded", "gold_unparsable"})
"""Grade statuses that say nothing about the response. A hung or crashed grader scores a failure."""

CONSTANT = ("all_wrong", "all_right", "all_equal")
"""Reasons that say that every response is equally right."""
REASONS = (*CONSTANT, "ungraded", "stale", "surplus")
"""Every reason for which a group may go."""


@dataclass(slots=True, kw_only=True)
class Selection:
    """The outcome of one step."""

    groups: list[Group]
    """Groups to learn from, oldest first: as many as wanted, or fewer when `shortage` says why."""
    carried: list[Group]
    """Surplus kept for the next step."""
    dropped: list[Group]
    """Groups that went, the reason in `verdict`."""
    counts: dict[str, float]
    """Metrics, named `selection/...`."""
    shortage: str | None = None
    """A sentence for the user when there are fewer groups than wanted."""
    stop: bool = False
    """Whether the run should end for want of groups (`when_exhausted=stop`)."""


@dataclass(slots=True)
class _Step:
    """What one step has gathered so far."""

    accepted: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)
    offered: Counter[str] = field(default_factory=Counter)
    """Groups offered by reason, or `useful`."""
    rounds: int = 0
    carried_in: int = 0
    exhausted: str | None = None

    def drop(self, group: Group, reason: str) -> None:
        group.verdict = reason
        self.dropped.append(group)


class Selector:
    """Chooses the groups of each step; owns those carried from one step into the next."""

    def __init__(self, config: DynamicSamplingConfig, wanted_groups: int) -> None:
        """Want `wanted_groups` (at least 1) in every step."""
        if wanted_groups < 1:
            raise ValueError(
                f"a step of {wanted_groups} groups has nothing to learn from: ask for 1 or more."
            )
        self.config = config
        self.wanted = wanted_groups
        self._carried: list[Group] = []
        self._step: _Step | None = None

    def start(self, step: int) -> None:
        """Open the step that `step` published updates precede; carried groups come first, stale ones go."""
        if self._step is not None:
            raise ValueError("the last step was not finished: call finish() before start().")
        self._step = _Step()
        for group in self._carried:
            if step - group.born > self.config.max_age:
                self._step.drop(group, "stale")
            else:
                self._step.accepted.append(group)
        self._step.carried_in = len(self._step.accepted)

    def missing(self) -> int:
        """Groups still to be found; 0 when there are enough or when no further round may try."""
        step = self._current()
        if step.exhausted or step.rounds >= self.config.max_rounds:
            return 0
        return max(0, self.wanted - len(step.accepted))

    def draws(self) -> int:
        """Prompts to draw for the next round."""
        oversample = self.config.oversample if self.config.enabled else 1.0
        return math.ceil(self.missing() * oversample)

    def offer(self, groups: Sequence[Group]) -> None:
        """Take one round of scored groups, whole and in the order of submission."""
        step = self._current()
        step.rounds += 1
        for group in groups:
            reason = why_useless(group)
            step.offered[reason or "useful"] += 1
            if reason and self.config.enabled:
                step.drop(group, reason)
            else:
                step.accepted.append(group)

    def exhaust(self, why: str) -> None:
        """Say that no further round is possible, in a clause such as "the data ran out"."""
        self._current().exhausted = why

    def finish(self) -> Selection:
        """Close the step: the first groups wanted, and what became of the others."""
        step = self._current()
        self._step = None
        end = self.wanted if self.config.enabled else len(step.accepted)
        kept, surplus = step.accepted[:end], step.accepted[end:]
        for group in kept:
            group.verdict = "kept"
        self._carried = self._carry(step, surplus)
        shortage = self._shortage(step, len(kept))
        return Selection(
            groups=kept,
            carried=[replace(group) for group in self._carried],  # their verdicts change in later steps
            dropped=step.dropped,
            counts=self._counts(step, len(kept)),
            shortage=shortage,
            stop=shortage is not None and self.config.when_exhausted is WhenExhausted.stop,
        )

    def copy(self) -> Selector:
        """One that carries the same groups; steps of either leave the other. Raises ValueError in a step."""
        self._refuse_open_step("copy")
        other = Selector(self.config, self.wanted)
        other._carried = [replace(group) for group in self._carried]
        return other

    def state_dict(self) -> dict[str, Any]:
        """The carried groups as plain data. Raises ValueError inside a step, whose rounds it cannot hold."""
        self._refuse_open_step("save")
        return {"carried": [asdict(group) for group in self._carried]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, also after a round trip through JSON."""
        self._step = None
        self._carried = [_group(plain) for plain in state["carried"]]

    def _refuse_open_step(self, doing: str) -> None:
        if self._step is not None:
            raise ValueError(f"a step is open: {doing} the selector between finish() and start().")

    def _current(self) -> _Step:
        if self._step is None:
            raise ValueError("no step is open: call start() first.")
        return self._step

    def _carry(self, step: _Step, surplus: list[Group]) -> list[Group]:
        """Keep surplus groups for the next step, or drop them."""
        if self.config.surplus is Surplus.drop:
            for group in surplus:
                step.drop(group, "surplus")
            return []
        for group in surplus:
            group.verdict = "carried"
        return surplus

    def _shortage(self, step: _Step, kept: int) -> str | None:
        """What to tell the user when groups are missing."""
        if kept >= self.wanted:
            return None
        why = step.exhausted or f"the step was closed after {step.rounds} rounds"
        if not step.exhausted and step.rounds >= self.config.max_rounds:
            why = f"algorithm.dynamic_sampling.max_rounds={self.config.max_rounds} is reached"
        reasons = ", ".join(f"{count} {name}" for name, count in sorted(step.offered.items())) or "none"
        outcome = "The step goes on with what it has."
        if self.config.when_exhausted is WhenExhausted.stop:
            outcome = "The run stops (algorithm.dynamic_sampling.when_exhausted=stop)."
        return (
            f"Only {kept} of {self.wanted} groups were found and {why}; groups offered: {reasons}. {outcome}"
        )

    def _counts(self, step: _Step, kept: int) -> dict[str, float]:
        """Metrics: shares are of the groups offered in this step, the others are numbers of groups."""
        offered = step.offered.total()
        reasons = Counter(group.verdict for group in step.dropped)
        counts = {
            "offered": offered,
            "kept": kept,
            "missing": max(0, self.wanted - kept),
            "rounds": step.rounds,
            "carried_in": step.carried_in,
            "carried_out": len(self._carried),
            "acceptance": _share(step.offered["useful"], offered),
            "zero_variance": _share(sum(step.offered[name] for name in CONSTANT), offered),
            "all_wrong": _share(step.offered["all_wrong"], offered),
            "all_right": _share(step.offered["all_right"], offered),
        } | {f"dropped_{name}": reasons[name] for name in REASONS}
        return {f"selection/{name}": float(value) for name, value in counts.items()}


def why_useless(group: Group) -> str | None:
    """Why a group teaches nothing, or None when its accuracies differ.

    `ungraded`: some response has no meaningful accuracy. `all_wrong` (0), `all_right` (1) or `all_equal`
    (between, for graded accuracies): compared exactly, as a standard deviation of equal floats may leave
    a residue.
    """
    if any(_ungraded(trajectory) for trajectory in group.trajectories):
        return "ungraded"
    values = {trajectory.accuracy for trajectory in group.trajectories}
    if len(values) > 1:
        return None
    return {frozenset({0.0}): "all_wrong", frozenset({1.0}): "all_right"}.get(frozenset(values), "all_equal")


def _ungraded(trajectory: Trajectory) -> bool:
    aborted = trajectory.finish_reason is FinishReason.ABORT
    return aborted or trajectory.grade_status in UNGRADED or not math.isfinite(trajectory.accuracy)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _group(plain: dict[str, Any]) -> Group:
    """A group from `dataclasses.asdict`, JSON's lists and strings turned back into our types."""
    trajectories = [_trajectory(item) for item in plain["trajectories"]]
    return Group(**{**plain, "prompt": Prompt(**plain["prompt"]), "trajectories": trajectories})


def _trajectory(plain: dict[str, Any]) -> Trajectory:
    return Trajectory(
        **{
            **plain,
            "finish_reason": FinishReason(plain["finish_reason"]),
            "version_spans": [VersionSpan(**span) for span in plain["version_spans"]],
            "step_spans": [(start, end) for start, end in plain["step_spans"]],
        }
    )
