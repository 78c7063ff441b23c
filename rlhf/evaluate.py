"""`rlhf eval BENCHMARK`: ask, answer round by round, grade, and say how sure the number is."""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from rlhf import environment, faults, models
from rlhf.compose import RECIPES, to_yaml
from rlhf.data.examples import Example
from rlhf.data.prompts import PromptBuilder
from rlhf.errors import RunStoppedError, UserError, clear_sentences
from rlhf.evaluation import page, responders, stamp
from rlhf.evaluation.answers import Answers
from rlhf.evaluation.benchmark import BenchmarkConfig
from rlhf.evaluation.problems import benchmark_name, data_config, data_digest, read_problems
from rlhf.evaluation.protocol import PART, ProtocolConfig, content, digest
from rlhf.evaluation.responders import Responder
from rlhf.evaluation.result import progress, summarize
from rlhf.evaluation.runner import evaluate
from rlhf.evaluation.stamp import Stamp
from rlhf.files import replace_text
from rlhf.merging import merge_adapter
from rlhf.models import ResolvedModel
from rlhf.resume import FolderLock
from rlhf.rewards.base import Scorer
from rollout.engine_spec import max_positions
from rollout.errors import EndpointError, EngineError
from rollout.types import Prompt

logger = logging.getLogger(__name__)

