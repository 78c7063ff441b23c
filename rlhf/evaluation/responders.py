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
    """Answers prompts. `samples` responses to each, one group a prompt, in order."""

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[Group]:
        """Generate."""
        ...


@contextmanager
def engines(
    config: BenchmarkConfig, resolved: ResolvedModel, model: Path, tokenizer: Any, length: int, logs: Path
) -> Iterator[Responder]:
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
        decode = functools.partial(_decode, tokenizer)

        def answer(prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[Group]:
            return pool.generate(_draws(prompts, samples), sampling, born=0, decode=decode)

        yield answer


@contextmanager
def server(config: EndpointConfig, seed: int, messages: Mapping[str, Messages]) -> Iterator[Responder]:
    """A server; `messages` are the chats by prompt id. Raises `EndpointError` when it does not answer."""
    endpoint = connect(config, seed)

    def answer(prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[Group]:
        return endpoint.generate(_draws(prompts, samples), messages.__getitem__, sampling)

    yield answer


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
