"""The `Tracker` protocol, the registry of trackers, and `Trackers`, which drives all of a run's.

What a failing tracker does to a run is decided here, once:
- A tracker that cannot *start* stops the run: nothing is lost yet, and it was asked for.
- Later, `metrics.jsonl` is the record of the run (the report reads it): an error in writing it is raised.
- Any other tracker that fails later is warned about once by name, counted in `tracking/failures`, and tried
  again at the next step: a network that returns is used, a network that is gone costs no training.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.errors import UserError
from rlhf.tracking.config import ALWAYS, TrackingConfig
from rollout.types import Group, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Continued:
    """What a tracker is told when a run goes on."""

    step: int
    """The last step that counts; what was logged after it is void. -1: nothing counts."""
    run_id: str = ""
    """The tracker's own `run_id` before; empty when it has none."""


class Tracker(Protocol):
    """Where a run's numbers go. Every tracker is built from the `TrackingConfig` alone.

    One whose service names runs has a text attribute `run_id`: it is kept in checkpoints.
    """

    def start(self, config: dict[str, Any], folder: Path, continued: Continued | None = None) -> None:
        """Begin a run, or go on with it: its resolved configuration and its folder, which exists."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one step's metrics, all of them at once; `step` 0 is before training."""
        ...

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """Show a few of the step's scored responses. Called only on steps that show some."""
        ...

    def close(self) -> None:
        """Write out everything and let go; safe to call twice."""
        ...


Factory = Callable[[TrackingConfig], Tracker]


@dataclass(frozen=True, slots=True)
class _Shipped:
    """A tracker of ours: imported only when asked for, with the package that it wraps."""

    module: str
    name: str
    package: str | None = None

    def __call__(self, config: TrackingConfig) -> Tracker:
        if self.package is not None and not installed(self.package):
            raise UserError(
                f"the tracker {self.package} needs the package {self.package}, which is not installed: run "
                f"`pip install {self.package}`, or take it out of tracking.names."
            )
        tracker: Tracker = getattr(importlib.import_module(self.module), self.name)(config)
        return tracker


_FACTORIES: dict[str, Factory] = {
    "console": _Shipped("rlhf.tracking.console", "ConsoleTracker"),
    "jsonl": _Shipped("rlhf.tracking.jsonl", "JsonlTracker"),
    "tensorboard": _Shipped("rlhf.tracking.tensorboard", "TensorBoardTracker", "tensorboard"),
    "wandb": _Shipped("rlhf.tracking.wandb", "WandbTracker", "wandb"),
    "mlflow": _Shipped("rlhf.tracking.mlflow", "MlflowTracker", "mlflow"),
    "trackio": _Shipped("rlhf.tracking.trackio", "TrackioTracker", "trackio"),
}


def register(name: str, factory: Factory) -> None:
    """Make `tracking.names=[name]` build `factory(config)`. Raises `ValueError` when the name is taken."""
    if name in _FACTORIES:
        raise ValueError(f"a tracker '{name}' is registered already: choose another name.")
    _FACTORIES[name] = factory


def installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of its name (wandb leaves `./wandb`) is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def build(config: TrackingConfig) -> Trackers:
    """The run's trackers: the three that always run, then those in `tracking.names`.

    Imports what the names ask for, so that a missing package is found before any model is loaded. Raises
    `UserError` for an unknown name or a package that is not installed.
    """
    names = dict.fromkeys([*ALWAYS, *config.names])
    for name in names:
        if name not in _FACTORIES:
            raise UserError(
                f"tracking.names asks for '{name}', which is no tracker: choose from {', '.join(_FACTORIES)}."
            )
    return Trackers(config, {name: _FACTORIES[name](config) for name in names})


