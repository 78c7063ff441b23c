"""A run folder of made-up numbers, written by the real trackers and the real evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rlhf import environment
from rlhf.evaluation.runner import evaluate
from rlhf.tracking.config import TrackingConfig
from rlhf.tracking.jsonl import JsonlTracker
from rollout.engine import Sampling
from rollout.types import Group, Prompt
from tests.tracking.samples import prompt, trajectory

PROBLEMS = 40
CONFIG = """\
model:
  path: tiny
algorithm:
  clip: {low: 0.2, high: 0.28}
loop:
  steps: 20
learner:
  optimizer: {name: adamw, lr: 1.0e-05}
"""


def make(folder: Path, steps: int = 20, *, every: int = 5, split: str = "heldout") -> Path:
    """Steps 0 to `steps`; evaluations answer `2 * step` of 40 problems of `split` right."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"{CONFIG}evaluation:\n  split: {split}\n")
    environment.write(folder)
    tracker = JsonlTracker(TrackingConfig())
    tracker.start({}, folder)
    for step in range(steps + 1):
        metrics = training(step) if step else {}
        if step % every == 0:
            metrics |= _evaluation(step, folder) | {"time/evaluation": 2.0}
        metrics["time/step"] = 2.0 * (step % every == 0) + 3.0 * (step > 0)
        metrics["time/elapsed"] = 2.0 * (step // every + 1) + 3.0 * step
        tracker.log(step, metrics)
    tracker.close()
    return folder


def training(step: int) -> dict[str, float]:
    """Metrics of one step: phases rollout 1 s, update 1.99 s, reward 0.01 s."""
    return {
        "train/accuracy": step / 25,
        "train/reward": step / 25 - 0.5,
        "length/mean": 10.0,
        "length/truncated": 0.1,
        "policy/entropy": 1 / step,
        "policy/clip_high": 0.001 * step,
        "mismatch/logprob_gap": 0.01,
        "learner/grad_norm": math.nan if step == 3 else 1.0,
        "memory/peak_pss": 3 * 2.0**30,
        "time/rollout": 1.0,
        "time/update": 1.99,
        "time/reward": 0.01,
        "time/other": 0.0,
    }


def _evaluation(step: int, folder: Path) -> dict[str, float]:
    def generate(prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        groups = []
        for index, asked in enumerate(prompts):
            right = index < 2 * step
            response = (
                trajectory(asked.answer or "", 1.0) if right else trajectory("a `lot` of *it*|\n<b>", 0.0)
            )
            groups.append(Group(id=asked.id, prompt=asked, trajectories=[response], born=step))
        return groups

    found = evaluate(
        [prompt(index) for index in range(PROBLEMS)],
        generate,
        lambda groups: None,
        Sampling(max_tokens=16, temperature=0.0),
        step=step,
        graders={"any_mention": lambda asked, response: 1.0},
    )
    found.write(folder)
    return found.metrics()
