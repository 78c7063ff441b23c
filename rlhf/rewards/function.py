"""A user's own reward: loaded by dotted path or given in Python, called, and its result checked."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rlhf.errors import RewardRaisedError, UserError
from rlhf.rewards.grade import LARGEST, PartScore, nearest
from trainer.errors import described


@dataclass(slots=True, kw_only=True)
class Batch:
    """What a reward function is given, one entry a response."""

    prompts: list[str] = field(default_factory=list)
    """Rendered chat text of the prompt."""
    responses: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Every column of the data row."""
    sources: list[str] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)
    """False where the response was cut at the length limit."""
    lengths: list[int] = field(default_factory=list)
    """Response tokens."""
    ids: list[str] = field(default_factory=list)
    """Names of the prompts (`source:row`), for sentences; not handed to the function."""


SEARCH_SECONDS = 10.0
"""How long a function that raised is called on single responses, to say which one it was."""

EXTRAS = ("sources", "finished", "lengths")
"""Keyword arguments that a function gets when its signature has room for them."""


class RewardFunction:
    """A checked, callable user function of one part. Raises `UserError` in one sentence for every misuse."""

    def __init__(
        self,
        part: str,
        function: Callable[..., Any],
        args: dict[str, Any],
        label: str = "",
        wait: Callable[[Awaitable[Any]], Any] | None = None,
    ) -> None:
        self.part = part
        self.label = label or getattr(function, "__qualname__", type(function).__name__)
        self._function = function
        self._wait = wait or run_alone
        self._keywords = self._accepted(args)

    def __call__(self, batch: Batch) -> list[PartScore]:
        """Call the function once with the whole batch and check what it returns.

        Raises `RewardRaisedError` when the function raises; the sentence names the first response on which it
        does so alone.
        """
        try:
            results = self._results(batch)
        except (Exception, SystemExit) as error:
            raise RewardRaisedError(f"{self._who} raised {described(error)} {self._where(batch)}.") from error
        return self._read_all(results, len(batch.responses))

    def _results(self, batch: Batch) -> Any:
        """What the function returns; a generator is read to its end, where it may raise too."""
        extras = {name: getattr(batch, name) for name in self._keywords if name in EXTRAS}
        results = self._function(
            batch.prompts, batch.responses, batch.answers, batch.rows, **{**self._keywords, **extras}
        )
        if inspect.isawaitable(results):
            results = self._wait(results)
        return list(results) if isinstance(results, Iterator) else results

    def _where(self, batch: Batch) -> str:
        """Which response the function raises on, in brackets."""
        count = len(batch.responses)
        index = 0 if count == 1 else self._culprit(batch)
        if index is None:
            return f"(on {count} responses together, on none that was tried alone)"
        asked = f" to {batch.ids[index]}" if batch.ids else ""
        return f"(on response {index + 1} of {count}{asked})"

    def _culprit(self, batch: Batch) -> int | None:
        """The first response on which the function raises alone; None when none does in `SEARCH_SECONDS`."""
        limit = time.monotonic() + SEARCH_SECONDS
        for index, payload in enumerate(singles(batch)):
            try:
                self._results(Batch(**payload))
            except (Exception, SystemExit):
                return index
            if time.monotonic() > limit:
                break
        return None

    @property
    def _who(self) -> str:
        return f"reward.parts.{self.part}: {self.label}"

    def _accepted(self, args: dict[str, Any]) -> dict[str, Any]:
        """The keywords to call with: all of `args`, and those of `EXTRAS` that the signature has room for."""
        try:
            signature = inspect.signature(self._function)
        except (TypeError, ValueError):  # a builtin without a signature: hand over what was configured
            return dict(args)
        kinds = [parameter.kind for parameter in signature.parameters.values()]
        open_ended = inspect.Parameter.VAR_KEYWORD in kinds
        extras = [name for name in EXTRAS if open_ended or name in signature.parameters]
        keywords = {**dict.fromkeys(extras), **args}
        try:
            signature.bind([], [], [], [], **keywords)
        except TypeError as error:
            raise UserError(
                f"{self._who}{signature} cannot be called as fn(prompts, responses, answers, rows"
                f"{''.join(f', {name}=…' for name in args)}): {error}."
            ) from error
        return keywords

    def _read_all(self, results: Any, expected: int) -> list[PartScore]:
        if isinstance(results, dict | str | bytes) or not isinstance(results, Iterable):
            raise UserError(
                f"{self._who} returned {_show(results)}: return a list with one score a response."
            )
        results = list(results)
        if len(results) != expected:
            raise UserError(
                f"{self._who} returned {len(results)} scores for {expected} responses: return one score "
                "(a float or a dict) for each response, in order."
            )
        return [self._read(result, index) for index, result in enumerate(results)]

    def _read(self, result: Any, index: int) -> PartScore:
        if not isinstance(result, dict):
            value = self._number(result, index, "")
            return PartScore(values={self.part: value}, accuracy=value if 0.0 <= value <= 1.0 else None)
        named = dict(result)
        extracted = named.pop("extracted", None)
        accuracy = named.pop("accuracy", None)
        if accuracy is not None:
            accuracy = self._number(accuracy, index, "accuracy")
            if not 0.0 <= accuracy <= 1.0:
                raise UserError(f"{self._who} returned accuracy={accuracy:g}: it must lie between 0 and 1.")
        for key in named:
            if not re.fullmatch(r"[\w.-]+", str(key)):
                raise UserError(f"{self._who} returned key {key!r}: use letters, digits, '_', '-' and '.'.")
        values = {f"{self.part}.{key}": self._number(value, index, str(key)) for key, value in named.items()}
        if not values:
            if accuracy is None:
                raise UserError(f"{self._who} returned a dict without a number for response {index + 1}.")
            values = {self.part: accuracy}
        return PartScore(
            values=values, accuracy=accuracy, extracted=None if extracted is None else str(extracted)
        )

    def _number(self, value: Any, index: int, key: str) -> float:
        """A float of sensible size, also from numpy and torch scalars."""
        try:
            number = float(value) if not isinstance(value, str) else math.nan
        except Exception:  # whatever a foreign type's conversion raises
            number = math.nan
        if not abs(number) <= LARGEST:
            where = f" under {key!r}" if key else ""
            raise UserError(
                f"{self._who} returned {_show(value)}{where} for response {index + 1}: return a float "
                "from -1e9 to 1e9, or a dict of such."
            )
        return number


