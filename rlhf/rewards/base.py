"""`Scorer`: every reward part of a run applied to finished groups, with what went wrong counted by part."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf.errors import UserError
from rlhf.rewards.config import BUILT_IN, RewardConfig, RewardPartConfig
from rlhf.rewards.function import (
    BackgroundLoop,
    Batch,
    RewardFunction,
    load_function,
    singles,
)
from rlhf.rewards.grade import (
    FUNCTION,
    Grade,
    Kind,
    PartScore,
    Response,
    Status,
    build_spec,
    failed,
    find_kind,
    nearest,
)
from rlhf.rewards.sandbox import Job, Outcome, SandboxError, WorkerPool
from rollout.types import FinishReason, Group, Prompt, Trajectory

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Sample:
    """One response to score and the prompt that it answers."""

    prompt: Prompt
    trajectory: Trajectory
    response: Response


@dataclass(slots=True)
class ScoreReport:
    """What happened in one call of `Scorer.score`."""

    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Part -> status -> responses."""
    replaced_workers: int = 0
    """Grading processes that were killed or died in this call."""

    def failures(self) -> dict[str, float]:
        """`reward/<part>_<status>`: responses without a proper verdict, by part; `reward/replaced_workers`.

        Counts, so calls add up.
        """
        statuses = (Status.no_answer, Status.gold_unparsable, Status.timeout, Status.error)
        found = {
            f"reward/{part}_{status}": float(counts[status])
            for part, counts in self.statuses.items()
            for status in statuses
        }
        return found | {"reward/replaced_workers": float(self.replaced_workers)}


class Part(Protocol):
    """One named reward part, ready to score."""

    name: str
    config: RewardPartConfig
    label: str
    job: Job | None
    """What the workers need for it; None when it runs inline."""

    def score(self, samples: Sequence[Sample], run: Runner) -> list[tuple[PartScore, str]]:
        """A score for each sample in order, each with the message of its failure (empty when none)."""
        ...


Runner = Callable[[Sequence[tuple[str, Any]]], list[Outcome]]
"""Runs `(job, payload)` tasks in killable workers."""