class Trackers:
    """All trackers of a run behind the one protocol. Use as `with build(config) as trackers`, or close it."""

    def __init__(self, config: TrackingConfig, members: dict[str, Tracker]) -> None:
        """Drive `members` in order."""
        self._config = config
        self._members = members
        self.failures: dict[str, int] = {}
        """Failed calls by tracker."""

    def start(
        self,
        config: dict[str, Any],
        folder: Path,
        step: int | None = None,
        run_ids: Mapping[str, str] | None = None,
    ) -> None:
        """Start every tracker; the first that cannot start raises `UserError` after the others are closed.

        Of a resumed run, `step` is the last that counts and `run_ids` what `run_ids()` gave.
        """
        for name, member in self._members.items():
            continued = None if step is None else Continued(step, (run_ids or {}).get(name, ""))
            try:
                member.start(config, folder, continued)
            except Exception as error:
                self.close()
                raise UserError(
                    f"the tracker {name} cannot start ({_said(error)}): mend it, or take it out of "
                    f"tracking.names."
                ) from error

    def run_ids(self) -> dict[str, str]:
        """What trackers call this run, by tracker; those without a name for it are left out."""
        found = {name: str(getattr(member, "run_id", "")) for name, member in self._members.items()}
        return {name: run_id for name, run_id in found.items() if run_id}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one step's metrics to every tracker, `tracking/failures` included once there are some."""
        failed = sum(self.failures.values())
        numbers = {**metrics, "tracking/failures": float(failed)} if failed else dict(metrics)
        self._each("log", step, numbers)

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """Show a few responses on every `tracking.completions_every`-th step; on other steps do nothing."""
        every = self._config.completions_every
        if every and step % every == 0 and groups:
            self._each("completions", step, groups)

    def close(self) -> None:
        """Close every tracker, also after others have failed, and say how many calls failed."""
        self._each("close")
        if self.failures:
            counts = ", ".join(f"{name} {count}" for name, count in self.failures.items())
            logger.warning("Tracker calls that failed: %s.", counts)

    def __enter__(self) -> Trackers:
        """Nothing but self: `start` needs the configuration."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close all."""
        self.close()

    def _each(self, method: str, *arguments: Any) -> None:
        for name, member in self._members.items():
            try:
                getattr(member, method)(*arguments)
            except Exception as error:
                if name == "jsonl":
                    raise
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        if name not in self.failures:
            logger.warning("Tracker %s failed (%s); the run goes on without it for now.", name, _said(error))
        self.failures[name] = self.failures.get(name, 0) + 1


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---------------------------------------------------------------- what several trackers share


@dataclass(frozen=True, slots=True)
class Shown:
    """One completion as trackers show it."""

    prompt: str
    response: str
    answer: str | None
    reward: float
    accuracy: float
    verdict: str
    """What selection did with its group."""

    COLUMNS = ("prompt", "response", "answer", "reward", "accuracy", "verdict")

    def cells(self) -> list[str | float]:
        """The values of `COLUMNS`."""
        return [self.prompt, self.response, self.answer or "", self.reward, self.accuracy, self.verdict]


def choose(groups: Sequence[Group], count: int) -> list[Shown]:
    """`count` completions of as many groups, spread evenly: in turn a best and a worst one by reward.

    The same groups always give the same completions.
    """
    filled = [group for group in groups if group.trajectories]
    count = min(count, len(filled))
    picked = [filled[index * len(filled) // count] for index in range(count)]
    return [_shown(group, best=index % 2 == 0) for index, group in enumerate(picked)]


def _shown(group: Group, best: bool) -> Shown:
    key = (lambda t: t.reward) if best else (lambda t: -t.reward)
    chosen: Trajectory = max(group.trajectories, key=key)
    return Shown(
        prompt=group.prompt.text,
        response=chosen.text + ("…" if chosen.truncated else ""),
        answer=group.prompt.answer,
        reward=chosen.reward,
        accuracy=chosen.accuracy,
        verdict=group.verdict,
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`, for trackers that keep a flat table of parameters."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are finite numbers."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
