"""What every reward part shares: `Response` in, `Grade` out, and the registry of kinds by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class Status(StrEnum):
    """How the grading of one answer ended. Only `ok` and `no_answer` say something about the policy."""

    ok = "ok"
    """An answer was read and compared."""
    no_answer = "no_answer"
    """The response holds no answer in the form that the rule asks for."""
    gold_unparsable = "gold_unparsable"
    """The data row's own answer is missing or unreadable: a failure better left out of the loss."""
    timeout = "timeout"
    """The grader was stopped at its time limit."""
    error = "error"
    """The grader raised, ran out of memory or took its process down."""


@dataclass(slots=True, kw_only=True, frozen=True)
class Response:
    """What a grader may know of one response."""

    text: str
    """Decoded text without special tokens."""
    finished: bool = True
    """Whether it ended by itself (an end token or a stop string) and was not truncated."""
    length: int = 0
    """Response tokens, the end token included."""


@dataclass(slots=True, kw_only=True, frozen=True)
class Grade:
    """The verdict on one response."""

    accuracy: float
    """Correctness in [0, 1] for a grader; for a shaping kind (format, length) its raw value."""
    grader: str
    """`name@version`; the version changes whenever a verdict can change."""
    extracted: str | None = None
    """The answer that was read, normalized; what majority votes compare."""
    status: Status = Status.ok


@dataclass(slots=True, kw_only=True, frozen=True)
class Kind:
    """A registered kind of reward part: a pure function and what the scorer needs to know about it."""

    name: str
    version: int
    spec: type
    """Dataclass of its options; `args` of the part fill it. May hold `check() -> list[str]`."""
    grade: Callable[[Response, str | None, Any], Grade]
    """`grade(response, gold, spec)`, pure and importable; it may take long or never end."""
    prepare: Callable[[Response, str | None, Any], Grade | Response] | None = None
    """Settles the easy cases at once, or returns the shorter response with the same verdict, which makes
    equal answers to one question equal: they are then graded once."""
    grading: bool = True
    """Whether its `Grade.accuracy` is correctness, so that it may decide `accuracy`."""
    isolated: bool = False
    """Whether it must run in a killable worker process (it can hang)."""
    warm_up: Callable[[], None] | None = None
    """Called once a worker process, so that the first answer does not pay for imports within its limit."""

    @property
    def label(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


_KINDS: dict[str, Kind] = {}

LARGEST = 1e9
"""Largest size of a reward's numbers: squares and sums of much larger ones leave what float32 holds."""
FUNCTION = "function"
"""The kind that is not registered: a user's own function."""


def register(kind: Kind) -> Kind:
    """Make `kind` known by its name. Raises `ValueError` when the name is taken."""
    if kind.name in _KINDS or kind.name == FUNCTION:
        raise ValueError(f"reward kind {kind.name!r} is registered already: choose another name.")
    _KINDS[kind.name] = kind
    return kind


def find_kind(name: str) -> Kind:
    """The registered kind `name`. Raises `ValueError` with the nearest name."""
    if name not in _KINDS:
        raise ValueError(f"kind={name!r} is not known{nearest(name, kind_names())}")
    return _KINDS[name]


def kind_names() -> list[str]:
    """Every name that a part's `kind` may hold."""
    return [*sorted(_KINDS), FUNCTION]


def nearest(word: str, known: list[str]) -> str:
    """The end of a sentence that says which of `known` may have been meant."""
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": choose one of {', '.join(known)}."


def build_spec(kind: Kind, args: dict[str, Any]) -> Any:
    """The options dataclass of `kind` filled from `args`. Raises `ValueError` on a bad key, type or range."""
    known = [option.name for option in fields(kind.spec)]
    for key in args:
        if key not in known:
            raise ValueError(f"args.{key} is no option of {kind.name}{nearest(str(key), known)}")
    try:
        spec: Any = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(kind.spec), OmegaConf.create(args))
        )
    except OmegaConfBaseException as error:
        raise ValueError(f"args of {kind.name}: {str(error).splitlines()[0]}") from error
    problems = spec.check() if hasattr(spec, "check") else []
    if problems:
        raise ValueError(problems[0])
    return spec


def failed(grader: str, status: Status) -> Grade:
    """A failure that is not the policy's verdict: worth nothing, and counted under `status`."""
    return Grade(accuracy=0.0, grader=grader, status=status)


@dataclass(slots=True, kw_only=True)
class PartScore:
    """What one part gives one response."""

    values: dict[str, float]
    """Raw parts by name: the part's own name, or `part.key` for what a user's function names itself."""
    accuracy: float | None = None
    """Correctness in [0, 1]; None when the part says nothing about it."""
    extracted: str | None = None
    status: str = Status.ok


def graded_job(module: str, name: str, spec: Any) -> Callable[[tuple[Response, str | None]], dict[str, Any]]:
    """Job factory for `sandbox.py`: grades one response with kind `name`, which `module` registers."""
    importlib.import_module(module)
    kind = find_kind(name)
    if kind.warm_up is not None:
        kind.warm_up()

    def run(payload: tuple[Response, str | None]) -> dict[str, Any]:
        verdict = kind.grade(*payload, spec)
        return {"accuracy": verdict.accuracy, "extracted": verdict.extracted, "status": verdict.status}

    return run
