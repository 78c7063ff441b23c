"""Looks at what the learner is about to publish, beside what it published last.

Hashes prove that what was sent arrived. They cannot know that two tensors were sent under each other's names,
or that one was exported from before the update; in bfloat16 nor can log-probs, for rounding moves them as
much as one update at learning rate 1e-5 does. Weights can: an update moves a tensor by a ten-thousandth of
the distance to another.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from rollout.weights.errors import listed

COLUMNS = 32
"""Columns of each matrix that are remembered."""
MOVED = 1e-3
"""A tensor that moved by more than this share of its norm is compared with all others of its shape."""
NEARER = 0.25
"""Another's old weights must be this much nearer than its own for a tensor to count as taken from there."""
ENOUGH = 32
"""Values that must have changed in the median sibling before one without any change counts as stale."""


@dataclass(slots=True, kw_only=True)
class Change:
    """How a publish differs from the one before."""

    moved: dict[str, float] = field(default_factory=dict)
    """Distance of each tensor from its last version, as a share of that version's norm."""
    unchanged: int = 0
    """Tensors none of whose remembered values changed."""
    problems: list[str] = field(default_factory=list)
    """What cannot be meant, each naming its tensors."""
    bands: dict[str, Tensor] = field(default_factory=dict)
    """What `SourceWatch.keep` remembers of this version."""
    changed: set[str] = field(default_factory=set)
    """Tensors that changed."""

    def most(self, count: int) -> list[str]:
        """Names of the tensors that moved most."""
        return sorted(self.moved, key=lambda name: -self.moved[name])[:count]


class SourceWatch:
    """Remembers a band of every tensor of the last version."""

    def __init__(self, frozen: Collection[str] | None = None) -> None:
        """`frozen`: tensors that training never changes. None when that is not known: then only a tensor that
        has changed before can be found stale.
        """
        self._frozen = frozen
        self._bands: dict[str, Tensor] = {}
        self._alive: set[str] = set()

    def look(self, tensors: Mapping[str, Tensor]) -> Change:
        """Compare with the last version that was kept."""
        bands = {name: _band(tensor) for name, tensor in tensors.items()}
        change = Change(bands=bands)
        counts: dict[str, int] = {}
        for name, band in bands.items():
            old = self._bands.get(name)
            if old is None or old.shape != band.shape:
                continue
            counts[name] = int((band != old).sum())
            change.moved[name] = _distance(band, old) / max(float(old.norm()), 1e-12) if counts[name] else 0.0
        change.unchanged = sum(count == 0 for count in counts.values())
        change.problems = self._taken(bands, change.moved) + self._stale(counts)
        change.changed = {name for name, count in counts.items() if count}
        return change

    def keep(self, change: Change) -> None:
        """Remember the version that `change` describes: it is in force."""
        self._bands = change.bands
        self._alive |= change.changed

    def _taken(self, bands: Mapping[str, Tensor], moved: Mapping[str, float]) -> list[str]:
        """Tensors that hold what another one held."""
        found = []
        for name, distance in moved.items():
            if distance <= MOVED:
                continue
            own = _distance(bands[name], self._bands[name])
            others = [
                other
                for other, old in self._bands.items()
                if other != name and old.shape == bands[name].shape
            ]
            nearest = min(others, key=lambda other: _distance(bands[name], self._bands[other]), default=None)
            if nearest is not None and _distance(bands[name], self._bands[nearest]) < NEARER * own:
                found.append(f"{name} holds the weights of {nearest}")
        return found

    def _stale(self, counts: Mapping[str, int]) -> list[str]:
        """Tensors without any change, most of whose siblings (same place in other layers) changed."""
        siblings: dict[str, list[str]] = {}
        for name in counts:
            siblings.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
        stale = [
            name
            for names in siblings.values()
            if median(counts[name] for name in names) >= ENOUGH
            for name in names
            if counts[name] == 0
            and (name in self._alive if self._frozen is None else name not in self._frozen)
        ]
        if not stale:
            return []
        return [
            f"{listed(stale)} did not change since the last version, the same tensors of other layers did"
        ]


def _band(tensor: Tensor) -> Tensor:
    values = tensor.detach()
    return (values[:, :COLUMNS] if values.dim() == 2 else values).to(torch.float32, copy=True)


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other))
