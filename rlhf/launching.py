"""`launched`: the other ranks of a learner, where `rlhf` starts them itself, as actors in a Ray cluster."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from rlhf.config import Config
from rlhf.distributed import follow_config, learner_threads
from rlhf.errors import RunStoppedError, UserError, clear_sentences
from rlhf.placement import placement_of
from rlhf.preflight import check_ranks
from rollout.config import PoolKind
from rollout.pool import engine_places
from trainer.learner import device_of
from trainer.parallel.config import Launcher
from trainer.parallel.mesh import is_broken
from trainer.parallel.places import Place, needs_ray
from trainer.parallel.world import World

if TYPE_CHECKING:
    from trainer.parallel.ray_cluster import Places
    from trainer.parallel.ray_ranks import RayRanks


@contextmanager
def launched(config: Config) -> Iterator[RayRanks | None]:
    """Ranks 1 and up as Ray actors until the block ends, in which this process is rank 0.

    None where `learner.parallel.launcher` leaves them to torchrun. Their places and those of engines on Ray
    are taken together. Raises `UserError` when the cluster has no room or does not answer,
    `RunStoppedError` when a rank is lost while the ranks meet.
    """
    parallel = config.learner.parallel
    if parallel.launcher is not Launcher.ray:
        yield None
        return
    if World.from_environment().size > 1:
        raise UserError(
            "learner.parallel.launcher=ray starts the ranks itself: run rlhf without torchrun, or set "
            "learner.parallel.launcher=torchrun."
        )
    check_ranks(config, World(size=parallel.product))
    local = 1 if config.rollout.ray.cluster else parallel.product
    with clear_sentences():
        places, first = _places(config, local)
    with closing(places):
        with clear_sentences():
            ranks = _ranks(config, places, first)
        with closing(ranks), ranks.as_rank_0(local):
            try:
                yield ranks
            except RuntimeError as error:  # of the store at which the ranks were to meet
                if not (is_broken(error) and ranks.lost()):
                    raise
                raise RunStoppedError(f"the run could not start: {ranks.lost()}") from error


def _places(config: Config, local: int) -> tuple[Places, int]:
    """Engines' places, then ranks', and the index of the first of these. `local`: ranks on this machine."""
    with needs_ray("learner.parallel.launcher=ray", "torchrun"):
        from trainer.parallel import ray_cluster

    parallel = config.learner.parallel
    on_gpu = device_of(config.learner.device).type == "cuda"
    gpus = placement_of(config.rollout, ranks=local).engines
    engines = engine_places(config.rollout, gpus)
    ranks = [
        Place(
            what="learner rank",
            cpus=learner_threads(config),
            gpus=int(on_gpu),
            where=parallel.places[index % len(parallel.places)] if parallel.places else "",
        )
        for index in range(parallel.product - 1)
    ]
    own = set(range(1, local)) if on_gpu else set()
    if config.rollout.pool is PoolKind.ray:
        own |= {gpu for each in gpus for gpu in each}
    return ray_cluster.Places(config.rollout.ray, engines + ranks, sorted(own)), len(engines)


def _ranks(config: Config, places: Places, first: int) -> RayRanks:
    from trainer.parallel.ray_ranks import RayRanks

    return RayRanks(
        places,
        range(first, first + config.learner.parallel.product - 1),
        functools.partial(_follow, config),
        threads=learner_threads(config),
        noticed=device_of(config.learner.device).type == "cpu",
    )


def _follow(config: Config) -> str:
    """All that an actor does; returns what it failed of, where rank 0 does not know it yet."""
    try:
        follow_config(config)
    except UserError as error:
        return f"rank {os.environ['RANK']} of the learner failed: {error}"
    except RunStoppedError as error:
        return str(error)
    return ""
