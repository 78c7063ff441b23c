"""`rlhf eval BENCHMARK reproducibility=N`: the same responses under other batches, threads and formats.

Nothing of it may move a response in exact arithmetic. How much it does is measured as LayerCast does
(arXiv 2506.09501, section 3) over N configurations of each number format, each with an engine of its own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.errors import UserError, clear_sentences
from rlhf.evaluate import Asked, folder_of, loaded_engines, prepare, stopping
from rlhf.evaluation.answers import Answers
from rlhf.evaluation.benchmark import BenchmarkConfig
from rlhf.evaluation.divergence import Divergence, divergence
from rlhf.files import replace_text
from rlhf.resume import FolderLock
from rlhf.rewards.base import Scorer
from rollout.config import EngineDtype, EngineProcess, Numerics, RolloutConfig
from rollout.engine_spec import usable_cores

logger = logging.getLogger(__name__)

FORMATS = {
    "bfloat16": (EngineDtype.bfloat16, Numerics.standard),
    "layercast": (EngineDtype.bfloat16, Numerics.layercast),
    "float32": (EngineDtype.float32, Numerics.standard),
}
"""Name of a number format -> weights, and how they are computed with. All read the same checkpoint."""
BATCHES = (1, 8, 32)
PAGE = "reproducibility.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way to compute what should be the same."""

    form: str
    batch: int
    """Most responses decoded at once."""
    threads: int
    """Of the engine."""

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.form}-batch{self.batch}-threads{self.threads}"

    def rollout(self, config: RolloutConfig) -> RolloutConfig:
        """The engine for it. No prefix is cached: a prompt is computed alike, whatever came before it."""
        dtype, numerics = FORMATS[self.form]
        return dataclasses.replace(
            config,
            dtype=dtype,
            numerics=numerics,
            max_num_seqs=self.batch,
            threads=self.threads,
            process=EngineProcess.child,
            prefix_caching=False,
        )


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Every problem answered under one condition."""

    tokens: list[list[int]]
    """Of each response."""
    top1: list[list[float]]
    """Probability of each token; in greedy decoding the largest there was."""
    accuracy: float
    seconds: float
    """Of answering; the engine's start is not in it."""
    peak: float
    """Bytes of main memory that the engine's process has held at once, start included."""


def conditions(count: int) -> list[Condition]:
    """`count` batches and threads in every number format: the batch changes first, then the threads.

    Raises `UserError` for fewer than two, or more than there are.
    """
    threads = sorted({1, usable_cores()})
    settings = [(batch, each) for each in threads for batch in BATCHES]
    if not 2 <= count <= len(settings):
        raise UserError(
            f"reproducibility={count} must lie in 2..{len(settings)}: so many settings of batch and threads "
            "there are here for each number format; 0 evaluates once."
        )
    return [
        Condition(form=form, batch=batch, threads=each)
        for form in FORMATS
        for batch, each in settings[:count]
    ]


def reproduce(recipe: str, config: BenchmarkConfig) -> str:
    """Answer under every condition that is not answered yet; returns the table, and writes it.

    Raises `UserError` for what can be mended, `RunStoppedError` when an engine or the disk ends it.
    """
    _refuse(config)
    with clear_sentences(), Scorer(config.protocol.reward(config.data.answers)) as scorer:
        asked = prepare(recipe, config, scorer)
        folder = folder_of(asked, config, "reproducibility-")
        Answers(folder, asked.stamp)  # what lies there is of this very evaluation, or refused
        found = {}
        with closing(FolderLock(folder)):
            for condition in conditions(config.reproducibility):
                found[condition] = _outcome(condition, config, asked, scorer, folder)
        text = "\n".join([table(found), *_caution(asked)])
        replace_text(folder / PAGE, f"# {asked.name}, {len(asked.prompts)} problems, greedy\n\n{text}\n")
        return f"{text}\n\n{folder / PAGE}"


