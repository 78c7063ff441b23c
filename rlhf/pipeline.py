"""Configuration -> objects: the only place that knows which class serves which section."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from rlhf import environment, models
from rlhf.algorithms.dynamic_sampling import Selector
from rlhf.algorithms.losses import build_loss
from rlhf.clock import Clock
from rlhf.compose import to_dict, to_yaml
from rlhf.config import Config
from rlhf.data.cursor import Cursor
from rlhf.data.prompts import PromptBuilder
from rlhf.data.splits import Splits, load_splits
from rlhf.errors import RunStoppedError, UserError, clear_sentences
from rlhf.evaluation.config import Split
from rlhf.evaluation.graders import second_opinions
from rlhf.evaluation.runner import Evaluation, evaluate, sampling_for
from rlhf.loop import Summary, train
from rlhf.memory import MemoryMonitor
from rlhf.models import ResolvedModel
from rlhf.preflight import run_folder, source_names
from rlhf.rewards.base import Scorer
from rlhf.rewards.config import RewardPartConfig
from rlhf.run import Run
from rlhf.tracking.base import build as build_trackers
from rollout.child_engine import EngineError
from rollout.config import EngineProcess
from rollout.engine import Engine
from rollout.pool import Draw, LocalPool, build_engines
from rollout.recorder import Recorder
from rollout.types import Prompt
from rollout.weights.errors import ProbeError, WeightTransferError
from rollout.weights.probe import probe_sequences
from rollout.weights.publisher import Publisher
from trainer.learner import Learner, NonFiniteError
from trainer.model import load_model

logger = logging.getLogger(__name__)

PYTHON_PART = "reward"
"""Name of the reward part that `rlhf.train(reward=fn)` gives."""


def train_config(
    config: Config,
    recipe: str,
    *,
    reward: Callable[..., Any] | None = None,
    dataset: Sequence[Mapping[str, Any]] | None = None,
) -> Summary:
    """Build and train a configuration.

    Raises `UserError` when it does not fit this machine or data, `RunStoppedError` when it must not go on.
    """
    with clear_sentences():
        run = build(config, recipe, reward=reward, dataset=dataset)
    try:
        with run.memory:
            return train(run)
    except (WeightTransferError, ProbeError, EngineError, NonFiniteError) as error:
        raise RunStoppedError(f"the run stopped in step {run.step + 1}: {error}") from error
    finally:
        run.close()


def evaluate_config(config: Config) -> str:
    """Score `model.path` on the recipe's held-out set; returns the numbers as text."""
    with clear_sentences():
        result = _evaluate(config)
    low, high = result.interval
    lines = [
        f"accuracy {result.accuracy:.1%} (95 % Wilson interval {low:.1%} to {high:.1%}, "
        f"{len(result.problems)} problems)"
    ]
    lines += [f"{name} {value:.4g}" for name, value in result.metrics().items()]
    return "\n".join(lines)


# ---------------------------------------------------------------- building


def build(
    config: Config,
    recipe: str,
    *,
    reward: Callable[..., Any] | None = None,
    dataset: Sequence[Mapping[str, Any]] | None = None,
) -> Run:
    """Load all that a run needs, engines and learner side by side; close what was opened on failure."""
    transformers_logging.disable_progress_bar()
    config = _with_python_parts(config, reward, dataset)
    splits = load_splits(config.data, dataset)
    with ExitStack() as opened:
        scorer = opened.enter_context(Scorer(config.reward, {PYTHON_PART: reward} if reward else None))
        scorer.check_sources(source_names(splits))
        scorer.start()
        trackers = opened.enter_context(build_trackers(config.tracking))
        resolved = models.resolve(config.model)
        tokenizer = models.load_tokenizer(resolved, config.model)
        prompts, heldout = _prompts(config, splits, tokenizer)
        folder = _claim(run_folder(config, recipe))
        learner, engines = _learner_and_engines(config, resolved, folder)
        pool = opened.enter_context(closing(LocalPool(engines, config.run.seed)))
        publisher = opened.enter_context(closing(_publisher(config, engines, prompts, tokenizer, folder)))
        _write_records(config, folder, resolved, scorer)
        sampling = config.rollout.sampling(models.end_token_ids(tokenizer, resolved.folder))
        _announce(resolved, splits, engines, sampling, learner)
        trackers.start(to_dict(config), folder)
        clock = Clock()
        opened.pop_all()
        return Run(
            config=config,
            folder=folder,
            prompts=prompts,
            heldout=heldout,
            cursor=_cursor(config, splits, prompts),
            tokenizer=tokenizer,
            pool=pool,
            sampling=sampling,
            scorer=scorer,
            selector=Selector(config.algorithm.dynamic_sampling, config.loop.prompts),
            learner=learner,
            publisher=publisher,
            graders=second_opinions(config.reward),
            trackers=trackers,
            recorder=Recorder(folder / "rollouts"),
            clock=clock,
            memory=MemoryMonitor(phase=lambda: clock.phase),
        )


