"""Real processes over gloo for the tests of the distributed learner."""

from __future__ import annotations

import faulthandler
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from tests.trainer.samples import Reinforce, tiny_model
from trainer.config import Device, LearnerConfig, OptimizerConfig, OptimizerName, Precision
from trainer.learner import Learner
from trainer.parallel.config import ParallelConfig
from trainer.parallel.leader import LeadingLearner, follow
from trainer.parallel.mesh import Team
from trainer.parallel.roll_call import Activity
from trainer.parallel.world import World

CPU = torch.device("cpu")
UNEVEN = {"intermediate_size": 66}
"""No multiple of 4, the largest number of ranks."""
SECONDS = 300.0
"""Most that a scenario may take, on a machine that is busy; a rank that hangs says where before that."""


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `size` processes that torchrun's variables describe; what each returned.

    They are forked from a server that has imported what they need.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.parallel.preload"])
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            context.Process(target=_rank, args=(rank, size, port, folder, function, arguments))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        limit = time.monotonic() + SECONDS
        for rank in ranks:
            rank.join(max(0.0, limit - time.monotonic()))
        statuses = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        assert statuses == [0] * size, f"exit statuses {statuses}"
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, size: int, port: int, folder: str, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    faulthandler.dump_traceback_later(SECONDS - 20)
    torch.set_num_threads(1)
    torch.save(function(*arguments), Path(folder) / str(rank))


def config(**changes: Any) -> LearnerConfig:
    """A float32 learner on the CPU."""
    made = LearnerConfig(dtype=Precision.float32, device=Device.cpu, optimizer=sgd())
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def sgd(lr: float = 0.05) -> OptimizerConfig:
    """Plain descent with momentum."""
    return OptimizerConfig(name=OptimizerName.sgd, lr=lr, betas=[0.9, 0.0])


def adam(lr: float = 1e-3) -> OptimizerConfig:
    """Adam whose steps do not turn on the last bit of a tiny gradient."""
    return OptimizerConfig(lr=lr, eps=1e-4)


def join(parallel: ParallelConfig | None = None) -> Team | None:
    """This process among the others; None when there are none."""
    world = World.from_environment()
    return Team(world, parallel or ParallelConfig(), CPU) if world.size > 1 else None


def build(
    settings: LearnerConfig, team: Team | None, *, kind: str = "llama", model: Any = None, **options: Any
) -> Learner:
    """This rank's learner: a `LeadingLearner` on rank 0 of several."""
    defaults: dict[str, Any] = {"loss": Reinforce(), "temperature": 0.8, "total_steps": 10, "seed": 0}
    options = defaults | options
    model = model or tiny_model(kind, **UNEVEN)
    if team is None:
        return Learner(settings, model, **options)
    return (LeadingLearner if team.leads else Learner)(settings, model, ranks=team, **options)


def led(
    scenario: Callable[[Learner], Any], settings: LearnerConfig, team: Team | None, **options: Any
) -> Any:
    """What `scenario` returns for the learner on rank 0, which the other ranks follow; None on those."""
    learner = build(settings, team, **options)
    if team is not None and not team.leads:
        return follow(learner, team.channel, Activity())
    found = scenario(learner)
    if isinstance(learner, LeadingLearner):
        learner.close()
    return found
