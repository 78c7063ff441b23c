"""What a step's experience looked like, as metrics: rewards, lengths, staleness, means over updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.types import Group, Trajectory, VersionSpan


def experience_metrics(
    generated: Sequence[Group], kept: Sequence[Group], step: int, version: int
) -> dict[str, float]:
    """`train/*`, `reward/*`, `length/*` over everything generated, `staleness/*` over what is learned from.

    `step` is the number of published updates; a group's age is `step - born`. `version` is the newest that
    was published; a token's age is `version` minus that of its span.
    """
    found: dict[str, float] = {}
    trajectories = [t for group in generated for t in group.trajectories]
    if trajectories:
        found |= _outcomes(trajectories) | _parts(trajectories) | _lengths(trajectories)
        found["length/prompt_mean"] = _mean([len(group.prompt.token_ids) for group in generated])
    ages = [step - group.born for group in kept]
    if ages:
        found |= {"staleness/mean": _mean(ages), "staleness/max": float(max(ages))}
        spans = [span for group in kept for t in group.trajectories for span in t.version_spans]
        found |= _token_ages(spans, version)
    return found


def mean_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """A rollout's optimizer steps as one: maxima stay maxima, counters are the last, the rest are means."""
    found: dict[str, float] = {}
    for name in {name for update in updates for name in update}:
        values = [update[name] for update in updates if name in update]
        if name.endswith("_max"):
            found[name] = max(values)
        elif name in ("learner/optimizer_steps", "learner/skipped_steps", "learner/lr"):
            found[name] = values[-1]
        elif name == "learner/tokens":
            found[name] = sum(values)
        else:
            found[name] = _mean(values)
    return found


def throughput(metrics: dict[str, float], times: dict[str, float]) -> dict[str, float]:
    """Tokens a second: generated over rollout seconds and over the step, learned over update seconds.

    Generation ahead of learning has its own clock, whose seconds are among the `metrics`.
    """
    found: dict[str, float] = {}
    generated = metrics.get("length/mean", 0.0) * metrics.get("train/responses", 0.0)
    seconds = {**metrics, **times}
    rollout = "time/rollout" if "time/rollout" in times else "ahead/rollout_seconds"
    for name, tokens, phase in [
        ("generated", generated, rollout),
        ("learned", metrics.get("learner/tokens", 0.0), "time/update"),
        ("total", generated, "time/step"),
    ]:
        if tokens and seconds.get(phase):
            found[f"throughput/{name}"] = tokens / seconds[phase]
    return found


def _outcomes(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    rewards = [t.reward for t in trajectories]
    return {
        "train/accuracy": _mean([t.accuracy for t in trajectories]),
        "train/reward": _mean(rewards),
        "train/reward_std": float(np.std(rewards)),
        "train/format": _mean([not t.truncated and t.extracted is not None for t in trajectories]),
        "train/responses": float(len(trajectories)),
    }


def _parts(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean and spread of each reward part, over the responses that have it."""
    found: dict[str, float] = {}
    for name in sorted({name for t in trajectories for name in t.rewards}):
        values = [t.rewards[name] for t in trajectories if name in t.rewards]
        found |= {f"reward/{name}_mean": _mean(values), f"reward/{name}_std": float(np.std(values))}
    return found


def _lengths(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    lengths = np.array([len(t.response_ids) for t in trajectories], dtype=float)
    right = np.array([t.accuracy > 0.5 for t in trajectories])
    found = {
        "length/mean": float(lengths.mean()),
        "length/p95": float(np.percentile(lengths, 95)),
        "length/max": float(lengths.max()),
        "length/truncated": _mean([t.truncated for t in trajectories]),
    }
    if right.any():
        found["length/right_mean"] = float(lengths[right].mean())
    if not right.all():
        found["length/wrong_mean"] = float(lengths[~right].mean())
    return found


def _token_ages(spans: Sequence[VersionSpan], version: int) -> dict[str, float]:
    """Mean and largest age, each span weighing as many tokens as it has."""
    lengths, ages = [span.end - span.start for span in spans], [version - span.version for span in spans]
    if not sum(lengths):
        return {}
    return {
        "staleness/token_mean": float(np.average(ages, weights=lengths)),
        "staleness/token_max": float(max(age for age, length in zip(ages, lengths) if length)),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