def _cursor(config: Config, splits: Splits, prompts: dict[str, list[Prompt]]) -> Cursor:
    sizes = {name: len(group) for name, group in prompts.items()}
    return Cursor(sizes, seed=config.run.seed, weights=splits.weights, epochs=config.data.epochs)


def _publisher(
    config: Config, engines: list[Engine], prompts: dict[str, list[Prompt]], tokenizer: Any, folder: Path
) -> Publisher:
    """The channel to the engines; the probe is a few training prompts and random tokens."""
    some = [prompt.token_ids for group in prompts.values() for prompt in group[:8]]
    gpus = _gpus()
    return Publisher(
        engines,
        config.weights,
        probe_sequences(some, vocabulary=len(tokenizer)),
        tensor_parallel=config.rollout.tensor_parallel,
        folder=folder,
        on_gpu=gpus.engines,
        shares_gpu=gpus.shared,
        frozen=None if config.learner.freeze or config.learner.lora.rank else (),
    )


def _claim(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be created ({error.strerror}): choose another.") from error
    return folder


def _with_python_parts(
    config: Config, reward: Callable[..., Any] | None, dataset: Sequence[Mapping[str, Any]] | None
) -> Config:
    """A configuration in which a Python reward and Python rows have taken the place of the recipe's."""
    if reward is not None:
        parts = {PYTHON_PART: RewardPartConfig(kind="function")}
        config = dataclasses.replace(
            config, reward=dataclasses.replace(config.reward, parts=parts, accuracy_from="")
        )
    if dataset is not None:
        spare = len(dataset) // 4
        data = config.data
        if max(data.validation, data.heldout) > spare:
            logger.warning(
                "data.validation=%d and data.heldout=%d are for more than %d rows: here they are at most %d.",
                data.validation,
                data.heldout,
                len(dataset),
                spare,
            )
            data = dataclasses.replace(
                data, validation=min(data.validation, spare), heldout=min(data.heldout, spare)
            )
        config = dataclasses.replace(config, data=data)
    return config


def _prompts(config: Config, splits: Splits, tokenizer: Any) -> tuple[dict[str, list[Prompt]], list[Prompt]]:
    """Training prompts by source and held-out prompts, rendered; what the length filter left out is said."""
    builder = PromptBuilder(tokenizer, config.data, config.model)
    training: dict[str, list[Prompt]] = {}
    for name, examples in splits.train.items():
        built = builder.build(examples)
        logger.info("%s: %s", name, built.line())
        training[name] = built.prompts
    evaluated = splits.validation if config.evaluation.split is Split.validation else splits.heldout
    built = builder.build(evaluated)
    if evaluated:
        logger.info("%s: %s", config.evaluation.split, built.line())
    limit = config.evaluation.prompts or len(built.prompts)
    return training, built.prompts[:limit]


def _learner_and_engines(
    config: Config, resolved: ResolvedModel, folder: Path
) -> tuple[Learner, list[Engine]]:
    """Load engines and learner at the same time; an engine in this process is loaded first."""
    if config.rollout.process is EngineProcess.inprocess:
        engines = _engines(config, resolved, folder)
        return _learner(config, resolved, folder), engines
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(_engines, config, resolved, folder)
        try:
            learner = _learner(config, resolved, folder)
        except BaseException:
            for engine in loading.result():
                engine.close()
            raise
        return learner, loading.result()


def _engines(config: Config, resolved: ResolvedModel, folder: Path) -> list[Engine]:
    gpus = _gpus()
    longest = max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens)
    return build_engines(
        config.rollout,
        model=str(resolved.folder),
        tokenizer=str(resolved.tokenizer_folder),
        length=config.data.max_prompt_tokens + longest,
        seed=config.run.seed,
        transport=config.weights.resolve(on_gpu=gpus.engines, shares_gpu=gpus.shared).value,
        trust_remote_code=resolved.trust_remote_code,
        log_folder=folder / "logs",
    )


