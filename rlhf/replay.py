"""`rlhf replay RUN@STEP`: one recorded step is learned again, from its rollouts and the state before it.

Nothing is generated, so no engine is started, and nothing is written. Learning is the loop's own. On a CPU
the replayed step gives the recorded update bit for bit; with overrides it shows what other settings would
have made of it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging as transformers_logging

from rlhf import initial_weights, models, resume, run_steps, state_file
from rlhf.algorithms.config import KlPlace
from rlhf.batching import assign_advantages
from rlhf.checkpoint import STATE, Checkpoints
from rlhf.clock import Clock
from rlhf.compose import load, to_dict
from rlhf.config import Config
from rlhf.distributed import build_learner
from rlhf.errors import RunStoppedError, UserError, clear_sentences
from rlhf.loop import learn
from rlhf.replay_result import Replay, compare, tensors_of
from rlhf.run_steps import RunStep
from rlhf.tracking import jsonl
from rlhf.tracking.base import flatten
from rollout import recorder
from rollout.types import Group
from trainer.config import ProfileConfig
from trainer.learner import Learner, NonFiniteError

LEARNING = ("algorithm.*", "learner.*", "loop.steps", "loop.mini_batch", "loop.epochs")
"""Keys, `*` for any text, that learning from given rollouts depends on."""
RECORDED = ("algorithm.dynamic_sampling.*", "algorithm.overlong.buffer", "algorithm.overlong.penalty_factor")
"""Those of them that shaped what was recorded."""
TRAINED = ("learner.lora.*", "learner.freeze")
"""Those that say which tensors are trained, or on what scale."""
TRACES = ("learner.profile.*",)
"""Those that a replay does without."""
OPTIMIZER = ("name", "betas", "eps", "weight_decay")
"""Keys of `learner.optimizer` that its saved state has fixed."""


@dataclass(slots=True, kw_only=True)
class ReplayedStep:
    """A step that is learned again: a `rlhf.loop.Lesson`."""

    config: Config
    learner: Learner
    clock: Clock = field(default_factory=Clock)
    metrics: dict[str, float] = field(default_factory=dict)


def replay(name: str, overrides: Sequence[str] = (), runs: Path = Path("runs")) -> Replay:
    """Learn `RUN@STEP` again, changed by `overrides`.

    Raises `UserError` when the run did not record or save what that takes, or an override has no say in it;
    `RunStoppedError` when the loss or gradient is not finite.
    """
    where = run_steps.find(name, f"rlhf replay {name}", runs)
    config, changes = _config(where, overrides)
    groups = _kept_groups(where)
    state = _state_before(where)
    with clear_sentences():
        learner = _learner(where, config, state, runs)
    before = tensors_of(learner.master.state_dict())
    step = ReplayedStep(config=config, learner=learner)
    assign_advantages(groups, config.algorithm)
    try:
        learn(step, groups)
    except NonFiniteError as error:
        raise RunStoppedError(f"{name} stops when it is learned again: {error}") from error
    return _result(where, changes, groups, step, before)


def _config(where: RunStep, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The run's configuration with `overrides`, without traces, and what they change in it.

    Raises `UserError` for one that a replay does not depend on, or that has shaped what it starts from.
    """
    path = where.folder / "config.yaml"
    if not resume.recorded(where.folder):
        raise UserError(f"rlhf replay {where.name}: {where.folder} holds no run: name a run's folder.")
    recorded, config = load(str(path)), load(str(path), overrides)
    then, now = flatten(to_dict(recorded)), flatten(to_dict(config))
    kl_in_reward = KlPlace.reward.name in (then["algorithm.kl.place"], now["algorithm.kl.place"])
    changed = [key for key in now if key not in then or now[key] != then[key]]
    for key in changed:
        reason = _why_fixed(key, where.step, kl_in_reward)
        if reason:
            raise UserError(f"{key}={now[key]} cannot be replayed: {reason}: leave it out.")
    learner = dataclasses.replace(config.learner, profile=ProfileConfig())
    changes = [f"{key}={now[key]} (was {then.get(key, 'not set')})" for key in changed]
    return dataclasses.replace(config, learner=learner), changes


