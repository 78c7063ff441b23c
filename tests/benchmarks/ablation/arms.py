"""What is compared: a recipe, the arms as overrides of it, and what makes a cached result still valid."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.compose import load, to_dict
from rlhf.config import Config
from rlhf.tracking.base import flatten

RECIPE = "dapo/ablation"

CLIP, SAMPLING, AGGREGATION, OVERLONG = "clip-higher", "dynamic sampling", "token weights", "overlong penalty"
SWITCHES = (CLIP, SAMPLING, AGGREGATION, OVERLONG)
"""DAPO's four parts, as rows name them."""

_SYMMETRIC = "algorithm.clip.high=0.2"
_UNFILTERED = "algorithm.dynamic_sampling.enabled=false"
_BY_RESPONSE = "algorithm.aggregation=seq_mean_token_mean"
_UNSHAPED = "algorithm.overlong.buffer=0"


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the table."""

    name: str
    """As `--arms` takes it; part of file names."""
    title: str
    overrides: tuple[str, ...]
    switches: tuple[str, ...]
    """Which of `SWITCHES` set it apart, and whose activity its row shows."""
    paper: float | None = None
    """AIME 2024 avg@32 of the same configuration in DAPO's Table 1, in percent."""


ARMS = (
    Arm("dapo", "DAPO, all four parts", (), SWITCHES, 50),
    Arm("no_clip_higher", "without clip-higher", (_SYMMETRIC,), (CLIP,)),
    Arm("no_dynamic_sampling", "without dynamic sampling", (_UNFILTERED,), (SAMPLING,), 42),
    Arm(
        "no_token_level", "without token-level loss (`seq_mean_token_mean`)", (_BY_RESPONSE,), (AGGREGATION,)
    ),
    Arm("no_overlong", "without overlong penalty", (_UNSHAPED,), (OVERLONG,)),
    Arm("grpo", "plain GRPO, none of them", (_SYMMETRIC, _UNFILTERED, _BY_RESPONSE, _UNSHAPED), SWITCHES, 30),
    *(
        Arm(mode, f"DAPO with `{mode}`", (f"algorithm.aggregation={mode}",), (AGGREGATION,))
        for mode in ("token_mean_group", "seq_mean_token_sum", "seq_mean_token_sum_norm")
    ),
)
BY_NAME = {arm.name: arm for arm in ARMS}

IRRELEVANT = ("run.name", "run.dir", "resume", "tracking.*", "checkpoint.*")
"""Keys, `*` for any text, that do not change what a run learns."""


def resolve(recipe: str, arm: Arm, seed: int, overrides: tuple[str, ...] = ()) -> Config:
    """The checked configuration of one run: the recipe, `overrides` for every arm, then the arm's own."""
    return load(recipe, [*overrides, *arm.overrides, f"run.seed={seed}"])


def relevant(config: Config) -> dict[str, Any]:
    """Dotted key -> value of everything that decides what a run learns, `run.seed` among it."""
    flat = flatten(to_dict(config))
    return {k: v for k, v in flat.items() if not any(fnmatch.fnmatchcase(k, p) for p in IRRELEVANT)}


def fingerprint(values: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the values, whatever their order."""
    text = json.dumps(dict(sorted(values.items())), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def still_valid(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a run of the configuration `recorded` may stand for one of `now`.

    Every recorded value must be unchanged. A key that is new since may only stand at its default, which
    leaves an old run as it was.
    """
    defaults = relevant(Config())
    added = {key: value for key, value in now.items() if key not in recorded}
    unchanged = fingerprint(recorded) == fingerprint({key: now.get(key, "(gone)") for key in recorded})
    return unchanged and all(key in defaults and defaults[key] == value for key, value in added.items())
