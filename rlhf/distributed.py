"""The other ranks of a distributed learner: how rank 0 meets them, and what they do from start to end.

torchrun starts one command several times, or `rlhf.launching` the others in Ray. Rank 0 is the run: data,
rewards, engines, files, and its part of the learner. The others build their part when rank 0 builds its own,
and then make the calls that it tells of.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from rlhf import faults, initial_weights, models
from rlhf.algorithms.losses import build_loss
from rlhf.config import Config
from rlhf.errors import RunStoppedError, UserError, clear_sentences
from rlhf.interruption import SIGNALS
from rlhf.models import ResolvedModel
from rlhf.preflight import check_ranks
from rlhf.rank_watch import Presence
from rlhf.watchdog import pause_seconds
from trainer.config import ProfileConfig
from trainer.errors import described
from trainer.learner import Learner, device_of
from trainer.parallel.config import Launcher
from trainer.parallel.leader import LeadingLearner, call_to_build, follow, wait_to_build
from trainer.parallel.mesh import Team, is_broken
from trainer.parallel.roll_call import Activity
from trainer.parallel.world import World


@contextmanager
def joined(config: Config, lost: Callable[[], str] | None = None) -> Iterator[Team | None]:
    """Rank 0 among the others, from now until the block ends, whatever ends it; None for one process.

    `lost`: see `Team`. Raises `UserError` when the degrees do not fit the number of ranks, or there is no
    such device; `RunStoppedError` for a rank that is gone where nothing else says so, as while models load.
    """
    world = World.from_environment()
    check_ranks(config, world)
    if world.size == 1:
        yield None
        return
    with clear_sentences():
        team = Team(world, config.learner.parallel, device_of(config.learner.device), lost)
    try:
        yield team
    except RuntimeError as error:
        explained = team.explain(error)
        if explained is error:
            raise
        raise RunStoppedError(f"the run stopped: {explained}") from error
    finally:
        team.leave()


def build_learner(config: Config, resolved: ResolvedModel, folder: Path, team: Team | None = None) -> Learner:
    """The learner as it is before the first step of the run in `folder`, or this rank's part of it."""
    build = Learner if team is None else functools.partial(_ranked, team)
    learner = build(
        dataclasses.replace(config.learner, threads=learner_threads(config)),
        initial_weights.load(resolved),
        loss=build_loss(config.algorithm),
        temperature=config.rollout.temperature,
        total_steps=config.loop.steps,
        seed=config.run.seed,
        needs_reference=config.algorithm.kl.coefficient > 0,
        adapter=resolved.adapter,
        traces=folder / "profile",
        layercast=config.layercast,
    )
    initial_weights.install_adapter(resolved, learner)
    return learner


def learner_threads(config: Config) -> int:
    """CPU threads of each rank, 0 for torch's own choice; on Ray that would be all cores, hence one."""
    on_ray = config.learner.parallel.launcher is Launcher.ray
    return config.learner.threads or (1 if on_ray else 0)


def _ranked(team: Team, *arguments: Any, **options: Any) -> Learner:
    """This rank's part. The others begin when rank 0 does, which has the model on this machine by then."""
    if team.leads:
        call_to_build(team.channel)
        return LeadingLearner(*arguments, ranks=team, **options)
    return Learner(*arguments, ranks=team, **options)


def follow_config(config: Config) -> int:
    """All that a rank above 0 does; returns its exit status.

    Signals are rank 0's to answer. What fails here is rank 0's to say: it is left in the ranks' store, and
    the end of this process breaks the connections on which rank 0 waits. Over gloo the status is 0 all the
    same, for at any other torchrun would end rank 0 before it has closed the run and said why; then the
    status of rank 0 ends everybody, or has torchrun start them again (`--max-restarts`). Between GPUs rank 0
    may wait forever, so there the sentence is printed here and torchrun ends everybody.
    """
    with joined(config) as team:
        assert team is not None
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        try:
            _follow(config, team)
        except Exception as error:
            if is_broken(error):  # another rank failed, and says so itself
                return 0 if team.notices else 1
            said = f"rank {team.rank} of the learner failed: {_sentence(error, config)}"
            team.report_failure(said)
            if not team.notices:
                raise RunStoppedError(said) from error
    return 0


def _follow(config: Config, team: Team) -> None:
    logging.disable(logging.WARNING)  # rank 0 says it too
    wait_to_build(team.channel)
    transformers_logging.disable_progress_bar()
    untraced = dataclasses.replace(config.learner, profile=ProfileConfig())
    config = dataclasses.replace(config, learner=untraced)
    resolved = initial_weights.attach(models.resolve(config.model), config)
    learner = build_learner(config, resolved, Path(), team)
    activity, minutes = Activity(), config.run.watchdog_minutes
    with Presence(minutes, team.roll_call, activity, pause_seconds(minutes)):
        follow(learner, team.channel, activity)


def _sentence(error: Exception, config: Config) -> str:
    """What there is to say about an error; the traceback of one that is not expected is printed."""
    if isinstance(error, UserError | ValueError):
        return str(error)
    said = faults.sentence(error, config, "learning")
    if not said:
        traceback.print_exc()
    return said or f"{described(error)}."
