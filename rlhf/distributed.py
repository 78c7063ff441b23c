"""The other ranks of a distributed learner: how rank 0 meets them, and what they do from start to end.

torchrun starts one command several times. Rank 0 is the run: data, rewards, engines, files, and its part of
the learner. The others build their part when rank 0 builds its own, and then make the calls that it tells of.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from rlhf import faults, initial_weights, models
from rlhf.algorithms.losses import build_loss
from rlhf.config import Config
from rlhf.errors import UserError, clear_sentences
from rlhf.interruption import SIGNALS
from rlhf.models import ResolvedModel
from rlhf.preflight import check_ranks
from trainer.config import ProfileConfig
from trainer.errors import described
from trainer.learner import Learner, device_of
from trainer.parallel.leader import LeadingLearner, call_to_build, follow, wait_to_build
from trainer.parallel.mesh import Team, is_broken
from trainer.parallel.world import World

LINGER_SECONDS = 120.0
"""How long a rank that failed stays, while rank 0 closes the run, writes its report and says why: torchrun
ends all ranks when the first one fails, this one too once rank 0 has."""


@contextmanager
def joined(config: Config) -> Iterator[Team | None]:
    """Rank 0 among the others, from now until the block ends, whatever ends it; None for one process.

    Raises `UserError` when the degrees do not fit the number of ranks, or there is no such device.
    """
    world = World.from_environment()
    check_ranks(config, world)
    if world.size == 1:
        yield None
        return
    with clear_sentences():
        team = Team(world, config.learner.parallel, device_of(config.learner.device))
    try:
        yield team
    finally:
        team.leave()


def build_learner(config: Config, resolved: ResolvedModel, folder: Path, team: Team | None = None) -> Learner:
    """The learner as it is before the first step of the run in `folder`, or this rank's part of it."""
    profile = dataclasses.replace(
        config.learner.profile, folder=config.learner.profile.folder or str(folder / "profile")
    )
    build = Learner if team is None else functools.partial(_ranked, team)
    learner = build(
        dataclasses.replace(config.learner, profile=profile),
        initial_weights.load(resolved),
        loss=build_loss(config.algorithm),
        temperature=config.rollout.temperature,
        total_steps=config.loop.steps,
        seed=config.run.seed,
        needs_reference=config.algorithm.kl.coefficient > 0,
        adapter=resolved.adapter,
    )
    initial_weights.install_adapter(resolved, learner)
    return learner


def _ranked(team: Team, *arguments: Any, **options: Any) -> Learner:
    """This rank's part. The others begin when rank 0 does, which has the model on this machine by then."""
    if team.leads:
        call_to_build(team.channel)
        return LeadingLearner(*arguments, ranks=team, **options)
    return Learner(*arguments, ranks=team, **options)


def follow_config(config: Config) -> int:
    """All that a rank above 0 does; returns its exit status, 1 when it failed or rank 0 ended too early.

    What its part of the learner raises is told to rank 0, which says it. Signals are rank 0's to answer.
    """
    with joined(config) as team:
        assert team is not None
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        try:
            _follow(config, team)
        except Exception as error:
            if not is_broken(error):  # else another rank failed, and says so itself
                team.report_failure(f"rank {team.rank} of the learner failed: {_sentence(error, config)}")
            team.leave()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            time.sleep(LINGER_SECONDS)
            return 1
    return 0


def _follow(config: Config, team: Team) -> None:
    logging.disable(logging.WARNING)  # rank 0 says it too
    wait_to_build(team.channel)
    transformers_logging.disable_progress_bar()
    untraced = dataclasses.replace(config.learner, profile=ProfileConfig())
    config = dataclasses.replace(config, learner=untraced)
    resolved = initial_weights.attach(models.resolve(config.model), config)
    follow(build_learner(config, resolved, Path(), team), team.channel)


def _sentence(error: Exception, config: Config) -> str:
    """What there is to say about an error; the traceback of one that is not expected is printed."""
    if isinstance(error, UserError | ValueError):
        return str(error)
    said = faults.sentence(error, config, "learning")
    if not said:
        traceback.print_exc()
    return said or f"{described(error)}."
