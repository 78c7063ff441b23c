"""`Cursor`: the order in which prompts are drawn, a function of the seed alone, resumable exactly."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class Pick:
    """One draw."""

    source: str
    index: int
    """Which prompt of the source, `0..size-1`."""
    epoch: int
    """Which pass over the source, from 0."""
    serial: int
    """How many draws came before it in the run; unique, so it can name the group."""


class Cursor:
    """Draws prompts from a weighted mixture of sources.

    Each source is walked in a fresh permutation every epoch. Which source comes next is not left to chance:
    it is the one that lags furthest behind its share, so after `n` draws each has `n * share` within less
    than one draw for two sources (a few for many), and every batch holds the mixture.
    All state is three kinds of counters.

    `sizes` and `weights` are by source name; `epochs` 0 never ends. Sources that have run out leave their
    share to the others. Raises ValueError when there is nothing to draw.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        seed: int,
        weights: Mapping[str, float] | None = None,
        epochs: int = 0,
    ) -> None:
        empty = [name for name, size in sizes.items() if size < 1]
        if empty or not sizes:
            raise ValueError(
                f"source '{empty[0]}' has no prompts to draw." if empty else "there are no sources."
            )
        self._sizes = dict(sizes)
        self._weights = {name: float((weights or {}).get(name, 1.0)) for name in sizes}
        self._seed = seed
        self._epochs = epochs
        self._drawn = dict.fromkeys(sizes, 0)
        self._credit = dict.fromkeys(sizes, 0.0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    @property
    def consumed(self) -> int:
        """Prompts drawn so far."""
        return sum(self._drawn.values())

    @property
    def consumed_by_source(self) -> dict[str, int]:
        """Prompts drawn so far, by source."""
        return dict(self._drawn)

    @property
    def epoch(self) -> float:
        """Passes over all training prompts, fractional."""
        return self.consumed / sum(self._sizes.values())

    @property
    def exhausted(self) -> bool:
        """Whether the next draw gives nothing."""
        return not self._open()

    def draw(self, count: int) -> list[Pick]:
        """The next `count` prompts; fewer, in the end none, when the epochs run out."""
        picks: list[Pick] = []
        while len(picks) < count and (sources := self._open()):
            picks.append(self._take(self._next_source(sources)))
        return picks

    def copy(self) -> Cursor:
        """One that stands at the same place; drawing from either leaves the other."""
        other = copy.copy(self)
        other._drawn, other._credit = dict(self._drawn), dict(self._credit)
        other._orders = dict(self._orders)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later `load_state_dict` needs, as plain values."""
        return {
            "sizes": dict(self._sizes),
            "seed": self._seed,
            "drawn": dict(self._drawn),
            "credit": dict(self._credit),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken. Raises `UserError` when data or seed are not the same."""
        if state["sizes"] != self._sizes:
            raise UserError(
                f"the checkpoint was made with prompts {state['sizes']} and the data now give {self._sizes}: "
                f"restore the data, or start a new run."
            )
        if state["seed"] != self._seed:
            raise UserError(
                f"the checkpoint was made with run.seed={state['seed']}: set it, or start a new run."
            )
        self._drawn = dict(state["drawn"])
        self._credit = dict(state["credit"])

    def _open(self) -> list[str]:
        """Sources that still have something to draw."""
        return [
            n for n, size in self._sizes.items() if not self._epochs or self._drawn[n] < self._epochs * size
        ]

    def _next_source(self, sources: list[str]) -> str:
        """Smooth weighted round robin: all gain their share, the richest pays one."""
        total = sum(self._weights[name] for name in sources)
        for name in sources:
            self._credit[name] += self._weights[name] / total
        chosen = max(sources, key=lambda name: self._credit[name])
        self._credit[chosen] -= 1.0
        return chosen

    def _take(self, source: str) -> Pick:
        serial = self.consumed
        epoch, position = divmod(self._drawn[source], self._sizes[source])
        self._drawn[source] += 1
        return Pick(source, self._order(source, epoch)[position], epoch, serial)

    def _order(self, source: str, epoch: int) -> list[int]:
        """The permutation of one source in one epoch; the current one is kept."""
        held = self._orders.get(source)
        if held is None or held[0] != epoch:
            digest = hashlib.blake2b(f"{self._seed}/{source}/{epoch}".encode(), digest_size=8).digest()
            order = list(range(self._sizes[source]))
            random.Random(int.from_bytes(digest, "big")).shuffle(order)
            held = self._orders[source] = (epoch, order)
        return held[1]
