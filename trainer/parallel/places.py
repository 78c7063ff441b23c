"""`Place`: room for one actor in a Ray cluster. Importable without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

TOUCH = 0.001
"""How much a place takes of a custom resource that only says where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one actor takes of its node."""

    what: str
    """What will be there, for sentences: `engine`."""
    cpus: int
    gpus: int = 0
    where: str = ""
    """A custom resource that its node must have; empty: any node."""

    def bundle(self) -> dict[str, float]:
        """As Ray wants it."""
        taken = {"CPU": float(self.cpus)}
        if self.gpus:
            taken["GPU"] = float(self.gpus)
        if self.where:
            taken[self.where] = TOUCH
        return taken


@contextmanager
def needs_ray(key: str, instead: str) -> Iterator[None]:
    """Import what wraps Ray inside this: without Ray, ValueError names `key` and what to set `instead`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError(
            f"{key} needs the package ray, which is not installed: pip install 'ray==2.60.*', or use "
            f"{instead}."
        ) from None
