"""Configuration -> objects: the only place that knows which class serves which section."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from rlhf import environment, faults, initial_weights, models, report, resume, state_file
from rlhf.ahead import Ahead
from rlhf.algorithms.dynamic_sampling import Selector
from rlhf.checkpoint import Checkpoints
from rlhf.clock import Clock
from rlhf.compose import to_dict, to_yaml
from rlhf.config import Config
from rlhf.data.cursor import Cursor
from rlhf.data.prompts import PromptBuilder
from rlhf.data.splits import Splits, load_splits
from rlhf.distributed import build_learner, follow_config, joined
from rlhf.errors import InterruptedRunError, UserError, clear_sentences
from rlhf.evaluation.config import Split
from rlhf.evaluation.graders import second_opinions
from rlhf.evaluation.runner import Evaluation, evaluate, sampling_for
from rlhf.evaluation.stamp import of_training
from rlhf.files import replace_text
from rlhf.generation import Direct, Generation, Resting, Source
from rlhf.interruption import end_with_torchrun
from rlhf.launching import launched
from rlhf.ledger import Ledger
from rlhf.loop import Summary, train
from rlhf.memory import MemoryMonitor
from rlhf.merging import merge_adapter
from rlhf.models import ResolvedModel
from rlhf.placement import Placement, placement_of
from rlhf.preflight import check_length, check_packages, claim_run_folder, config_file, source_names
from rlhf.rank_watch import Followers
from rlhf.resume import FolderLock
from rlhf.rewards.base import Scorer
from rlhf.rewards.config import RewardPartConfig
from rlhf.run import Run
from rlhf.tracking.base import build as build_trackers
from rlhf.watchdog import Watchdog
from rollout.config import EngineProcess
from rollout.engine import Engine
from rollout.errors import EngineError
from rollout.host import EngineHost
from rollout.pool import Draw, LocalPool, build_engines, open_host
from rollout.recorder import Recorder
from rollout.turns import Turns
from rollout.types import Prompt
from rollout.weights.probe import probe_length, probe_sequences
from rollout.weights.publisher import Publisher
from trainer.errors import described
from trainer.learner import Learner
from trainer.parallel.mesh import Team
from trainer.parallel.world import World

if TYPE_CHECKING:
    from trainer.parallel.ray_cluster import Places

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

    Under torchrun every rank calls this; ranks above 0 hold their part of the learner until rank 0 ends, and
    then leave the process (`SystemExit`). Raises `UserError` when it does not fit this machine or data,
    `RunStoppedError` when it must not go on, `InterruptedRunError` (a `KeyboardInterrupt`) when SIGINT or
    SIGTERM ended it.
    """
    world = World.from_environment()
    end_with_torchrun(world)
    if world.follows:
        raise SystemExit(follow_config(config))
    with launched(config) as ranks, joined(config, ranks.lost if ranks else None) as team:
        with faults.stopping(config, lambda: "the run could not start"), clear_sentences():
            places = ranks.places if ranks else None
            run = build(config, recipe, reward=reward, dataset=dataset, team=team, places=places)
        return _train(run, team)


def _train(run: Run, team: Team | None) -> Summary:
    """Train what is built, close it, and write its report, however it ends."""
    try:
        with _watched(run, team):
            summary = train(run)
    except KeyboardInterrupt:
        raise _interrupted(run, f"interrupted in step {run.step + 1}") from None
    finally:
        run.close()
        _write_report(run.folder)
    if not run.finished:
        raise _interrupted(run, f"interrupted after step {run.step} of {run.config.loop.steps}")
    return summary


def _interrupted(run: Run, what: str) -> InterruptedRunError:
    """`what` happened and how to go on."""
    return InterruptedRunError(f"{what}: {_how_to_go_on(run)}", run.interruption.status)


def _how_to_go_on(run: Run) -> str:
    return f"the same command with run.dir={run.folder} resume=auto goes on {_where(run)}."


def _what_follows(run: Run) -> str:
    """How a run goes on that had to stop."""
    world = World.from_environment()
    if world.restart < world.restarts:
        number = f"{world.restart + 1} of {world.restarts}"
        return f"torchrun starts it again (restart {number}), to go on {_where(run)}."
    return f"Then {_how_to_go_on(run)}"


def _where(run: Run) -> str:
    saved = run.checkpoints.steps()
    return f"after step {saved[-1]}" if saved else "from the beginning, nothing is saved yet"


