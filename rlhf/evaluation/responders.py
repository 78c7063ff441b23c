"""Who answers a benchmark: our own engines, or a server."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhf.evaluation.benchmark import BenchmarkConfig, EndpointConfig
from rlhf.models import ResolvedModel
from rlhf.placement import placement_of
from rollout.endpoint import Endpoint, Messages
from rollout.engine import Sampling
from rollout.pool import Draw, LocalPool, build_engines, open_host
from rollout.types import Group, Prompt


class Responder(Protocol):
    """Answers prompts."""

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[Group]:
        """`samples` responses to each prompt, one group a prompt, in order."""
        ...


class Engines:
    """Our own. Implements `Responder`."""

    def __init__(self, pool: LocalPool, tokenizer: Any) -> None:
        """`pool` stays the caller's to close."""
        self._pool = pool
        self._decode = functools.partial(_decode, tokenizer)

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[Group]:
        """See `Responder.answer`."""
        return self._pool.generate(_draws(prompts, samples), sampling, born=0, decode=self._decode)

    def peak(self) -> float:
        """The most main memory that each engine's process has had, added up, in bytes."""
        return sum(engine.memory()["peak"] for engine in self._pool.engines)


class Server:
    """An OpenAI-compatible server. Implements `Responder`."""

    def __init__(self, endpoint: Endpoint, messages: Mapping[str, Messages]) -> None:
        """`messages`: the chats by prompt id."""
        self._endpoint = endpoint
        self._messages = messages

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[Group]:
        """See `Responder.answer`."""
        return self._endpoint.generate(_draws(prompts, samples), self._messages.__getitem__, sampling)


@contextmanager
def engines(
    config: BenchmarkConfig, resolved: ResolvedModel, model: Path, tokenizer: Any, length: int, logs: Path
) -> Iterator[Engines]:
    """Our engines with the model in folder `model`, sequences of at most `length` tokens."""
    with ExitStack() as opened:
        placement = placement_of(config.rollout, learner=False)
        host = opened.enter_context(closing(open_host(config.rollout, placement.engines)))
        loaded = build_engines(
            config.rollout,
            model=str(model),
            tokenizer=str(resolved.tokenizer_folder),
            length=length,
            seed=config.run.seed,
            trust_remote_code=resolved.trust_remote_code,
            log_folder=logs,
            host=host,
        )
        pool = opened.enter_context(closing(LocalPool(loaded, config.run.seed, host)))
        yield Engines(pool, tokenizer)


def connect(config: EndpointConfig, seed: int) -> Endpoint:
    """The server. Raises `EndpointError` when it does not answer, or has not the model."""
    return Endpoint(
        config.url,
        config.model,
        run_seed=seed,
        key_variable=config.key_variable,
        requests=config.requests,
        timeout_s=config.timeout_s,
        retries=config.retries,
    )


def _draws(prompts: Sequence[Prompt], samples: int) -> list[Draw]:
    """One a prompt. Seeds come from the id and the number of the sample, whatever the round."""
    return [Draw(prompt=prompt, group_id=f"eval/{prompt.id}", samples=samples) for prompt in prompts]


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))
