"""Procedural tasks: sums and products of a few numbers, and every reasoning-gym task by name."""

from __future__ import annotations

import difflib
import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.data.config import REASONING_GYM, TASK_NAMES
from rlhf.data.examples import Example, same_text
from rlhf.errors import UserError

_SYMBOLS = {"sums": "+", "products": "*"}


@dataclass(frozen=True, kw_only=True)
class ArithmeticArgs:
    """What `data.sources.<name>.args` may say for `sums` and `products`."""

    terms: int = 2
    """Numbers in a problem, 2 or 3."""
    digits: int = 2
    """Digits of every number: 2 means 10 to 99, 1 means 0 to 9."""
    low: int | None = None
    """Smallest number, where `digits` does not say it."""
    high: int | None = None
    """Largest number."""
    size: int = 20_000
    """Most rows made. When there are no more problems than that, every one is made."""
    seed: int = 0
    """Seeds the draw when there are more problems than `size`."""
    question: str = "What is {expression}? Answer with the number only."
    """Text of the problem."""

    @property
    def span(self) -> range:
        """The numbers that may occur."""
        low = (0 if self.digits == 1 else 10 ** (self.digits - 1)) if self.low is None else self.low
        high = 10**self.digits - 1 if self.high is None else self.high
        return range(low, high + 1)

    def problem(self) -> str:
        """What is wrong with the arguments, as the end of a sentence; empty when nothing is."""
        if self.terms not in (2, 3):
            return f"terms={self.terms} must be 2 or 3"
        if not 1 <= self.digits <= 9:
            return f"digits={self.digits} must lie in 1..9"
        if len(self.span) < 2:
            return f"low={self.span.start} and high={self.span.stop - 1} leave fewer than two numbers"
        if self.size < 1:
            return f"size={self.size} must be at least 1"
        return "" if "{expression}" in self.question else "question must contain {expression}"


def build_task(path: str, source: str, args: dict[str, Any]) -> Iterator[Example]:
    """The rows of a task. `path` is `sums`, `products` or `reasoning_gym:<name>`, `source` the source's name.

    Raises `UserError` for an unknown task or argument.
    """
    if path.startswith(REASONING_GYM):
        return _reasoning_gym(path.removeprefix(REASONING_GYM), source, args)
    if path not in TASK_NAMES:
        raise UserError(
            f"data.sources.{source}.path={path} is no task: use {', '.join(TASK_NAMES)} or "
            f"{REASONING_GYM}<name>."
        )
    return _arithmetic(path, source, _arithmetic_args(source, args))


def _arithmetic_args(source: str, args: dict[str, Any]) -> ArithmeticArgs:
    """The checked arguments of an arithmetic task."""
    names = list(ArithmeticArgs.__dataclass_fields__)
    for name, value in args.items():
        if name not in names:
            raise UserError(
                f"data.sources.{source}.args.{name} is unknown: the arguments are {', '.join(names)}."
            )
        wanted = str if name == "question" else int
        if not isinstance(value, wanted) or isinstance(value, bool):
            kind = "a text" if wanted is str else "a whole number"
            raise UserError(f"data.sources.{source}.args.{name}={value} must be {kind}.")
    checked = ArithmeticArgs(**args)
    if checked.problem():
        raise UserError(f"data.sources.{source}.args: {checked.problem()}.")
    return checked


def _arithmetic(task: str, source: str, args: ArithmeticArgs) -> Iterator[Example]:
    """Every ordered tuple of operands, or `size` drawn ones; the key is the unordered tuple."""
    symbol = _SYMBOLS[task]
    for index, operands in enumerate(_operands(args)):
        question = args.question.replace("{expression}", f" {symbol} ".join(map(str, operands)))
        answer = str(sum(operands) if task == "sums" else math.prod(operands))
        yield Example(
            id=f"{source}:{index}",
            source=source,
            prompt=question,
            answer=answer,
            key=f"{task}:{','.join(map(str, sorted(operands)))}",
            row={"prompt": question, "answer": answer, "task": task, "operands": list(operands)},
        )


def _operands(args: ArithmeticArgs) -> Iterator[tuple[int, ...]]:
    """Distinct ordered tuples: all of them in order, or a seeded draw of `size`."""
    if len(args.span) ** args.terms <= args.size:
        yield from itertools.product(args.span, repeat=args.terms)
        return
    draw, seen = random.Random(args.seed), set[tuple[int, ...]]()
    while len(seen) < args.size:
        operands = tuple(draw.choices(args.span, k=args.terms))
        if operands not in seen:
            seen.add(operands)
            yield operands


def _reasoning_gym(name: str, source: str, args: dict[str, Any]) -> Iterator[Example]:
    """Distinct questions of a reasoning-gym task; `size` and `seed` are ours, other arguments are the task's.

    reasoning-gym repeats questions (one-digit chain_sum: 200 different ones in 2 000), so up to four times
    `size` rows are looked at. The row is reasoning-gym's entry, which its own scorer wants.
    """
    size, seed = args.get("size", 2_000), args.get("seed", 0)
    for key, value, least in [("size", size, 1), ("seed", seed, 0)]:
        if not isinstance(value, int) or value < least:
            raise UserError(
                f"data.sources.{source}.args.{key}={value} must be a whole number of {least} or more."
            )
    dataset = _reasoning_gym_dataset(name, source, {**args, "size": 4 * size, "seed": seed})
    seen: set[str] = set()
    for index in range(4 * size):
        entry = dataset[index]
        question = entry["question"]
        if question in seen:
            continue
        seen.add(question)
        yield Example(
            id=f"{source}:{index}",
            source=source,
            prompt=question,
            answer=None if entry["answer"] is None else str(entry["answer"]),
            key=f"{name}:{_unordered(question)}",
            row={**entry, "task": name},
        )
        if len(seen) == size:
            return


def _reasoning_gym_dataset(name: str, source: str, args: dict[str, Any]) -> Any:
    """`reasoning_gym.create_dataset`, its complaints turned into sentences."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError(
            f"data.sources.{source}.path={REASONING_GYM}{name} needs a package: pip install reasoning-gym."
        ) from None
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else "see reasoning_gym.factory.DATASETS for the names."
        raise UserError(f"data.sources.{source}.path: reasoning-gym has no task '{name}': {hint}")
    try:
        return reasoning_gym.create_dataset(name, **args)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"data.sources.{source}.args: {name} refuses them ({error}).") from None


def _unordered(question: str) -> str:
    """A question with its numbers sorted to the end: `3 + 5` and `5 + 3` are one problem."""
    numbers = sorted(re.findall(r"\d+(?:\.\d+)?", question))
    return f"{same_text(re.sub(r'[0-9]+(?:[.][0-9]+)?', '#', question))} {','.join(numbers)}"