def _moment(run: Run) -> str:
    """Where in the run an exception has just left it."""
    closing = run.clock.failed in ("evaluation", "tracking", "checkpoint")
    return f"after step {run.step}" if closing else f"in step {run.step + 1}"


@contextmanager
def _watched(run: Run, team: Team | None) -> Iterator[None]:
    """Measure memory, listen to signals, watch for hangs; what must end the run is said in one sentence."""
    stopping = faults.stopping(
        run.config,
        lambda: f"the run stopped {_moment(run)}",
        phase=lambda: run.clock.failed,
        folder=lambda: run.folder,
        then=lambda: _what_follows(run),
    )
    watchdog = Watchdog(
        run.config.run.watchdog_minutes,
        run.clock,
        run.folder,
        step=lambda: run.step + 1,
        engine_stacks=run.pool.stacks,
        followers=Followers(team.roll_call) if team else None,
    )
    with stopping, run.memory, watchdog, run.interruption:
        yield


def evaluate_config(config: Config) -> str:
    """Score `model.path` on the recipe's held-out set; returns the numbers as text."""
    with faults.stopping(config, lambda: "the evaluation stopped"), clear_sentences():
        result = _evaluate(config)
    low, high = result.interval
    lines = [
        f"accuracy {result.accuracy:.1%} (95 % Wilson interval {low:.1%} to {high:.1%}, "
        f"{len(result.problems)} problems)"
    ]
    lines += [f"{name} {value:.4g}" for name, value in result.metrics().items()]
    return "\n".join(lines)


def _write_report(folder: Path) -> None:
    """`report.md` of all that was logged, also of a run that stopped; it never hides why that one did."""
    try:
        report.write(folder)
    except UserError:
        return  # stopped before anything was logged
    except Exception as error:
        disk = faults.disk_trouble(error, "the report", folder)
        if disk:
            logger.error(disk)
        else:
            logger.exception("The report of %s could not be written.", folder)


# ---------------------------------------------------------------- building


def build(
    config: Config,
    recipe: str,
    *,
    reward: Callable[..., Any] | None = None,
    dataset: Sequence[Mapping[str, Any]] | None = None,
    team: Team | None = None,
    places: Places | None = None,
) -> Run:
    """Load all that a run needs, engines and learner side by side; close what was opened on failure.

    `team`: this process among the learner's ranks; `places`: taken in a Ray cluster, the engines' first.
    """
    transformers_logging.disable_progress_bar()
    check_packages(config)
    config = _with_python_parts(config, reward, dataset)
    splits = load_splits(config.data, dataset)
    with ExitStack() as opened:
        scorer = opened.enter_context(Scorer(config.reward, {PYTHON_PART: reward} if reward else None))
        scorer.check_sources(source_names(splits))
        scorer.start()
        trackers = opened.enter_context(build_trackers(config.tracking))
        resolved = initial_weights.attach(models.resolve(config.model), config)
        check_length(config, resolved.folder)
        tokenizer = models.load_tokenizer(resolved, config.model)
        prompts, heldout = _prompts(config, splits, tokenizer)
        placement = placement_of(config.rollout, ranks=World.from_environment().local_size)
        folder = claim_run_folder(config, recipe)
        lock = opened.enter_context(closing(FolderLock(folder)))
        start = resume.find(config, folder)
        if start is None:  # what fails to load may be tried again
            opened.callback(config_file(folder).unlink, missing_ok=True)
        else:
            initial_weights.agree(resolved.initial, folder)
        host = opened.enter_context(closing(open_host(config.rollout, placement.engines, places)))
        learner, engines = _learner_and_engines(config, resolved, folder, placement, team, host)
        pool = opened.enter_context(closing(LocalPool(engines, config.run.seed, host)))
        probe = _probe(config, prompts, tokenizer)
        publisher = opened.enter_context(
            closing(_publisher(config, engines, probe, learner, placement, host, folder))
        )
        sampling = config.rollout.sampling(models.end_token_ids(tokenizer, resolved.folder))
        _announce(resolved, splits, engines, sampling, learner)
        clock, ledger = Clock(), opened.enter_context(closing(Ledger(folder)))
        generation = Generation(
            config=config,
            prompts=prompts,
            cursor=_cursor(config, splits, prompts),
            selector=Selector(config.algorithm.dynamic_sampling, config.loop.prompts),
            pool=pool,
            turns=Turns(),
            sampling=sampling,
            scorer=scorer,
            learner=learner,
            decode=functools.partial(_decode, tokenizer),
            updates=lambda: publisher.version - 1,
            ledger=ledger,
        )
        run = Run(
            config=config,
            folder=folder,
            lock=lock,
            checkpoints=Checkpoints(folder, config.checkpoint),
            heldout=heldout,
            generation=generation,
            source=_source(config, generation, clock),
            cursor=generation.cursor,
            selector=generation.selector,
            tokenizer=tokenizer,
            pool=pool,
            turns=generation.turns,
            sampling=sampling,
            scorer=scorer,
            learner=learner,
            publisher=publisher,
            stamp=of_training(config, heldout, scorer.graders(), resolved.description),
            graders=second_opinions(config.reward),
            trackers=trackers,
            recorder=Recorder(folder / "rollouts"),
            ledger=ledger,
            clock=clock,
            memory=MemoryMonitor(phase=lambda: clock.phase),
        )
        run_ids = _go_on(run, start) if start else {}
        ledger.begin(max(start.step, 0) if start else 0)
        _write_records(config, folder, resolved, scorer)
        trackers.start(to_dict(config), folder, start.step if start else None, run_ids)
        opened.pop_all()
        return run