def _why_fixed(key: str, step: int, kl_in_reward: bool) -> str:
    """Why a replay may not change `key`, as a clause; empty when it may."""

    def among(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)

    if not among(LEARNING) or among(TRACES):
        return "learning from recorded rollouts does not depend on it"
    if among(RECORDED) or (key.startswith("algorithm.kl.") and kl_in_reward):
        return "it shaped the recorded rollouts and their rewards"
    if among(TRAINED):
        return "the recorded update is one of other tensors"
    if step > 1 and among([f"learner.optimizer.{name}" for name in OPTIMIZER]):
        return f"the optimizer's state after step {step - 1} was made with another"
    return ""


def _kept_groups(where: RunStep) -> list[Group]:
    """What the step learned from, in order."""
    folder = where.folder / "rollouts"
    there = recorder.steps(folder)
    if where.step not in there:
        raise UserError(
            f"rlhf replay {where.name}: {folder} has no rollouts of that step, only {_ranges(there)}."
        )
    try:
        groups = recorder.read(folder, where.step)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"rlhf replay {where.name}: the rollouts of that step in {folder} are damaged ({error})."
        ) from error
    return [group for group in groups if group.verdict == "kept"]


def _state_before(where: RunStep) -> dict[str, Any] | None:
    """The learner's state when the step began; None for the first step, which begins with the model."""
    if where.step == 1:
        return None
    checkpoints = Checkpoints(where.folder)
    problem = checkpoints.problem(where.step - 1)
    if problem:
        there = set(recorder.steps(where.folder / "rollouts"))
        begun = sorted(there & {1, *(step + 1 for step in checkpoints.steps())} - {where.step})
        raise UserError(
            f"rlhf replay {where.name}: it begins with the checkpoint {checkpoints.path(where.step - 1)}, "
            f"which cannot be used, {problem}: steps whose beginning is saved are {_ranges(begun)}."
        )
    state: dict[str, Any] = state_file.read(checkpoints.path(where.step - 1) / STATE)["learner"]
    return state


def _learner(where: RunStep, config: Config, state: dict[str, Any] | None, runs: Path) -> Learner:
    """The run's learner as it was when the step began."""
    transformers_logging.disable_progress_bar()
    resolved = initial_weights.attach(models.resolve(config.model, runs), config, runs)
    initial_weights.agree(resolved.initial, where.folder)
    learner = build_learner(config, resolved, where.folder)
    if state is not None:
        learner.load_state_dict(state)
    return learner


def _result(
    where: RunStep, changes: list[str], groups: list[Group], step: ReplayedStep, before: dict[str, Tensor]
) -> Replay:
    """The replayed update beside what the run logged and saved."""
    path = where.folder / jsonl.METRICS
    rows = {row["step"]: row for row in jsonl.read(path)} if path.is_file() else {}
    after = step.learner.state_dict()
    checkpoints = Checkpoints(where.folder)
    problem = checkpoints.problem(where.step)
    saved = {} if problem else state_file.read(checkpoints.path(where.step) / STATE)["learner"]
    parts = ("weights", "optimizer")
    return Replay(
        name=where.name,
        changes=changes,
        groups=len(groups),
        responses=sum(len(group.trajectories) for group in groups),
        metrics=step.metrics,
        recorded=rows.get(where.step, {}),
        update=compare(after["weights"], before),
        unsaved=problem and f"{checkpoints.path(where.step)} is not compared with: {problem}",
        recorded_update=compare(saved["weights"], before) if saved else None,
        saved={part: compare(after[part], saved[part]) for part in parts if saved},
    )


def _ranges(steps: Sequence[int]) -> str:
    """`1 to 4, 7` for 1, 2, 3, 4, 7."""
    found: list[list[int]] = []
    for step in steps:
        if found and found[-1][-1] == step - 1:
            found[-1].append(step)
        else:
            found.append([step])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in found) or "none"
