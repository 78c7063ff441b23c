"""Whetstone's learner alone, on rollouts that TRL recorded.

    python -m tests.benchmarks.learner_side JOB.json

The same path as `rlhf.loop.learn`: mini-batches, one pass for the old log-probs, one optimizer step a
mini-batch. `tests.benchmarks.versus_trl` writes the job.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rlhf import models
from rlhf.algorithms.losses import build_loss
from rlhf.batching import mini_batches
from rlhf.compose import load
from rlhf.config import Config
from rollout.types import FinishReason, Group, Prompt, Trajectory
from trainer.learner import Learner
from trainer.model import load_model

Json = dict[str, Any]


def main() -> None:
    """Learn from every recorded rollout, and write what each took."""
    job: Json = json.loads(Path(sys.argv[1]).read_text())
    config = load(job["recipe"], job["overrides"])
    recorded = json.loads(Path(job["replay"]).read_text())
    learner = Learner(
        config.learner,
        load_model(models.resolve(config.model).folder),
        loss=build_loss(config.algorithm),
        temperature=config.rollout.temperature,
        total_steps=len(recorded),
        seed=config.run.seed,
    )
    rollouts = [learn(learner, groups_of(samples), config) for samples in recorded]
    result = {
        "rollouts": rollouts,
        "optimizer_steps": config.loop.optimizer_steps,
        "bytes": tensor_bytes(learner),
    }
    Path(job["out"]).write_text(json.dumps(result))


def learn(learner: Learner, groups: list[Group], config: Config) -> Json:
    """One rollout: seconds, samples and response tokens learned from."""
    start = time.perf_counter()
    batches = mini_batches(groups, config.algorithm, config.loop, config.rollout.max_new_tokens)
    for row, values in zip(batches.rows, learner.logprobs(batches.rows), strict=True):
        row.old_logprobs = values
    learner.update(batches.batches)
    learner.end_rollout()
    seconds = time.perf_counter() - start
    tokens = sum(len(row.response_ids) for row in batches.rows)
    return {
        "seconds": seconds,
        "generation": 0.0,
        "learner": seconds,
        "samples": len(batches.rows),
        "tokens": tokens,
    }


def groups_of(samples: list[Json]) -> list[Group]:
    """Recorded samples as the groups that the loop would hand over, with TRL's advantages."""
    groups: dict[int, Group] = {}
    for sample in samples:
        index = sample["group"]
        prompt = Prompt(id=f"trl:{index}", token_ids=sample["prompt_ids"], text="", answer=None, source="trl")
        group = groups.setdefault(index, Group(id=str(index), prompt=prompt, trajectories=[], born=0))
        group.trajectories.append(_trajectory(sample, len(group.trajectories)))
    return list(groups.values())


def _trajectory(sample: Json, index: int) -> Trajectory:
    return Trajectory(
        prompt_ids=sample["prompt_ids"],
        response_ids=sample["response_ids"],
        logprobs=sample["logprobs"],
        finish_reason=FinishReason.STOP,
        version_spans=[],
        sample_index=index,
        seed=0,
        text="",
        advantage=sample["advantage"],
    )


def tensor_bytes(learner: Learner) -> dict[str, int]:
    """Bytes of weights (working ones and float32 masters), gradient sums and Adam's two moments."""
    working = {p.data_ptr(): p.numel() * p.element_size() for p in learner.policy.parameters()}
    masters = {p.data_ptr(): p.numel() * p.element_size() for _, p in learner.master.named}
    trained = sum(masters.values())
    return {"weights": sum((working | masters).values()), "gradient": trained, "adam": 2 * trained}


if __name__ == "__main__":
    main()