def load_function(part: str, path: str) -> Callable[..., Any]:
    """The function that `module:function` (or `module.function`) names; the working directory is searched.

    Raises `UserError` when the module or the function is missing or is not callable.
    """
    key = f"reward.parts.{part}.path={path!r}"
    module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
    if not module_name or not attribute:
        raise UserError(f"{key} must have the form module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}: module {error.name!r} was found neither in {os.getcwd()} nor among the installed "
            "packages."
        ) from error
    except Exception as error:
        raise UserError(f"{key}: importing {module_name} raised {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            known = [other for other, value in vars(found).items() if callable(value) and other[0] != "_"]
            raise UserError(f"{key}: {module_name} has no {name!r}{nearest(name, known)}")
        found = getattr(found, name)
    if not callable(found):
        raise UserError(f"{key} is a {type(found).__name__}, not a function.")
    return found


def sandboxed(part: str, path: str, args: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Job factory for `sandbox.py`: score one response with the function at `path`.

    A result of a wrong shape comes back as `misuse`: that is the author's mistake, not a failed answer.
    """
    function = RewardFunction(part, load_function(part, path), args, label=path)

    def score(payload: dict[str, Any]) -> dict[str, Any]:
        try:
            return asdict(function(Batch(**payload))[0])
        except UserError as error:
            if error.__cause__ is not None:  # the function itself raised: this answer fails, the run goes on
                raise error.__cause__ from None
            return {"misuse": str(error)}

    return score


def singles(batch: Batch) -> list[dict[str, Any]]:
    """The batch as one payload a response."""
    names = [column.name for column in fields(batch) if getattr(batch, column.name)]
    columns = [getattr(batch, name) for name in names]
    return [{name: [value] for name, value in zip(names, values)} for values in zip(*columns)]


def run_alone(awaitable: Awaitable[Any]) -> Any:
    """Wait for `awaitable` in an event loop made for it."""

    async def outer() -> Any:
        return await awaitable

    return asyncio.run(outer())


class BackgroundLoop:
    """One event loop in a thread of its own, for async functions: it works where the caller's thread runs a
    loop itself (notebooks), and clients that a function keeps between calls stay with their loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def wait(self, awaitable: Awaitable[Any]) -> Any:
        """The result of `awaitable`, or what it raised."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="reward-async", daemon=True)
            self._thread.start()

        async def outer() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(outer(), self._loop).result()

    def close(self) -> None:
        """Stop the loop; safe to call twice."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop, self._thread = None, None


def _show(value: Any) -> str:
    """A value and its type, short enough for a sentence."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