def _caution(asked: Asked) -> list[str]:
    """A sentence where the formats do not compute with the same numbers."""
    folder = asked.answerer.resolved.folder if asked.answerer.resolved else None
    files = sorted(folder.glob("*.safetensors")) if folder else []
    kinds = sorted({kind for path in files for kind in _kinds(path)})
    if kinds in ([], ["BF16"]):
        return []
    return [
        f"The checkpoint holds {', '.join(kinds)}: float32 reads it as it is, the others round it to "
        "bfloat16, so that their responses differ for that reason too."
    ]


def _kinds(path: Path) -> set[str]:
    """Number formats of the tensors in a file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def _refuse(config: BenchmarkConfig) -> None:
    if config.endpoint.url:
        raise UserError("reproducibility starts engines of its own: leave endpoint.url empty.")
    if config.protocol.temperature > 0:
        raise UserError(
            f"reproducibility compares greedy responses and protocol.temperature="
            f"{config.protocol.temperature:g}: set protocol=greedy."
        )


def _outcome(
    condition: Condition, config: BenchmarkConfig, asked: Asked, scorer: Scorer, folder: Path
) -> Outcome:
    """From the disk where it is there already; else answered now."""
    path = folder / f"{condition.name}.json"
    if path.is_file():
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    logger.info("%s ...", condition.name)
    changed = dataclasses.replace(config, rollout=condition.rollout(config.rollout))
    sampling = changed.protocol.sampling(asked.answerer.end_tokens)
    with stopping(folder), loaded_engines(changed, asked.answerer, folder) as engines:
        begun = time.perf_counter()
        groups = engines.answer(asked.prompts, sampling, 1)
        seconds = time.perf_counter() - begun
        peak = engines.peak()
    scorer.score(groups)
    answers = [group.trajectories[0] for group in groups]
    outcome = Outcome(
        tokens=[list(answer.response_ids) for answer in answers],
        top1=[[math.exp(value) for value in answer.logprobs] for answer in answers],
        accuracy=statistics.fmean(answer.accuracy for answer in answers),
        seconds=seconds,
        peak=peak,
    )
    replace_text(path, json.dumps(asdict(outcome)))
    return outcome


def table(found: dict[Condition, Outcome]) -> str:
    """Markdown: the spread of each number format, and below it what every condition took.

    The spread of the probabilities comes first; accuracy tells least.
    """
    forms = list(dict.fromkeys(condition.form for condition in found))
    by_form = {form: [one for condition, one in found.items() if condition.form == form] for form in forms}
    spread = [
        "| format | std of top-1 probability, x 1e4 | problems that diverge | mean divergence index | std of "
        "length, tokens | accuracy | Std@Acc |",
        "|---|---|---|---|---|---|---|",
        *(_spread_row(form, outcomes) for form, outcomes in by_form.items()),
    ]
    settings = dict.fromkeys((condition.batch, condition.threads) for condition in found)
    names = [f"batch {batch}, threads {threads}" for batch, threads in settings]
    took = [
        f"| seconds, peak MB | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *(_took_row(form, outcomes) for form, outcomes in by_form.items()),
    ]
    return "\n".join([*spread, "", *took])


def _spread(outcomes: Sequence[Outcome]) -> Divergence:
    return divergence(
        examples=list(zip(*(one.tokens for one in outcomes), strict=True)),
        top1=list(zip(*(one.top1 for one in outcomes), strict=True)),
        accuracies=[one.accuracy for one in outcomes],
    )


def _spread_row(form: str, outcomes: Sequence[Outcome]) -> str:
    spread = _spread(outcomes)
    cells = [
        form,
        f"{spread.std_top1 * 1e4:.4f}",
        f"{spread.percent:.1f} %",
        f"{spread.index:.1f}",
        f"{spread.std_length:.3f}",
        f"{statistics.fmean(one.accuracy for one in outcomes):.1%}",
        f"{spread.std_accuracy:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def _took_row(form: str, outcomes: Sequence[Outcome]) -> str:
    """Seconds of answering and the peak of the engine's process, one cell a condition."""
    return f"| {form} | {' | '.join(f'{one.seconds:.1f}, {one.peak / 1e6:.0f}' for one in outcomes)} |"
