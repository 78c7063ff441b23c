"""`Replay`: a step that was learned again, beside what its run recorded, and whether both agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEARNED = ("policy", "mismatch", "learner")
"""Sections of the metrics that learning alone decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two sets of tensors with the same names."""

    tensors: int
    different: int
    """Tensors that are not equal to the last bit."""
    distance: float
    """2-norm of the difference over all tensors together."""
    worst: str
    """Where the largest difference is; empty when there is none."""

    @property
    def equal(self) -> bool:
        """Whether every bit is the same."""
        return not self.different


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replayed step came to."""

    name: str
    """`RUN@STEP`."""
    changes: list[str]
    """Keys that were changed."""
    groups: int
    responses: int
    metrics: Mapping[str, float]
    """What learning measured now."""
    recorded: Mapping[str, float]
    """What the run logged of the step; empty when it did not finish it."""
    update: Comparison
    """Weights after against weights before."""
    unsaved: str
    """Why there is no saved state to compare with; empty when there is."""
    recorded_update: Comparison | None
    """The run's own weights after against before."""
    saved: Mapping[str, Comparison]
    """Replayed against saved state after the step: `weights` and `optimizer`."""

    @property
    def rows(self) -> list[tuple[str, float | None, float | None]]:
        """Every metric that learning decides: name, replayed, recorded; None where there is none."""
        names = {name for name in self.recorded if name.partition("/")[0] in LEARNED} | set(self.metrics)
        recorded = self.recorded
        return [(name, self.metrics.get(name), recorded.get(name)) for name in sorted(names)]

    @property
    def different(self) -> list[str]:
        """Metrics and parts of the state that are not the recorded ones."""
        odd = [name for name, now, then in self.rows if not _same(now, then)] if self.recorded else []
        return odd + [part for part, comparison in self.saved.items() if not comparison.equal]

    @property
    def status(self) -> int:
        """Exit status: 0 when equal or when something was changed on purpose, else 1."""
        proven = bool(self.recorded or self.saved) and not self.different
        return 0 if self.changes or proven else 1

    def text(self) -> str:
        """The report."""
        head = f"{self.name} learned again: {self.groups} groups, {self.responses} responses"
        changes = [f"changed: {change}" for change in self.changes]
        return "\n".join([head, *changes, "", *self._update(), "", *self._table(), "", self._verdict()])

    def _update(self) -> Iterator[str]:
        """Norm of the update, and how far the state is from the saved one."""
        then = f", recorded {self.recorded_update.distance:.6g}" if self.recorded_update else ""
        yield f"norm of the update: {self.update.distance:.6g}{then}"
        if self.unsaved:
            yield self.unsaved
        for part, found in self.saved.items():
            if found.equal:
                yield f"{part}: all {found.tensors} tensors are the saved ones, bit for bit"
            else:
                yield (
                    f"{part}: {found.different} of {found.tensors} tensors are not the saved ones, distance "
                    f"{found.distance:.6g}{self._share(part)}, largest in {found.worst}"
                )

    def _share(self, part: str) -> str:
        """How large the distance of the weights is beside the recorded update, in brackets."""
        moved = self.recorded_update.distance if self.recorded_update and part == "weights" else 0.0
        return f" ({self.saved[part].distance / moved:.2%} of the recorded update)" if moved else ""

    def _table(self) -> Iterator[str]:
        """Metrics side by side."""
        width = max(len(name) for name, _, _ in self.rows)
        yield f"{'metric':{width}}  {'replayed':>14}  {'recorded':>14}  {'difference':>11}"
        for name, now, then in self.rows:
            both = now is not None and then is not None and not _same(now, then)
            gap = f"{now - then:+11.3g}" if both and now is not None and then is not None else f"{'':11}"
            yield f"{name:{width}}  {_shown(now):>14}  {_shown(then):>14}  {gap}".rstrip()

    def _verdict(self) -> str:
        if not self.recorded and not self.saved:
            return "The run recorded nothing of this step's update: there is nothing to compare with."
        if not self.different:
            return "The same update, bit for bit."
        if self.changes:
            return f"Another update: {len(self.different)} of the numbers above differ."
        return (
            f"NOT the same update: {', '.join(self.different)} differ. Other versions, threads or processors "
            f"add in another order: environment.json has the run's."
        )


def tensors_of(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """A copy of every tensor in nested dictionaries and lists, on the CPU, by its path."""
    if isinstance(state, Tensor):
        return {prefix: state.detach().cpu().clone()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= tensors_of(value, f"{prefix}/{key}" if prefix else str(key))
    return found


def compare(ours: Any, theirs: Any) -> Comparison:
    """Compare nested containers of tensors. A tensor that only one side has counts as different."""
    one, other = tensors_of(ours), tensors_of(theirs)
    gaps: dict[str, float] = {}
    for name in sorted({*one, *other}):
        if name not in one or name not in other or one[name].shape != other[name].shape:
            gaps[name] = math.inf
        elif not torch.equal(one[name], other[name]):
            gaps[name] = (one[name].double() - other[name].double()).norm().item()
    return Comparison(
        tensors=len({*one, *other}),
        different=len(gaps),
        distance=math.hypot(*gaps.values()),
        worst=max(gaps, key=lambda name: gaps[name], default=""),
    )


def _same(now: float | None, then: float | None) -> bool:
    if now is None or then is None:
        return now is then
    return now == then or (math.isnan(now) and math.isnan(then))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.8g}"