def _go_on(run: Run, start: resume.Start) -> dict[str, str]:
    """Bring the run to where it begins and remove what was recorded after that; its names in trackers."""
    state = state_file.read(start.state) if start.state else {}
    if state:
        run.load_state_dict(state)
        logger.info("%s goes on after step %d.", run.folder, start.step)
    resume.cut_back(run.folder, start.step)
    return state.get("trackers", {})


def _source(config: Config, generation: Generation, clock: Clock) -> Source:
    """Where steps get their groups from: generated when they ask, or up to `loop.staleness` steps ahead."""
    loop, level = config.loop, config.rollout.sleep_level
    if loop.staleness:
        return Ahead(generation, clock, lead=loop.staleness, last=loop.steps)
    direct = Direct(generation, clock)
    return Resting(direct, generation.pool, level, clock) if level else direct


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    """Text of a response without special tokens."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def _cursor(config: Config, splits: Splits, prompts: dict[str, list[Prompt]]) -> Cursor:
    sizes = {name: len(group) for name, group in prompts.items()}
    return Cursor(sizes, seed=config.run.seed, weights=splits.weights, epochs=config.data.epochs)


def _probe(config: Config, prompts: dict[str, list[Prompt]], tokenizer: Any) -> list[list[int]]:
    """A few training prompts and random tokens, no longer than the engines take."""
    some = [prompt.token_ids for group in prompts.values() for prompt in group[:8]]
    length = probe_length(config.rollout.max_model_len or config.longest_sequence)
    return probe_sequences(some, vocabulary=len(tokenizer), length=length)


def _publisher(
    config: Config,
    engines: list[Engine],
    probe: list[list[int]],
    learner: Learner,
    placement: Placement,
    host: EngineHost,
    folder: Path,
) -> Publisher:
    """The channel to the engines. Under an adapter or `freeze`, which tensors stay is not known by name."""
    return Publisher(
        engines,
        config.weights,
        probe,
        tensor_parallel=config.rollout.tensor_parallel,
        folder=folder,
        on_gpu=placement.on_gpu,
        shares_gpu=placement.shared,
        one_machine=host.one_machine,
        address=host.address,
        frozen=None if config.learner.freeze or learner.has_adapter else (),
        learner_dtype="float32" if config.layercast else config.learner.dtype.value,
        engine_dtype=config.rollout.compute_dtype.value,
    )


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
    config: Config,
    resolved: ResolvedModel,
    folder: Path,
    placement: Placement,
    team: Team | None,
    host: EngineHost,
) -> tuple[Learner, list[Engine]]:
    """Load engines and learner at the same time; first the engine in this process, or on the learner's GPU.

    vLLM measures free GPU memory while it loads, which nobody else may take meanwhile.
    """
    load = functools.partial(
        _engines,
        config,
        str(resolved.folder),
        resolved,
        host,
        transport=config.weights.resolve(
            on_gpu=placement.on_gpu, shares_gpu=placement.shared, one_machine=host.one_machine
        ).value,
        log_folder=folder / "logs",
    )
    with ThreadPoolExecutor(1) as thread:
        loading: Future[list[Engine]] = Future()
        if config.rollout.process is EngineProcess.inprocess or placement.shared:
            loading.set_result(load())
        else:
            loading = thread.submit(load)
        try:
            learner = build_learner(config, resolved, folder, team)
        except BaseException:
            for engine in [] if loading.exception() else loading.result():
                engine.close()
            raise
        return learner, loading.result()


def _engines(
    config: Config, model: str, resolved: ResolvedModel, host: EngineHost, **options: Any
) -> list[Engine]:
    """Engines of the model in folder `model`, with the tokenizer of `resolved`, on `host`."""
    try:
        return build_engines(
            config.rollout,
            model=model,
            tokenizer=str(resolved.tokenizer_folder),
            length=config.longest_sequence,
            seed=config.run.seed,
            trust_remote_code=resolved.trust_remote_code,
            host=host,
            **options,
        )
    except EngineError:
        raise
    except RuntimeError as error:
        raise EngineError(f"an engine could not be loaded: {described(error)}.") from error


def _write_records(config: Config, folder: Path, resolved: ResolvedModel, scorer: Scorer) -> None:
    """What ran: every key, the model, the graders by version, the machine."""
    graders = ", ".join(f"{part}={label}" for part, label in scorer.graders().items())
    head = f"# @package _global_\n# model: {resolved.description}\n# graders: {graders}\n"
    replace_text(config_file(folder), head + to_yaml(config))
    environment.write(folder)
    initial_weights.write(resolved.initial, folder)


def _announce(
    resolved: ResolvedModel,
    splits: Splits,
    engines: list[Engine],
    sampling: Any,
    learner: Learner,
) -> None:
    """What is about to run, in a few lines: model, data, and every sampling parameter that is not off."""
    logger.info("model: %s", resolved.description)
    for line in splits.lines():
        logger.info("data: %s", line)
    effective = engines[0].effective_sampling(sampling)
    logger.info("sampling: %s", ", ".join(f"{name} {value}" for name, value in effective.items() if value))
    if not learner.policy.shares_prompts:
        logger.info("prompts are not shared in the learner: %s", learner.policy.why_not_shared)


# ---------------------------------------------------------------- evaluation alone


def _evaluate(config: Config) -> Evaluation:
    """Build just what answering the held-out set needs; all of it is released again."""
    if config.model.init_from:
        raise UserError(
            f"model.init_from={config.model.init_from} is where training begins: to evaluate that checkpoint "
            f"set model.path={config.model.init_from} and leave model.init_from empty."
        )
    splits = load_splits(config.data)
    evaluated = splits.validation if config.evaluation.split is Split.validation else splits.heldout
    if not evaluated:
        raise UserError(
            f"data.{config.evaluation.split}=0 leaves nothing to evaluate: set it to a number of problems."
        )
    with ExitStack() as opened:
        scorer = opened.enter_context(Scorer(config.reward))
        scorer.check_sources(source_names(splits))
        resolved = models.resolve(config.model)
        check_length(config, resolved.folder)
        tokenizer = models.load_tokenizer(resolved, config.model)
        prompts = PromptBuilder(tokenizer, config.data, config.model).build(evaluated).prompts
        training = config.rollout.sampling(models.end_token_ids(tokenizer, resolved.folder))
        placement = placement_of(config.rollout, learner=False)
        model = str(resolved.folder)
        if resolved.adapter is not None:
            model = opened.enter_context(tempfile.TemporaryDirectory(prefix="whetstone-merged-"))
            merge_adapter(resolved, getattr(torch, config.rollout.dtype.value), Path(model))
        host = opened.enter_context(closing(open_host(config.rollout, placement.engines)))
        engines = _engines(config, model, resolved, host)
        pool = opened.enter_context(closing(LocalPool(engines, config.run.seed, host)))
        return evaluate(
            prompts[: config.evaluation.prompts or None],
            lambda asked, sampling: pool.generate(
                [Draw(prompt=p, group_id=f"eval/{p.id}", samples=1) for p in asked],
                sampling,
                born=0,
                decode=functools.partial(_decode, tokenizer),
            ),
            scorer.score,
            sampling_for(config.evaluation, training),
            step=0,
            graders=second_opinions(config.reward),
        )
