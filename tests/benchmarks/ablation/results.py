"""What one run leaves behind: curves over generated tokens and how often switches fired, as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algorithms.config import Aggregation
from rlhf.algorithms.overlong import penalty
from rlhf.batching import mini_batches
from rlhf.config import Config
from rlhf.files import replace_text
from rlhf.tracking import jsonl
from rollout import recorder
from rollout.types import Group
from tests.benchmarks.ablation.arms import AGGREGATION, CLIP, OVERLONG, SAMPLING, fingerprint, relevant

TOLERANCE = 0.05
"""A token's weight differs when it is off by more than this share."""

CURVES = {
    "entropy": "policy/entropy",
    "length": "length/mean",
    "truncated": "length/truncated",
    "training accuracy": "train/accuracy",
}
"""Curve -> metric of a step."""


@dataclass(slots=True, kw_only=True)
class Result:
    """One finished run of one arm."""

    arm: str
    seed: int
    recipe: str
    hash: str
    """Fingerprint of `config`."""
    commit: str
    minutes: float
    """Wall clock of training, evaluations included."""
    budget: int
    """Generated tokens at which accuracies are compared (`loop.max_tokens`)."""
    problems: int
    """Held-out problems of an evaluation."""
    optimizer_steps: int
    tokens: list[int]
    """Tokens generated until the end of each step."""
    curves: dict[str, list[float | None]]
    """One value a step; None where the step measured none."""
    evaluated_at: list[int]
    """Tokens generated before each evaluation."""
    accuracies: list[float]
    fired: dict[str, tuple[int, int]]
    """Switch -> (times that it made, or would make, a difference; of how many)."""
    config: dict[str, Any]
    """Everything that decides what the run learns, resolved."""

    def accuracy_at(self, tokens: float) -> float:
        """Held-out accuracy after `tokens` generated tokens, between two evaluations by a straight line."""
        return interpolate(self.evaluated_at, self.accuracies, tokens)

    def accuracy_over(self, start: float, end: float) -> float:
        """Mean held-out accuracy from `start` to `end` generated tokens, along the same straight lines."""
        inside = [tokens for tokens in self.evaluated_at if start < tokens < end]
        at = [start, *inside, end]
        values = [self.accuracy_at(tokens) for tokens in at]
        areas = [(b - a) * (u + v) / 2 for a, b, u, v in zip(at, at[1:], values, values[1:])]
        return sum(areas) / (end - start)

    def write(self, folder: Path) -> Path:
        """Write `<arm>-seed<n>.json`; it appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = path_of(folder, self.arm, self.seed)
        lines = [
            f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in dataclasses.asdict(self).items()
        ]
        replace_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
        return path


def path_of(folder: Path, arm: str, seed: int) -> Path:
    """Where the result of a run lies."""
    return folder / f"{arm}-seed{seed}.json"


def read(path: Path) -> Result | None:
    """The result in a file; None without the file. Raises `ValueError` for one that holds no result."""
    if not path.is_file():
        return None
    try:
        found = Result(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result of the ablation ({error}): remove it.") from None
    found.fired = {name: (count, total) for name, (count, total) in found.fired.items()}
    return found


def interpolate(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """`y` at `at` by straight lines between ascending `x`. Raises `ValueError` outside of them: nothing is
    extrapolated."""
    if not x or not x[0] <= at <= x[-1]:
        ends = f"{x[0]:g} to {x[-1]:g}" if x else "nowhere"
        raise ValueError(f"asked for a value at {at:g}, and values reach from {ends}.")
    for (x0, y0), (x1, y1) in zip(zip(x, y), zip(x[1:], y[1:])):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0) if x1 > x0 else y1
    return y[-1]


# ---------------------------------------------------------------- a run's folder -> its result


def summarize(folder: Path, config: Config, *, arm: str, recipe: str, dapo: Config, commit: str) -> Result:
    """Read the folder of a finished run.

    `dapo` is the full recipe: an arm without a switch counts where it would have acted.
    """
    rows = jsonl.read(folder / jsonl.METRICS)
    steps = [row for row in rows if row["step"] > 0]
    evaluations = [row for row in rows if "eval/accuracy" in row]
    values = relevant(config)
    return Result(
        arm=arm,
        seed=config.run.seed,
        recipe=recipe,
        hash=fingerprint(values),
        commit=commit,
        minutes=round(rows[-1]["time/elapsed"] / 60, 2),
        budget=config.loop.max_tokens,
        problems=int(evaluations[-1]["eval/prompts"]),
        optimizer_steps=int(max(row.get("learner/optimizer_steps", 0) for row in steps)),
        tokens=[int(row["train/tokens"]) for row in steps],
        curves={name: [_rounded(row.get(metric)) for row in steps] for name, metric in CURVES.items()},
        evaluated_at=[int(row.get("train/tokens", 0)) for row in evaluations],
        accuracies=[round(row["eval/accuracy"], 5) for row in evaluations],
        fired=count_fired(steps, folder / "rollouts", config, dapo),
        config=values,
    )


def count_fired(
    steps: Sequence[Mapping[str, float]], rollouts: Path, config: Config, dapo: Config
) -> dict[str, tuple[int, int]]:
    """How often each switch of DAPO made a difference in the run, or would have made one where it is off."""
    groups = {int(row["step"]): recorder.read(rollouts, int(row["step"])) for row in steps}
    kept = {step: [g for g in found if g.verdict == "kept"] for step, found in groups.items()}
    learned = {
        step: sum(len(t.response_ids) for g in found for t in g.trajectories) for step, found in kept.items()
    }
    clipped = (
        "policy/clip_spared" if config.algorithm.clip.high > config.algorithm.clip.low else "policy/clip_high"
    )
    offered = sum(int(row["selection/offered"]) for row in steps)
    constant = sum(round(row["selection/zero_variance"] * row["selection/offered"]) for row in steps)
    lengths = [len(t.response_ids) for found in groups.values() for g in found for t in g.trajectories]
    return {
        CLIP: (
            _at_least_one([row.get(clipped, 0.0) * learned[int(row["step"])] for row in steps]),
            sum(learned.values()),
        ),
        SAMPLING: (constant, offered),
        AGGREGATION: count_reweighed(list(kept.values()), config, dapo),
        OVERLONG: (count_overlong(lengths, dapo), len(lengths)),
    }


def count_overlong(lengths: Sequence[int], dapo: Config) -> int:
    """Responses that the full recipe's penalty meets."""
    limit, buffer = dapo.rollout.max_new_tokens, dapo.algorithm.overlong.buffer
    return sum(penalty(length, limit, buffer) < 0 for length in lengths)


