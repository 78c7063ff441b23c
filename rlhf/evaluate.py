"""`rlhf eval BENCHMARK`: ask, answer round by round, grade, and say how sure the number is."""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from rlhf import environment, faults, models
from rlhf.compose import RECIPES, to_yaml
from rlhf.data.examples import Example
from rlhf.data.prompts import PromptBuilder, chat
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
    """Of the benchmark."""
    answerer: Answerer
    stamp: Stamp

    @property
    def prompts(self) -> list[Prompt]:
        """In order."""
        return self.answerer.prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Answerer:
    """A model with our engines, or a server, and the prompts as it takes them."""

    prompts: list[Prompt]
    stamped: dict[str, Any]
    """Its parts of the stamp: model, engine, numerics, versions."""
    resolved: ResolvedModel | None = None
    """None for a server."""
    tokenizer: Any = None
    messages: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """The chats by prompt id, for a server."""

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
        with stopping(folder):
            if done < len(rounds):
                with responding(config, asked.answerer, folder) as responder:
                    _answer(rounds[done:], config, asked, answers, scorer, responder)
            return _finish(asked, config, answers)


def prepare(recipe: str, config: BenchmarkConfig, scorer: Scorer) -> Asked:
    """Problems, model, prompts and stamp; nothing is generated. Raises `UserError`."""
    name, kind = benchmark_name(recipe, config), config.data.answers
    examples = read_problems(config.data, name)
    answerer = _server(config, examples) if config.endpoint.url else _model(config, examples)
    full = Stamp(
        protocol=stamp.protocol_part(config.protocol, kind, _preset_digest(config)),
        data={"path": config.data.path, "digest": data_digest(examples), "problems": len(examples)},
        prompts=digest([prompt.text for prompt in answerer.prompts]),
        grader=stamp.grader_part(scorer.graders()[PART]),
        seed=config.run.seed,
        round=config.round_size,
        **answerer.stamped,
    )
    return Asked(name=name, answerer=answerer, stamp=full)


def _model(config: BenchmarkConfig, examples: Sequence[Example]) -> Answerer:
    """The model that our engines will load."""
    resolved = models.resolve(config.model)
    tokenizer = models.load_tokenizer(resolved, config.model)
    prompts = PromptBuilder(tokenizer, data_config(config), config.model).build(examples).prompts
    _check_length(config, resolved.folder, prompts)
    weights = stamp.weights_digest(resolved.folder, resolved.adapter)
    stamped = {
        "model": {"description": resolved.description, "weights": weights},
        "engine": {"kind": "vllm", "device": environment.device()},
        "numerics": stamp.numerics_part(config.rollout),
        "versions": stamp.engine_versions(),
    }
    return Answerer(prompts=prompts, stamped=stamped, resolved=resolved, tokenizer=tokenizer)


def _server(config: BenchmarkConfig, examples: Sequence[Example]) -> Answerer:
    """The server, which keeps its weights and number format to itself. Raises `UserError` when it is away."""
    try:
        served = responders.connect(config.endpoint, config.run.seed).model
    except EndpointError as error:
        raise UserError(str(error)) from error
    data = data_config(config)
    messages = {example.id: chat(example, data) for example in examples}
    stamped = {
        "model": {"description": f"{served} at {config.endpoint.url}", "weights": "unknown"},
        "engine": {"kind": "endpoint", "device": config.endpoint.url},
        "numerics": {"dtype": "unknown"},
        "versions": {},
    }
    prompts = [_chat_prompt(example, messages[example.id]) for example in examples]
    return Answerer(prompts=prompts, stamped=stamped, messages=messages)


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
def responding(config: BenchmarkConfig, answerer: Answerer, folder: Path) -> Iterator[Responder]:
    """Who answers: our engines with the model, or the server."""
    if answerer.resolved is None:
        yield responders.Server(responders.connect(config.endpoint, config.run.seed), answerer.messages)
        return
    with loaded_engines(config, answerer, folder) as responder:
        yield responder


@contextmanager
def loaded_engines(config: BenchmarkConfig, answerer: Answerer, folder: Path) -> Iterator[responders.Engines]:
    """Engines with the model of `answerer`; an adapter is merged first, they log into `folder`.

    Raises ValueError for a server's.
    """
    resolved = answerer.resolved
    if resolved is None:
        raise ValueError("A server answers: there is no model to load.")
    with ExitStack() as opened:
        model = resolved.folder
        if resolved.adapter is not None:
            model = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="whetstone-merged-")))
            merge_adapter(resolved, getattr(torch, config.rollout.dtype.value), model)
        logger.info("model: %s", resolved.description)
        length = _longest(answerer.prompts) + config.protocol.max_new_tokens
        engines = responders.engines(config, resolved, model, answerer.tokenizer, length, folder / "logs")
        yield opened.enter_context(engines)


def _answer(
    rounds: Sequence[Sequence[Prompt]],
    config: BenchmarkConfig,
    asked: Asked,
    answers: Answers,
    scorer: Scorer,
    responder: Responder,
) -> None:
    """Answer and grade what is left, and say after every round where the score stands."""
    samples, sampling = config.protocol.samples, config.protocol.sampling(asked.answerer.end_tokens)
    total, begun, before = len(asked.prompts), time.monotonic(), len(answers.problems)
    for prompts in rounds:
        result = evaluate(
            prompts,
            lambda ready, sampling: responder.answer(ready, sampling, samples),
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
    full = dataclasses.replace(asked.stamp, counts=found.plain()["counts"])
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
