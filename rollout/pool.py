"""`LocalPool`: engines, wherever they run, all generating at once; draws in, groups out."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.config import PoolKind, RolloutConfig
from rollout.engine import Completion, Engine, OwnProcess, Request, Sampling, Sleeper
from rollout.engine_spec import EngineSpec, thread_count, usable_cores
from rollout.host import EngineHost, LocalHost
from rollout.restarts import RestartingEngine, Restarts
from rollout.types import FinishReason, Group, Prompt, Trajectory, sample_seed
from trainer.parallel.places import Place, needs_ray

if TYPE_CHECKING:
    from trainer.parallel.ray_cluster import Places

Decode = Callable[[list[int]], str]
"""Token ids to text without special tokens."""


@dataclass(slots=True, kw_only=True)
class Draw:
    """One draw of a prompt: what becomes a group."""

    prompt: Prompt
    group_id: str
    """Unique per draw within the run: it names the sampling noise."""
    samples: int


class LocalPool:
    """Engines that generate side by side. Owns them and their host: `close` closes them all."""

    def __init__(self, engines: Sequence[Engine], run_seed: int, host: EngineHost | None = None) -> None:
        """`host`: where the engines run, closed after them. Raises ValueError without an engine."""
        if not engines:
            raise ValueError("A pool needs at least one engine: set rollout.engines to 1 or more.")
        self.engines = list(engines)
        self.run_seed = run_seed
        self._host = host
        self.aborted = 0
        """Responses that an engine gave up, over the life of the pool."""

    def generate(
        self,
        draws: Sequence[Draw],
        sampling: Sampling,
        born: int,
        decode: Decode,
        again: Callable[[list[str]], None] = lambda ids: None,
    ) -> list[Group]:
        """One group a draw, in the order of `draws`.

        All samples of a group go to one engine (they share the prompt's prefix). The groups are dealt out in
        the order of their hashed ids, so who gets what depends on the ids alone. `again` is told the ids of
        the groups that were generated again because their engine died (`rollout.restarts`).

        Raises ValueError when a group id occurs twice or has no samples, and what an engine raised, after the
        others have finished.
        """
        _check(draws)
        shares = _deal(draws, len(self.engines))
        calls = [
            lambda engine=engine, share=share: self._generate(engine, share, sampling, again)
            for engine, share in zip(self.engines, shares, strict=True)
        ]
        completions = {name: done for share in _all_at_once(calls) for name, done in share.items()}
        groups = [self._group(draw, completions[draw.group_id], born, decode) for draw in draws]
        self.aborted += sum(
            t.finish_reason is FinishReason.ABORT for group in groups for t in group.trajectories
        )
        return groups

    def stacks(self) -> dict[str, str]:
        """Where the threads of engines in processes of their own are; empty text from one that does not
        answer."""
        return {engine.label: engine.stacks() for engine in self.engines if isinstance(engine, OwnProcess)}

    def sleep(self, level: int) -> None:
        """Have all engines give GPU memory back until they are next called; see `VllmEngine.sleep`.

        Raises TypeError for an engine that cannot.
        """
        for engine in self.engines:
            if not isinstance(engine, Sleeper):
                raise TypeError(f"{type(engine).__name__} has no sleep mode.")
            engine.sleep(level)

    def metrics(self) -> dict[str, float]:
        """Counts over the life of the pool, of what may happen to it."""
        first = self.engines[0]
        if not isinstance(first, RestartingEngine):
            return {}
        return {"rollout/engine_restarts": float(first.restarts.count)}

    def close(self) -> None:
        """Close every engine; safe to call twice."""
        for engine in self.engines:
            engine.close()
        if self._host is not None:
            self._host.close()

    def _generate(
        self,
        engine: Engine,
        draws: Sequence[Draw],
        sampling: Sampling,
        again: Callable[[list[str]], None],
    ) -> dict[str, list[Completion]]:
        """One engine's share: completions by group id."""
        requests = [
            Request(prompt_ids=draw.prompt.token_ids, seed=sample_seed(self.run_seed, draw.group_id, index))
            for draw in draws
            for index in range(draw.samples)
        ]
        before = _starts(engine)
        completions = iter(engine.generate(requests, sampling)) if requests else iter(())
        if _starts(engine) > before:
            again([draw.group_id for draw in draws])
        return {draw.group_id: [next(completions) for _ in range(draw.samples)] for draw in draws}

    def _group(self, draw: Draw, completions: list[Completion], born: int, decode: Decode) -> Group:
        trajectories = [
            Trajectory(
                prompt_ids=draw.prompt.token_ids,
                response_ids=completion.token_ids,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                version_spans=completion.version_spans,
                sample_index=index,
                seed=sample_seed(self.run_seed, draw.group_id, index),
                text=decode(completion.token_ids),
            )
            for index, completion in enumerate(completions)
        ]
        return Group(id=draw.group_id, prompt=draw.prompt, trajectories=trajectories, born=born)


def open_host(
    config: RolloutConfig, gpus: Sequence[Sequence[int]] = (), places: Places | None = None
) -> EngineHost:
    """Where the engines of `config` will run: this machine, or places in a Ray cluster, taken from now on.

    `gpus`: one list of numbers an engine, of the GPUs that this process sees. `places`: those that begin with
    `engine_places`, where they are taken already; they are not closed with the host. Raises ValueError when
    Ray is not installed, its cluster does not answer, or has no room.
    """
    if config.pool is PoolKind.local:
        return LocalHost(config.process, gpus)
    with needs_ray("rollout.pool=ray", "rollout.pool=local"):
        from rollout.ray_host import RayHost
        from trainer.parallel import ray_cluster

    own = sorted({gpu for each in gpus for gpu in each})
    return RayHost(
        places or ray_cluster.Places(config.ray, engine_places(config, gpus), own),
        engines=config.engines,
        threads=_ray_threads(config),
        wait_s=config.ray.wait_s,
        owned=places is None,
    )


def engine_places(config: RolloutConfig, gpus: Sequence[Sequence[int]] = ()) -> list[Place]:
    """What the engines of `config` take of a Ray cluster, in their order; nothing when they are not there."""
    if config.pool is PoolKind.local:
        return []
    where = config.ray.places
    return [
        Place(
            what="engine",
            cpus=_ray_threads(config),
            gpus=config.tensor_parallel if gpus and gpus[0] else 0,
            where=where[index % len(where)] if where else "",
        )
        for index in range(config.engines)
    ]


def _ray_threads(config: RolloutConfig) -> int:
    """CPU threads of one engine on Ray, decided here for all nodes."""
    return thread_count(config.threads or _threads_each(config.engines))


def build_engines(
    config: RolloutConfig,
    *,
    model: str,
    length: int,
    seed: int = 0,
    transport: str = "",
    tokenizer: str = "",
    trust_remote_code: bool = False,
    log_folder: Path | None = None,
    host: EngineHost | None = None,
) -> list[Engine]:
    """The engines that `config` asks for, all loading at once, returned when all are ready.

    `length` is the most tokens of prompt and response that the run can ask for; `config.max_model_len` wins
    when it is set. Engines run on `host` (this machine when none is given, see `open_host`), those in a
    process of their own write to `log_folder/engine-<i>.log`. If one fails to load, all are closed.
    """
    host = host or open_host(config)
    specs = [
        EngineSpec(
            model=model,
            tokenizer=tokenizer,
            dtype=config.dtype.value,
            numerics=config.numerics.value,
            max_model_len=config.max_model_len or length,
            max_num_seqs=config.max_num_seqs,
            kv_cache_bytes=int(config.kv_cache_gib * (1 << 30)),
            prefix_caching=config.prefix_caching,
            threads=config.threads or _threads_each(config.engines),
            eager=config.eager,
            seed=seed,
            transport=transport,
            tensor_parallel=config.tensor_parallel,
            gpu_memory=config.gpu_memory,
            sleep_mode=config.sleep_level > 0,
            trust_remote_code=trust_remote_code,
            log_path=str(log_folder / f"engine-{index}.log") if log_folder else "",
        )
        for index in range(config.engines)
    ]
    starts = [functools.partial(host.start, index, spec) for index, spec in enumerate(specs)]
    restarts = Restarts(config.restarts)
    engines = [RestartingEngine(start, restarts) if config.restarts else start() for start in starts]
    try:
        for engine in engines:
            engine.wait()
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return list(engines)


def _starts(engine: Engine) -> int:
    """How often an engine was started again."""
    return engine.starts if isinstance(engine, RestartingEngine) else 0


def _threads_each(engines: int) -> int:
    """0 (the engine decides) for one engine, else an equal share of the cores."""
    return 0 if engines == 1 else max(1, usable_cores() // engines)


def _check(draws: Sequence[Draw]) -> None:
    seen: set[str] = set()
    for draw in draws:
        if draw.group_id in seen:
            raise ValueError(
                f"Group id '{draw.group_id}' was drawn twice: its samples would share their noise."
            )
        if draw.samples < 1:
            raise ValueError(f"Group '{draw.group_id}' asks for {draw.samples} samples: ask for at least 1.")
        seen.add(draw.group_id)


def _deal(draws: Sequence[Draw], engines: int) -> list[list[Draw]]:
    def digest(draw: Draw) -> bytes:
        return hashlib.blake2b(draw.group_id.encode(), digest_size=8).digest()

    order = sorted(draws, key=digest)
    return [order[index::engines] for index in range(engines)]


def _all_at_once(
    calls: Sequence[Callable[[], dict[str, list[Completion]]]],
) -> list[dict[str, list[Completion]]]:
    """Run each call in its own thread; a lone one in this thread, where Ctrl-C reaches it."""
    if len(calls) == 1:
        return [calls[0]()]
    with ThreadPoolExecutor(len(calls), thread_name_prefix="engine-call") as threads:
        work = [threads.submit(call) for call in calls]
    return [done.result() for done in work]