def count_reweighed(rollouts: Sequence[Sequence[Group]], config: Config, dapo: Config) -> tuple[int, int]:
    """Tokens learned from whose weight in the loss is another than under the mode compared with, of all.

    That mode is the full recipe's, and for an arm that has it already, GRPO's. A factor that all tokens of
    the run share makes no difference: an optimizer like Adam does not see it. So weights are divided by
    their mean over the run first.
    """
    other = dapo.algorithm.aggregation
    if other is config.algorithm.aggregation:
        other = Aggregation.seq_mean_token_mean
    lengths, ours = _weights(rollouts, config, config.algorithm.aggregation)
    _, theirs = _weights(rollouts, config, other)
    total = sum(lengths)
    if not total:
        return 0, 0
    scale = sum(n * w for n, w in zip(lengths, theirs)) / sum(n * w for n, w in zip(lengths, ours))
    differing = sum(
        n for n, a, b in zip(lengths, ours, theirs) if not math.isclose(a * scale, b, rel_tol=TOLERANCE)
    )
    return differing, total


def _weights(
    rollouts: Sequence[Sequence[Group]], config: Config, mode: Aggregation
) -> tuple[list[int], list[float]]:
    """Length and weight of a token of every response learned from, under `mode`."""
    algorithm = dataclasses.replace(config.algorithm, aggregation=mode)
    limit = config.rollout.max_new_tokens
    batches = [mini_batches(groups, algorithm, config.loop, limit) for groups in rollouts]
    rows = [row for made in batches for row in made.rows]
    return [len(row.response_ids) for row in rows], [row.token_weights[0] for row in rows]


def _at_least_one(counts: Sequence[float]) -> int:
    """Their sum in whole tokens; never 0 when some share was above 0."""
    total = math.fsum(counts)
    return max(1, round(total)) if total > 0 else 0


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 5)