class Scorer:
    """Scores groups as `reward.*` says. Not a pure function only because it owns processes: close it."""

    def __init__(
        self, config: RewardConfig, extra_functions: dict[str, Callable[..., Any]] | None = None
    ) -> None:
        """Check the configuration and load every function; no process is started yet.

        `extra_functions` are Python callables by part name; a name that is no configured part becomes a part
        of weight 1. Raises `UserError` in one sentence.
        """
        configured = _with_functions(config, extra_functions or {})
        problems = configured.check()
        if problems:
            raise UserError(problems[0])
        self.config = configured
        self._loop = BackgroundLoop()
        self._parts = [
            self._build(name, part, extra_functions or {}) for name, part in configured.parts.items()
        ]
        self._pool: WorkerPool | None = None
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._warned: set[str] = set()

    def check_sources(self, names: Collection[str]) -> None:
        """Compare the parts with `names`, every data source of the run: graders never change silently.

        Raises `UserError` for a source that no part grades, and for a part that lists an unknown one.
        """
        known = sorted(names)
        for part in self._parts:
            for name in part.config.sources:
                if name not in known:
                    raise UserError(
                        f"reward.parts.{part.name}.sources lists {name!r}, which no data source is called"
                        f"{nearest(name, known)}"
                    )
        self.check_graded(names)

    def check_graded(self, names: Collection[str]) -> None:
        """Raise `UserError` for one of these data sources that no part grades."""
        for name in names:
            if self._decider(name) is None:
                remedy = (
                    f"let reward.parts.{self.config.accuracy_from}.sources list it"
                    if self.config.accuracy_from
                    else "add a part of kind exact_integer, aime, math_verify, dapo_math or function for it"
                )
                raise UserError(f"no reward part grades data source {name!r}: {remedy}.")

    def graders(self) -> dict[str, str]:
        """Part -> `grader@version` or the function's path; to be stored with the run."""
        return {part.name: part.label for part in self._parts}

    def start(self) -> None:
        """Start the worker processes that the parts need, without waiting; else the first round does."""
        if self._jobs():
            self._workers().start()

    def score(self, groups: Sequence[Group]) -> ScoreReport:
        """Fill `rewards`, `reward`, `accuracy`, `extracted` and `grade_status` of every trajectory.

        `reward` is the weighted sum of the parts. In the workers (`math_verify`, `format`, `sandbox: true`)
        a grader that hangs or crashes scores a failure, is counted and leaves the other answers alone. One
        call at a time, from any thread; a second one waits. Raises `UserError` for an ungraded source or a
        function that does not keep its contract.
        """
        with self._turn:
            return self._score(groups)

    def _score(self, groups: Sequence[Group]) -> ScoreReport:
        samples = [
            Sample(group.prompt, trajectory, _view(trajectory))
            for group in groups
            for trajectory in group.trajectories
        ]
        self.check_graded(sorted({sample.prompt.source for sample in samples}))
        for sample in samples:
            _reset(sample.trajectory)
        report = ScoreReport()
        replaced = self._pool.replaced if self._pool else 0
        for part in self._parts:
            covered = [sample for sample in samples if _covers(part.config, sample.prompt.source)]
            if covered:
                self._apply(part, covered, report)
        report.replaced_workers = (self._pool.replaced if self._pool else 0) - replaced
        return report

    def close(self) -> None:
        """Stop the worker processes and the event loop; safe to call twice."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._loop.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _apply(self, part: Part, samples: Sequence[Sample], report: ScoreReport) -> None:
        """Score `samples` with one part and write the results into their trajectories."""
        for sample, (score, message) in zip(samples, part.score(samples, self._run)):
            trajectory = sample.trajectory
            trajectory.rewards.update(score.values)
            trajectory.reward += part.config.weight * sum(score.values.values())
            report.statuses[part.name][score.status] += 1
            if message:
                self._warn_once(part, sample.prompt.id, message)
            if self._decider(sample.prompt.source) == part.name:
                trajectory.accuracy = _accuracy(part, score)
                trajectory.extracted = score.extracted
                trajectory.grade_status = str(score.status)

    def _warn_once(self, part: Part, prompt: str, message: str) -> None:
        """Say a part's first failure of the run aloud; the rest is counted."""
        if part.name not in self._warned:
            self._warned.add(part.name)
            logger.warning(
                "reward.parts.%s: an answer to %s could not be graded: %s; more are counted in "
                "reward/%s_error and reward/%s_timeout.",
                *(part.name, prompt, message, part.name, part.name),
            )

    def _decider(self, source: str) -> str | None:
        """Name of the part that decides `accuracy` for rows of `source`."""
        covering = [part for part in self._parts if _covers(part.config, source)]
        if self.config.accuracy_from:
            return next((part.name for part in covering if part.name == self.config.accuracy_from), None)
        graders = [part.name for part in covering if isinstance(part, KindPart) and part.kind.grading]
        functions = [part.name for part in covering if isinstance(part, FunctionPart)]
        return next(iter(graders + functions), None)

    def _build(self, name: str, config: RewardPartConfig, given: dict[str, Callable[..., Any]]) -> Part:
        if config.kind != FUNCTION:
            kind = find_kind(config.kind)
            if name == self.config.accuracy_from and not kind.grading:
                raise UserError(
                    f"reward.accuracy_from={name!r} is a {kind.name} part, which says nothing about "
                    f"correctness: choose a part of kind {', '.join(_grading_kinds())} or function."
                )
            return KindPart(name, config, kind)
        if not config.path and name not in given:
            raise UserError(
                f"reward.parts.{name}.path is empty: give module:function, or the function itself in Python."
            )
        function = given.get(name) or load_function(name, config.path)
        label = "" if name in given else config.path
        return FunctionPart(
            name, config, RewardFunction(name, function, config.args, label=label, wait=self._loop.wait)
        )

    def _run(self, tasks: Sequence[tuple[str, Any]]) -> list[Outcome]:
        if not tasks:
            return []
        try:
            return self._workers().map(tasks)
        except SandboxError as error:
            raise UserError(f"reward: {error}") from error

    def _workers(self) -> WorkerPool:
        with self._lock:
            if self._pool is None:
                self._pool = WorkerPool(
                    self._jobs(),
                    workers=self.config.workers or min(8, len(os.sched_getaffinity(0))),
                    timeout_s=self.config.timeout_s,
                    memory_mb=self.config.memory_mb,
                )
            return self._pool

    def _jobs(self) -> dict[str, Job]:
        return {part.name: job for part in self._parts if (job := part.job) is not None}


class KindPart:
    """A part of a registered kind: pure, graded one response at a time, inline or in the workers."""

    def __init__(self, name: str, config: RewardPartConfig, kind: Kind) -> None:
        self.name = name
        self.config = config
        self.kind = kind
        self.label = kind.label
        self.job: Job | None = None
        self._spec = build_spec(kind, config.args)
        if kind.isolated or config.sandbox:
            arguments = {"module": kind.grade.__module__, "name": kind.name, "spec": self._spec}
            self.job = Job("rlhf.rewards.grade:graded_job", arguments)

    def score(self, samples: Sequence[Sample], run: Runner) -> list[tuple[PartScore, str]]:
        """See `Part.score`. Equal answers to equal golds are graded once."""
        settled: list[Grade | None] = [None] * len(samples)
        messages = [""] * len(samples)
        waiting: dict[tuple[Response, str | None], list[int]] = {}
        for index, sample in enumerate(samples):
            try:
                verdict = self._inline(sample)
            except Exception as error:
                verdict = failed(self.label, Status.error)
                messages[index] = f"{type(error).__name__}: {error}"
            if isinstance(verdict, Grade):
                settled[index] = verdict
            else:
                waiting.setdefault((verdict, sample.prompt.answer), []).append(index)
        outcomes = run([(self.name, payload) for payload in waiting])
        for indices, outcome in zip(waiting.values(), outcomes):
            for index in indices:
                settled[index], messages[index] = self._verdict(outcome), outcome.message
        return [
            (self._scored(grade), message) for grade, message in zip(settled, messages) if grade is not None
        ]

    def _inline(self, sample: Sample) -> Grade | Response:
        """The verdict, or the response that a worker has to grade."""
        response, gold = sample.response, sample.prompt.answer
        if self.kind.prepare is not None:
            prepared = self.kind.prepare(response, gold, self._spec)
            if isinstance(prepared, Grade):
                return prepared
            response = prepared
        return response if self.job is not None else self.kind.grade(response, gold, self._spec)

    def _verdict(self, outcome: Outcome) -> Grade:
        if outcome.failure:
            return failed(self.label, Status(outcome.failure))
        found = outcome.value
        return Grade(
            accuracy=found["accuracy"],
            extracted=found["extracted"],
            status=Status(found["status"]),
            grader=self.label,
        )

    def _scored(self, grade: Grade) -> PartScore:
        wrong, right = self.config.values
        return PartScore(
            values={self.name: wrong + (right - wrong) * grade.accuracy},
            accuracy=grade.accuracy if self.kind.grading else None,
            extracted=grade.extracted,
            status=grade.status,
        )