def _learner(config: Config, resolved: ResolvedModel, folder: Path) -> Learner:
    profile = dataclasses.replace(
        config.learner.profile, folder=config.learner.profile.folder or str(folder / "profile")
    )
    return Learner(
        dataclasses.replace(config.learner, profile=profile),
        load_model(resolved.folder, trust_remote_code=resolved.trust_remote_code),
        loss=build_loss(config.algorithm),
        temperature=config.rollout.temperature,
        total_steps=config.loop.steps,
        seed=config.run.seed,
        needs_reference=config.algorithm.kl.coefficient > 0,
        adapter=resolved.adapter,
    )


@dataclass(frozen=True, slots=True)
class _Gpus:
    """Whether engines run on GPUs, and on the learner's."""

    engines: bool
    shared: bool


def _gpus() -> _Gpus:
    """Engines take a GPU when there is one, and share the learner's when there is no other."""
    available = torch.cuda.is_available()
    return _Gpus(engines=available, shared=available and torch.cuda.device_count() == 1)


def _write_records(config: Config, folder: Path, resolved: ResolvedModel, scorer: Scorer) -> None:
    """What ran: every key, the model, the graders by version, the machine."""
    graders = ", ".join(f"{part}={label}" for part, label in scorer.graders().items())
    head = f"# @package _global_\n# model: {resolved.description}\n# graders: {graders}\n"
    (folder / "config.yaml").write_text(head + to_yaml(config))
    environment.write(folder)


def _announce(
    resolved: ResolvedModel,
    splits: Splits,
    engines: list[Engine],
    sampling: Any,
    learner: Learner,
) -> None:
    """What is about to run, in a few lines: model, data, and every sampling parameter that has an effect."""
    logger.info("model: %s", resolved.description)
    for line in splits.lines():
        logger.info("data: %s", line)
    logger.info("sampling: %s", engines[0].effective_sampling(sampling))
    if not learner.policy.shares_prompts:
        logger.info("prompts are not shared in the learner: %s", learner.policy.why_not_shared)


# ---------------------------------------------------------------- evaluation alone


def _evaluate(config: Config) -> Evaluation:
    """Build just what answering the held-out set needs."""
    splits = load_splits(config.data)
    evaluated = splits.validation if config.evaluation.split is Split.validation else splits.heldout
    if not evaluated:
        raise UserError(
            f"data.{config.evaluation.split}=0 leaves nothing to evaluate: set it to a number of problems."
        )
    scorer = Scorer(config.reward)
    scorer.check_sources(sorted({example.source for example in evaluated}))
    resolved = models.resolve(config.model)
    tokenizer = models.load_tokenizer(resolved, config.model)
    prompts = PromptBuilder(tokenizer, config.data, config.model).build(evaluated).prompts
    engines = build_engines(
        config.rollout,
        model=str(resolved.folder),
        tokenizer=str(resolved.tokenizer_folder),
        length=config.data.max_prompt_tokens
        + max(config.rollout.max_new_tokens, config.evaluation.max_new_tokens),
        seed=config.run.seed,
        trust_remote_code=resolved.trust_remote_code,
    )
    pool = LocalPool(engines, config.run.seed)
    training = config.rollout.sampling(models.end_token_ids(tokenizer, resolved.folder))
    try:
        return evaluate(
            prompts[: config.evaluation.prompts or None],
            lambda asked, sampling: pool.generate(
                [Draw(prompt=p, group_id=f"eval/{p.id}", samples=1) for p in asked],
                sampling,
                born=0,
                decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            ),
            scorer.score,
            sampling_for(config.evaluation, training),
            step=0,
            graders=second_opinions(config.reward),
        )
    finally:
        pool.close()
        scorer.close()
