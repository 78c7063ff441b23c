"""THE loop: generate, score, select, learn, publish, prove; evaluate and record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlhf.algorithms.config import KlPlace, OldLogprobs
from rlhf.algorithms.dynamic_sampling import Selection
from rlhf.algorithms.losses import add_derived
from rlhf.batching import MiniBatches, assign_advantages, mini_batches
from rlhf.clock import Clock
from rlhf.config import Config
from rlhf.evaluation.config import Split
from rlhf.evaluation.runner import evaluate, sampling_for
from rlhf.evaluation.stamp import at_step
from rlhf.experience import experience_metrics, mean_updates, throughput
from rlhf.run import Run
from rollout.types import Group
from trainer.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a finished run leaves behind."""

    folder: Path
    steps: int
    metrics: dict[str, float]
    """The last step's."""
    first_accuracy: float | None
    last_accuracy: float | None
    """On the evaluated set, before and after training; None without one."""
    evaluated: str = "held-out"
    """What the evaluated set is called: `held-out` or `validation`."""

    def text(self) -> str:
        """Two lines for the console."""
        change = ""
        if self.first_accuracy is not None and self.last_accuracy is not None:
            change = f": {self.evaluated} accuracy {self.first_accuracy:.1%} -> {self.last_accuracy:.1%}"
        return f"{self.steps} steps{change}\nReport: {self.folder / 'report.md'}"


class Lesson(Protocol):
    """What learning needs of a run; `rlhf.replay` gives it without engines."""

    config: Config
    learner: Learner
    clock: Clock
    metrics: dict[str, float]
    """What the step in progress has measured so far."""


def train(run: Run) -> Summary:
    """Train until `loop.steps`, `loop.max_tokens`, a signal, or a want of groups or data to learn from."""
    begin(run)
    while run.goes_on:
        selection = collect(run)
        record(run, selection)
        learn(run, selection.groups)
        run.ledger.trained(run.step + 1, selection.groups)
        publish(run)
        run.step += 1
        run.stopped = selection.stop or run.ran_dry(selection.groups)
        evaluate_if_due(run)
        close_step(run)
        checkpoint_if_due(run)
    checkpoint_if_due(run, last=True)
    return summarize(run)


def begin(run: Run) -> None:
    """Prove the channel to the engines; a new run is evaluated before its first step."""
    publish(run)
    if not run.resumed:
        evaluate_if_due(run)
        close_step(run)


def collect(run: Run) -> Selection:
    """Take the step's groups, drawn, generated, scored and selected, from the source; close its books."""
    harvest = run.source.next(run.step)
    run.cursor, run.selector = harvest.cursor, harvest.selector
    run.generated += harvest.tokens
    selection = harvest.selection
    if selection.shortage:
        run.say_shortage(selection.shortage, last=selection.stop)
    run.metrics |= harvest.failures | harvest.metrics | selection.counts
    run.metrics |= experience_metrics(harvest.generated, selection.groups, run.step, run.publisher.version)
    run.metrics |= {
        "train/tokens": run.generated,
        "train/prompts": run.cursor.consumed,
        "train/epoch": run.cursor.epoch,
    }
    run.trackers.completions(run.step + 1, harvest.generated)
    return selection


def record(run: Run, selection: Selection) -> None:
    """Assign advantages and write every group of the step, kept or not: also what learning then fails on."""
    with run.clock("batching"):
        assign_advantages(selection.groups, run.config.algorithm)
    with run.clock("record"):
        run.recorder.write(run.step + 1, selection.groups + selection.carried + selection.dropped)
        run.ledger.selected(run.step + 1, selection)


def learn(run: Lesson, groups: list[Group]) -> None:
    """Rows, the log-probs that the algorithm asks for, then one optimizer step a mini-batch."""
    config = run.config
    with run.clock("batching"):
        batches = mini_batches(groups, config.algorithm, config.loop, config.rollout.max_new_tokens)
    with run.clock("logprobs"):
        fill_logprobs(run, batches)
    with run.clock("update"):
        updates = run.learner.update(batches.batches)
        run.learner.end_rollout()
    means = mean_updates(updates)
    add_derived(means)
    run.metrics |= means
    run.metrics["train/empty_responses"] = batches.empty_responses


def fill_logprobs(run: Lesson, batches: MiniBatches) -> None:
    """Reference and old log-probs, where the algorithm needs a pass of their own for them.

    The reference comes first: a micro-batch takes old ones of all its rows or of none.
    """
    algorithm = run.config.algorithm
    if algorithm.kl.coefficient and algorithm.kl.place is KlPlace.loss:
        for row, values in zip(batches.rows, run.learner.reference_logprobs(batches.rows), strict=True):
            row.reference_logprobs = values
    if algorithm.old_logprobs is OldLogprobs.recompute:
        for row, values in zip(batches.moved, run.learner.logprobs(batches.moved), strict=True):
            row.old_logprobs = values
    elif algorithm.old_logprobs is OldLogprobs.rollout:
        for row in batches.rows:
            row.old_logprobs = row.rollout_logprobs


def publish(run: Run) -> None:
    """Send the weights to every engine and prove that they arrived; stops the run when they did not."""
    with run.publishing(), run.clock("publish"):
        run.metrics |= run.publisher.publish(run.weights(), run.learner.score).metrics()
        if run.learner.has_adapter:
            run.metrics["weights/merge_gap"] = run.learner.merge_gap(run.engine_dtype)


def evaluate_if_due(run: Run) -> None:
    """Answer the held-out set with evaluation's own sampling."""
    config = run.config
    last = run.step if run.finished else config.loop.steps
    if not run.heldout or not config.evaluation.due(run.step, last):
        return
    with run.clock("evaluation"):
        sampling = sampling_for(config.evaluation, run.sampling)
        result = evaluate(
            run.heldout, run.answer, run.scorer.score, sampling, step=run.step, graders=run.graders
        )
        result.write(run.folder, at_step(run.stamp, run.step, run.publisher.version, run.folder).plain())
    run.accuracies[run.step] = result.accuracy
    run.metrics |= result.metrics()


def checkpoint_if_due(run: Run, last: bool = False) -> None:
    """Save model and training state, after the step's books are closed: its seconds are the next step's."""
    if run.checkpoints.due(run.step, run.accuracies, last=last):
        with run.clock("checkpoint"):
            run.checkpoints.write(run.step, run.save, run.accuracies)


def close_step(run: Run) -> None:
    """Close the step's books and hand them to the trackers."""
    times = run.clock.metrics()
    run.metrics |= times | throughput(run.metrics, times) | run.memory.metrics() | run.pool.metrics()
    with run.clock("tracking"):
        run.trackers.log(run.step, run.metrics)
    run.last_metrics, run.metrics = run.metrics, {}


def summarize(run: Run) -> Summary:
    """What came out."""
    accuracies = [run.accuracies[step] for step in sorted(run.accuracies)]
    return Summary(
        folder=run.folder,
        steps=run.step,
        metrics=run.last_metrics,
        first_accuracy=accuracies[0] if accuracies else None,
        last_accuracy=accuracies[-1] if accuracies else None,
        evaluated="held-out" if run.config.evaluation.split is Split.heldout else "validation",
    )