class FunctionPart:
    """A user's function: called once with all its responses, or in the workers one response at a time."""

    def __init__(self, name: str, config: RewardPartConfig, function: RewardFunction) -> None:
        self.name = name
        self.config = config
        self.label = function.label
        self.job: Job | None = None
        self._function = function
        if config.sandbox:
            arguments = {"part": name, "path": config.path, "args": config.args}
            self.job = Job("rlhf.rewards.function:sandboxed", arguments)

    def score(self, samples: Sequence[Sample], run: Runner) -> list[tuple[PartScore, str]]:
        """See `Part.score`. Raises `UserError` when the function breaks its contract or always fails."""
        batch = _batch(samples)
        if self.job is None:
            return [(score, "") for score in self._function(batch)]
        outcomes = run([(self.name, payload) for payload in singles(batch)])
        if all(outcome.failure == Status.error for outcome in outcomes):
            raise UserError(
                f"reward.parts.{self.name}: {self.label} failed on all {len(outcomes)} responses: "
                f"{outcomes[0].message}"
            )
        return [(self._scored(outcome), outcome.message) for outcome in outcomes]

    def _scored(self, outcome: Outcome) -> PartScore:
        if outcome.failure:
            return PartScore(values={self.name: 0.0}, accuracy=0.0, status=Status(outcome.failure))
        if "misuse" in outcome.value:
            raise UserError(outcome.value["misuse"])
        return PartScore(**outcome.value)


def _with_functions(config: RewardConfig, given: dict[str, Callable[..., Any]]) -> RewardConfig:
    """The configuration with a part for every function that was given in Python."""
    parts = dict(config.parts)
    for name in given:
        part = parts.setdefault(name, RewardPartConfig(kind=FUNCTION))
        if part.kind != FUNCTION or part.path:
            raise UserError(
                f"reward.parts.{name} is configured already (kind={part.kind}): "
                "give your function another name."
            )
    return RewardConfig(
        parts=parts,
        accuracy_from=config.accuracy_from,
        workers=config.workers,
        timeout_s=config.timeout_s,
        memory_mb=config.memory_mb,
    )


def _accuracy(part: Part, score: PartScore) -> float:
    """The accuracy that `part` decides. Raises `UserError` when a function says nothing about it."""
    if score.accuracy is None:
        shown = ", ".join(f"{name}={value:g}" for name, value in score.values.items())
        raise UserError(
            f"reward.parts.{part.name}: {part.label} decides accuracy but returned {shown}: return a float "
            "in [0, 1], or a dict that holds 'accuracy', or let reward.accuracy_from name a grader."
        )
    return score.accuracy


def _batch(samples: Sequence[Sample]) -> Batch:
    return Batch(
        prompts=[sample.prompt.text for sample in samples],
        responses=[sample.response.text for sample in samples],
        answers=[sample.prompt.answer for sample in samples],
        rows=[dict(sample.prompt.row) for sample in samples],
        sources=[sample.prompt.source for sample in samples],
        finished=[sample.response.finished for sample in samples],
        lengths=[sample.response.length for sample in samples],
        ids=[sample.prompt.id for sample in samples],
    )


def _view(trajectory: Trajectory) -> Response:
    """What graders may know of a trajectory."""
    return Response(
        text=trajectory.text,
        finished=trajectory.finish_reason is FinishReason.STOP,
        length=trajectory.length,
    )


def _reset(trajectory: Trajectory) -> None:
    """Forget earlier scores, so that scoring twice equals scoring once."""
    trajectory.rewards = {}
    trajectory.reward = 0.0
    trajectory.accuracy = 0.0
    trajectory.extracted = None
    trajectory.grade_status = "ungraded"


def _covers(config: RewardPartConfig, source: str) -> bool:
    return not config.sources or source in config.sources


def _grading_kinds() -> list[str]:
    return [kind.name for kind in BUILT_IN if kind.grading]
