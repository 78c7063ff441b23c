"""Answer the held-out set, grade it, and say how sure the number is.

Knows neither engines nor rewards: it is handed a `generate` and a `score`. The strict verdict is
`Trajectory.accuracy`, as training sees it; further graders (any mention, ...) are reported beside it by name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.evaluation.config import EvaluationConfig
from rlhf.evaluation.proportions import mean, standard_error, wilson
from rlhf.files import replace_text
from rollout.engine import Sampling
from rollout.types import FinishReason, Group, Prompt, Trajectory

FOLDER = "evaluations"
FORMAT = "format"

Generate = Callable[[Sequence[Prompt], Sampling], list[Group]]
"""One group of the wanted number of trajectories a prompt, in order."""
Score = Callable[[list[Group]], Any]
"""Fills rewards, accuracy, extracted and grade status of every trajectory (`Scorer.score`)."""
Grader = Callable[[Prompt, Trajectory], float | None]
"""A second opinion in [0, 1] on a scored response; None for a problem that it cannot judge, whatever the
response."""

GRADED = ("ok", "no_answer")


@dataclass(slots=True, kw_only=True)
class Problem:
    """One response to a prompt with every verdict: one line of `evaluations/step-N.jsonl`."""

    id: str
    prompt: str
    answer: str | None
    response: str
    extracted: str | None
    accuracy: float
    grades: dict[str, float]
    """Verdicts of the further graders that can judge it, `format` among them."""
    reward: float
    rewards: dict[str, float]
    """Reward parts before their weights."""
    status: str
    finish_reason: str
    length: int
    """Response tokens, the end token included."""
    sample: int = 0
    """Number of the response among those to its prompt."""


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """One evaluation of one version of the model."""

    step: int
    problems: list[Problem]
    sampling: Sampling
    """The protocol: a score means nothing without it."""
    seconds: float
    confidence: float = 0.95
    names: list[str] = field(default_factory=list)
    """Names of the further graders that judge every problem."""

    @property
    def accuracy(self) -> float:
        """Share of problems answered right under the strict rule."""
        return mean([problem.accuracy for problem in self.problems])

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of the accuracy."""
        return wilson(sum(problem.accuracy for problem in self.problems), len(self.problems), self.confidence)

    @property
    def ungraded(self) -> int:
        """Responses that no grader judged (aborted, timeout, error, unreadable gold); they count as wrong."""
        aborted = FinishReason.ABORT.value
        return sum(p.status not in GRADED or p.finish_reason == aborted for p in self.problems)

    def metrics(self) -> dict[str, float]:
        """`eval/*`, see `docs/metrics.md`."""
        low, high = self.interval
        truncated = FinishReason.LENGTH.value
        return {
            "eval/accuracy": self.accuracy,
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/accuracy_se": standard_error([p.accuracy for p in self.problems]),
            **{f"eval/{name}": mean([p.grades[name] for p in self.problems]) for name in self.names},
            "eval/reward": mean([p.reward for p in self.problems]),
            "eval/length_mean": mean([p.length for p in self.problems]),
            "eval/truncated": mean([p.finish_reason == truncated for p in self.problems]),
            "eval/ungraded": float(self.ungraded),
            "eval/prompts": float(len(self.problems)),
        }

    def write(self, folder: Path, stamp: Mapping[str, Any] | None = None) -> Path:
        """Write `evaluations/step-N.jsonl` (problems) and `step-N.json` (numbers, stamp) in a run folder.

        Returns the path of the problems. Both appear whole or not at all.
        """
        path = folder / FOLDER / f"step-{self.step}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(problem), ensure_ascii=False) for problem in self.problems]
        replace_text(path, "".join(line + "\n" for line in lines))
        summary = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "sampling": asdict(self.sampling),
            "confidence": self.confidence,
            **({"stamp": stamp} if stamp else {}),
            "metrics": {name: value if value == value else None for name, value in self.metrics().items()},
        }
        replace_text(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
        return path


def sampling_for(config: EvaluationConfig, training: Sampling) -> Sampling:
    """Evaluation's own sampling; stops and end tokens, and the limit when it is 0, are training's."""
    return Sampling(
        max_tokens=config.max_new_tokens or training.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p if config.temperature > 0 else 1.0,
        stop=training.stop,
        stop_token_ids=training.stop_token_ids,
    )


def evaluate(
    prompts: Sequence[Prompt],
    generate: Generate,
    score: Score,
    sampling: Sampling,
    *,
    step: int,
    graders: Mapping[str, Grader] | None = None,
    samples: int = 1,
    confidence: float = 0.95,
) -> Evaluation:
    """Answer every prompt `samples` times and grade the answers.

    `graders` adds verdicts by name, reported as `eval/<name>` when the grader can judge every problem.
    `format` is among them unless given: the response ended by itself and an answer could be read from it.
    Raises `ValueError` when there are no
    prompts, or when `generate` does not return one group of `samples` trajectories a prompt, in order.
    """
    if not prompts:
        raise ValueError("nothing to evaluate: the held-out set is empty.")
    opinions = {FORMAT: _ended_with_answer, **(graders or {})}
    started = time.perf_counter()
    groups = generate(prompts, sampling)
    _expect(prompts, groups, samples)
    score(groups)
    problems = [_problem(group.prompt, one, opinions) for group in groups for one in group.trajectories]
    return Evaluation(
        step=step,
        problems=problems,
        sampling=sampling,
        seconds=time.perf_counter() - started,
        confidence=confidence,
        names=[name for name in opinions if all(name in problem.grades for problem in problems)],
    )


def read(path: Path) -> list[Problem]:
    """The problems of one `evaluations/step-N.jsonl`, equal to what was written."""
    return [Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def steps(folder: Path) -> dict[int, Path]:
    """The evaluations in a run's folder: step -> path of its problems, in order of steps."""
    found = {int(path.stem.removeprefix("step-")): path for path in (folder / FOLDER).glob("step-*.jsonl")}
    return dict(sorted(found.items()))


def cut_back(folder: Path, step: int) -> None:
    """Remove the evaluations after `step` from a run's folder."""
    for later, path in steps(folder).items():
        if later > step:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def _problem(prompt: Prompt, response: Trajectory, opinions: Mapping[str, Grader]) -> Problem:
    aborted = response.finish_reason is FinishReason.ABORT
    verdicts = {name: grade(prompt, response) for name, grade in opinions.items()}
    return Problem(
        id=prompt.id,
        prompt=prompt.text,
        answer=prompt.answer,
        response=response.text,
        extracted=response.extracted,
        accuracy=0.0 if aborted else response.accuracy,
        grades={n: 0.0 if aborted else float(v) for n, v in verdicts.items() if v is not None},
        reward=response.reward,
        rewards=dict(response.rewards),
        status=response.grade_status,
        finish_reason=response.finish_reason.value,
        length=response.length,
        sample=response.sample_index,
    )


def _ended_with_answer(prompt: Prompt, response: Trajectory) -> float:
    return float(response.finish_reason is FinishReason.STOP and response.extracted is not None)


def _expect(prompts: Sequence[Prompt], groups: Sequence[Group], samples: int) -> None:
    if [g.prompt.id for g in groups] != [p.id for p in prompts] or any(
        len(g.trajectories) != samples for g in groups
    ):
        raise ValueError(
            f"evaluation asked for {'one response' if samples == 1 else f'{samples} responses'} to each of "
            f"{len(prompts)} prompts, in order, and got {sum(len(g.trajectories) for g in groups)} in "
            f"{len(groups)} groups: mend the generate callable."
        )