FOLDER = Path("evaluations")
"""Where evaluations lie that are given no `run.dir`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked, of whom, and under which stamp."""

    name: str
    prompts: list[Prompt]
    messages: dict[str, list[dict[str, str]]]
    """The chats by prompt id, for a server."""
    resolved: ResolvedModel | None
    """None when a server answers."""
    tokenizer: Any
    stamp: Stamp

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Of the model; a server knows its own."""
        return models.end_token_ids(self.tokenizer, self.resolved.folder) if self.resolved else ()


def evaluate_benchmark(recipe: str, config: BenchmarkConfig) -> str:
    """Run or go on with a benchmark; returns the numbers as text, and writes them beside the responses.

    Raises `UserError` for what can be mended, and `RunStoppedError` when an engine, a server or the disk
    ends it: what was answered is kept, and the same command goes on.
    """
    with clear_sentences(), ExitStack() as opened:
        scorer = opened.enter_context(Scorer(config.protocol.reward(config.data.answers)))
        asked = prepare(recipe, config, scorer)
        folder = folder_of(asked, config)
        answers = Answers(folder, asked.stamp)
        opened.enter_context(closing(FolderLock(folder)))
        replace_text(folder / "config.yaml", f"# @package _global_\n# {recipe}\n{to_yaml(config)}")
        environment.write(folder)
        rounds = _rounds(asked.prompts, config)
        done = answers.whole([len(prompts) * config.protocol.samples for prompts in rounds])
        logger.info("evaluation: %s", folder)
        if done < len(rounds):
            with stopping(folder), responding(config, asked, folder) as responder:
                _answer(rounds[done:], config, asked, answers, scorer, responder)
        return _finish(asked, config, answers)


def prepare(recipe: str, config: BenchmarkConfig, scorer: Scorer) -> Asked:
    """Problems, model, prompts and stamp; nothing is generated. Raises `UserError`."""
    examples = read_problems(config.data, benchmark_name(recipe, config))
    if config.endpoint.url:
        served = _connected(config)
        tokenizer, resolved = None, None
        builder = PromptBuilder(_ChatOnly(), data_config(config), config.model)  # type: ignore[arg-type]
        messages = {example.id: builder.messages(example) for example in examples}
        prompts = [_chat_prompt(example, messages[example.id]) for example in examples]
        model = {"description": f"{served} at {config.endpoint.url}", "weights": "unknown"}
        device, numerics, versions = config.endpoint.url, {"dtype": "unknown"}, {}
    else:
        resolved = models.resolve(config.model)
        tokenizer = models.load_tokenizer(resolved, config.model)
        prompts = PromptBuilder(tokenizer, data_config(config), config.model).build(examples).prompts
        messages = {}
        _check_length(config, resolved.folder, prompts)
        weights = stamp.weights_digest(resolved.folder, resolved.adapter)
        model = {"description": resolved.description, "weights": weights}
        device = environment.device()
        numerics, versions = stamp.numerics_part(config.rollout), stamp.engine_versions()
    answers = config.data.answers
    return Asked(
        name=benchmark_name(recipe, config),
        prompts=prompts,
        messages=messages,
        resolved=resolved,
        tokenizer=tokenizer,
        stamp=Stamp(
            protocol=stamp.protocol_part(config.protocol, answers, _preset_digest(config)),
            data={"path": config.data.path, "digest": data_digest(examples), "problems": len(examples)},
            prompts=digest([prompt.text for prompt in prompts]),
            grader=stamp.grader_part(scorer.graders()[PART]),
            model=model,
            engine={"kind": "endpoint" if config.endpoint.url else "vllm", "device": device},
            numerics=numerics,
            versions=versions,
            seed=config.run.seed,
            round=config.round_size,
        ),
    )


class _ChatOnly:
    """Stands for a tokenizer where a server applies the template."""

    chat_template = "the server's"


def _connected(config: BenchmarkConfig) -> str:
    """The model that the server has. Raises `UserError` when it does not answer."""
    try:
        return responders.connect(config.endpoint, config.run.seed).model
    except EndpointError as error:
        raise UserError(str(error)) from error


def _chat_prompt(example: Example, messages: list[dict[str, str]]) -> Prompt:
    text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
    return Prompt(
        id=example.id, token_ids=[], text=text, answer=example.answer, source=example.source, row=example.row
    )


def _check_length(config: BenchmarkConfig, folder: Path, prompts: Sequence[Prompt]) -> None:
    limit, longest = max_positions(str(folder)), _longest(prompts)
    if limit is not None and longest + config.protocol.max_new_tokens > limit:
        raise UserError(
            f"the longest prompt ({longest} tokens) + protocol.max_new_tokens="
            f"{config.protocol.max_new_tokens} are more than model.path={config.model.path} has positions "
            f"(max_position_embeddings={limit}): set protocol.max_new_tokens={limit - longest} or less; the "
            f"stamp will say so."
        )


def _longest(prompts: Sequence[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


def _preset_digest(config: BenchmarkConfig) -> str:
    """Of the shipped protocol of that name as it stands, empty when there is none."""
    path = RECIPES / "protocol" / f"{config.protocol.name}.yaml"
    if not path.is_file():
        return ""
    preset = ProtocolConfig(**yaml.safe_load(path.read_text(encoding="utf-8")))
    values = content(preset, config.data.answers)
    grader = values["graders"] or {}
    return digest({**values, "graders": {"kind": grader.get("kind", ""), "args": grader.get("args", {})}})


def folder_of(asked: Asked, config: BenchmarkConfig, kind: str = "") -> Path:
    """`run.dir`, else `evaluations/aime24-dapo-0a1b2c3d`: equal for equal stamps, so that the same command
    finds what it began."""
    parts = [asked.name, config.protocol.name or "unnamed", asked.stamp.digest[:8]]
    return (
        Path(config.run.dir) if config.run.dir else FOLDER / re.sub(r"[^\w.@-]+", "-", kind + "-".join(parts))
    )


def _rounds(prompts: Sequence[Prompt], config: BenchmarkConfig) -> list[list[Prompt]]:
    """The problems that are handed over together: whole ones, in order, at least one."""
    each = max(1, config.round_size // config.protocol.samples)
    return [list(prompts[start : start + each]) for start in range(0, len(prompts), each)]


@contextmanager
def responding(config: BenchmarkConfig, asked: Asked, folder: Path) -> Iterator[Responder]:
    """Who answers; an adapter is merged into the weights first."""
    with ExitStack() as opened:
        if asked.resolved is None:
            yield opened.enter_context(responders.server(config.endpoint, config.run.seed, asked.messages))
            return
        model = asked.resolved.folder
        if asked.resolved.adapter is not None:
            model = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="whetstone-merged-")))
            merge_adapter(asked.resolved, getattr(torch, config.rollout.dtype.value), model)
        logger.info("model: %s", asked.resolved.description)
        length = _longest(asked.prompts) + config.protocol.max_new_tokens
        yield opened.enter_context(
            responders.engines(config, asked.resolved, model, asked.tokenizer, length, folder / "logs")
        )


def _answer(
    rounds: Sequence[Sequence[Prompt]],
    config: BenchmarkConfig,
    asked: Asked,
    answers: Answers,
    scorer: Scorer,
    responder: Responder,
) -> None:
    """Answer and grade what is left, and say after every round where the score stands."""
    samples, sampling = config.protocol.samples, config.protocol.sampling(asked.end_tokens)
    total, begun, before = len(asked.prompts), time.monotonic(), len(answers.problems)
    for prompts in rounds:
        result = evaluate(
            prompts,
            lambda ready, sampling: responder(ready, sampling, samples),
            scorer.score,
            sampling,
            step=0,
            samples=samples,
        )
        answers.append(result.problems)
        fresh = len(answers.problems) - before
        left = (time.monotonic() - begun) / fresh * (total * samples - len(answers.problems))
        logger.info("%s", progress(answers.problems, samples, total, left))


def _finish(asked: Asked, config: BenchmarkConfig, answers: Answers) -> str:
    """Numbers, stamp and report of a whole evaluation."""
    found = summarize(answers.problems, config.protocol.samples)
    full = dataclasses.replace(asked.stamp, counts=found.counts)
    answers.finish(full, found.plain())
    page.write(answers.folder, asked.name, full, found, answers.problems)
    return page.text(asked.name, full, found, answers.folder)


@contextmanager
def stopping(folder: Path) -> Iterator[None]:
    """What ends an evaluation in its midst, in one sentence."""
    try:
        yield
    except (EngineError, EndpointError, OSError) as error:
        said = (
            faults.disk_trouble(error, "the responses", folder) if isinstance(error, OSError) else str(error)
        )
        if not said:
            raise
        raise RunStoppedError(
            f"the evaluation stopped: {said} What is in {folder} is kept, and the same command goes on "
            "after it."
        ) from error
