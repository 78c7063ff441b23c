"""`Endpoint`: responses from an OpenAI-compatible server. Text in, text out: nothing to learn from."""

from __future__ import annotations

import asyncio
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rollout.engine import Sampling
from rollout.errors import EndpointError
from rollout.pool import Draw
from rollout.types import FinishReason, Group, Trajectory, sample_seed

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion

Messages = list[dict[str, str]]
"""Turns of a chat, `{"role": ..., "content": ...}`."""
NO_KEY = "none"
"""What is sent where no key is set: the client insists on one."""


@dataclass(slots=True, kw_only=True)
class RemoteTrajectory(Trajectory):
    """A response whose tokens the server counted and kept."""

    tokens: int

    @property
    def length(self) -> int:
        """Response tokens as the server counts them."""
        return self.tokens


class Endpoint:
    """A server that answers chats. Every response is a request of its own, with its own seed."""

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        run_seed: int = 0,
        key_variable: str = "OPENAI_API_KEY",
        requests: int = 32,
        timeout_s: float = 600.0,
        retries: int = 5,
    ) -> None:
        """`url` is the server's base (`http://host:port/v1`); `requests` may be in flight at once.

        A request is sent again up to `retries` times after a lost connection, a limit of rate or a fault of
        the server (the client library's exponential back-off). Without `model`, the one that the server has.
        Raises `EndpointError` when it does not answer, or has another model or several.
        """
        self.url = url
        self._run_seed = run_seed
        self._requests = requests
        self._key = os.environ.get(key_variable) or NO_KEY
        self._timeout_s = timeout_s
        self._retries = retries
        self.model = self._served(model)

    def generate(
        self,
        draws: Sequence[Draw],
        messages: Callable[[str], Messages],
        sampling: Sampling,
    ) -> list[Group]:
        """One group a draw, in order; `messages` gives the chat of a prompt's id.

        Raises `EndpointError` when a request fails for good; those in flight are given up.
        """
        return asyncio.run(self._all(draws, messages, sampling))

    async def _all(
        self, draws: Sequence[Draw], messages: Callable[[str], Messages], sampling: Sampling
    ) -> list[Group]:
        slots = asyncio.Semaphore(self._requests)
        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as tasks:
                    asked = [
                        [
                            tasks.create_task(self._one(client, slots, draw, index, messages, sampling))
                            for index in range(draw.samples)
                        ]
                        for draw in draws
                    ]
            except* Exception as group:
                raise self._failure(group.exceptions[0]) from group
        return [
            Group(
                id=draw.group_id,
                prompt=draw.prompt,
                trajectories=[task.result() for task in answers],
                born=0,
            )
            for draw, answers in zip(draws, asked, strict=True)
        ]

    async def _one(
        self,
        client: AsyncOpenAI,
        slots: asyncio.Semaphore,
        draw: Draw,
        index: int,
        messages: Callable[[str], Messages],
        sampling: Sampling,
    ) -> RemoteTrajectory:
        seed = sample_seed(self._run_seed, draw.group_id, index)
        async with slots:
            answer: ChatCompletion = await client.chat.completions.create(
                model=self.model,
                messages=typing.cast(Any, messages(draw.prompt.id)),  # the library has a type for each role
                **self.parameters(sampling, seed),
            )
        choice = answer.choices[0]
        return RemoteTrajectory(
            prompt_ids=[],
            response_ids=[],
            logprobs=[],
            finish_reason=_finish(choice.finish_reason),
            version_spans=[],
            sample_index=index,
            seed=seed,
            text=_text(choice.message),
            tokens=answer.usage.completion_tokens if answer.usage else 0,
        )

    @staticmethod
    def parameters(sampling: Sampling, seed: int) -> dict[str, Any]:
        """What a request says beside model and messages.

        `top_k` and `min_p`, which not every server knows, are sent only where they cut something.
        """
        extra = {name: getattr(sampling, name) for name in ("top_k", "min_p") if getattr(sampling, name)}
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"extra_body": extra} if extra else {}),
        }

    def _client(self) -> AsyncOpenAI:
        from openai import AsyncOpenAI

        return AsyncOpenAI(
            base_url=self.url, api_key=self._key, timeout=self._timeout_s, max_retries=self._retries
        )

    def _served(self, wanted: str) -> str:
        """The model to ask for, from the server's own list."""

        async def names() -> list[str]:
            async with self._client() as client:
                return [model.id async for model in client.models.list()]

        try:
            found = asyncio.run(names())
        except Exception as error:
            raise self._failure(error) from error
        if not wanted and len(found) == 1:
            return found[0]
        if wanted in found:
            return wanted
        what = f"has no model '{wanted}'" if wanted else "has several models"
        raise EndpointError(
            f"endpoint.url={self.url} {what}: set endpoint.model to one of {', '.join(found)}."
        )

    def _failure(self, error: BaseException) -> EndpointError:
        import openai

        if isinstance(error, EndpointError):
            return error
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(
                f"endpoint.url={self.url} did not answer within endpoint.timeout_s="
                f"{self._timeout_s:g}: raise it, or lower endpoint.requests."
            )
        if isinstance(error, openai.APIConnectionError):
            return EndpointError(f"endpoint.url={self.url} cannot be reached ({error}): is the server up?")
        if isinstance(error, openai.APIStatusError):
            return EndpointError(f"endpoint.url={self.url} refused ({error.status_code}: {error.message}).")
        raise error


def _finish(reason: str | None) -> FinishReason:
    if reason == "length":
        return FinishReason.LENGTH
    return FinishReason.STOP if reason == "stop" else FinishReason.ABORT


def _text(message: Any) -> str:
    """The answer; where the server parses reasoning out of it, with that in front, as our engines show it."""
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    content = message.content or ""
    return f"<think>{reasoning}</think>{content}" if reasoning else content
