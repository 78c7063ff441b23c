"""Recipe and overrides -> a checked configuration. Every mistake becomes one `UserError` sentence.

Hydra composes, the structured root refuses what it does not know. Hydra's own hints ("use +key") never
reach the user: keys are checked against the dataclasses before Hydra sees them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import typing
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config import Config, check
from rlhf.errors import UserError

RECIPES = Path(str(importlib.resources.files("recipes")))
BENCHMARKS = "eval/"
"""Where among the recipes the benchmarks are, which `rlhf eval` runs."""
_PRIMARY = "whetstone"

Root = TypeVar("Root")
"""A dataclass of sections, such as `Config`."""


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Compose a shipped recipe (`dapo/arithmetic`) or a file (`./mine.yaml`) with overrides, and check it.

    Raises `UserError` with one sentence that names the key, the value and the remedy.
    """
    return load_as(Config, check, recipe, overrides)


def load_as(
    root: type[Root], check: Callable[[Root], list[str]], recipe: str, overrides: Sequence[str]
) -> Root:
    """`load` for a configuration with another root; `check` says what is wrong with one, a sentence each."""
    parsed = [_checked(root, text) for text in overrides]
    groups = _groups(typing.cast(type, root))
    chosen = [override for override in parsed if override.key_or_group in groups]
    plain = _compose(root, recipe, [(override.input_line or "").lstrip("+") for override in chosen])
    config = _structured(root, plain, [override for override in parsed if override not in chosen])
    problems = check(config)
    if problems:
        raise UserError(problems[0])
    return config


def to_yaml(config: object) -> str:
    """The resolved configuration as YAML, as a run writes it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: object) -> dict[str, Any]:
    """The resolved configuration as plain containers, enums by name."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return typing.cast(dict[str, Any], plain)


def recipe_names() -> list[str]:
    """Names of the shipped training recipes: files that describe themselves with a `# does:` line."""
    return [name for name in _described() if not name.startswith(BENCHMARKS)]


def benchmark_names() -> list[str]:
    """Names of the shipped benchmarks, `eval/aime24`."""
    return [name for name in _described() if name.startswith(BENCHMARKS)]


def _described() -> list[str]:
    files = sorted(RECIPES.rglob("*.yaml"))
    return [f.relative_to(RECIPES).with_suffix("").as_posix() for f in files if "# does:" in f.read_text()]


def keys(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Every leaf key of the configuration as `(dotted key, type, field)`, in declaration order."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind, field


@cache
def _leaves(root: type) -> dict[str, Any]:
    return {name: kind for name, kind, _ in keys(root)}


@cache
def _groups(root: type) -> set[str]:
    return {
        p.name
        for p in RECIPES.iterdir()
        if p.is_dir() and p.name in {f.name for f in dataclasses.fields(root)}
    }


# ---------------------------------------------------------------- overrides


def _checked(root: type, text: str) -> Override:
    """Parse one override and refuse what Hydra would misread."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(
            f"'{text}' is not an override: write key=value, for example loop.steps=20."
        ) from error
    key = override.key_or_group
    if override.is_delete():
        raise UserError(f"'{text}': a key cannot be deleted; set it to the value that you want instead.")
    if override.is_sweep_override():
        raise UserError(
            f"'{text}' lists several values: start one run for each, or write {key}=[a,b] for a list."
        )
    if _is_section(root, key) and not (key in _groups(root) and isinstance(override.value(), str)):
        example = next(name for name in _leaves(root) if name.startswith(key + "."))
        raise UserError(f"{text}: this is a section, set one of its keys ({example}, ...).")
    if not (known_key(key, root) or (key in _groups(root) and isinstance(override.value(), str))):
        raise UserError(f"Unknown key '{key}' in '{text}': {_nearest(root, key)}")
    choice = override.value()
    if key in _groups(root) and isinstance(choice, str):
        _check_choice(key, choice)
    return override


def _check_choice(group: str, choice: str) -> None:
    """Refuse a choice that a group of settings (`algorithm=grpo`) has not."""
    known = sorted(path.stem for path in (RECIPES / group).glob("*.yaml"))
    if choice not in known:
        raise UserError(f"{group}={choice} is not known: choose one of {', '.join(known)}.")


def known_key(key: str, root: type = Config) -> bool:
    """Whether `key` is a leaf of the configuration or lies inside one of its dictionaries."""
    leaves = _leaves(root)
    if key in leaves:
        return True
    parent = key
    while "." in parent:
        parent = parent.rpartition(".")[0]
        if typing.get_origin(leaves.get(parent)) is dict:
            return _known_entry(leaves[parent], key.removeprefix(parent + "."))
    return False


def _known_entry(kind: Any, rest: str) -> bool:
    """Whether `name.field` is valid inside a `dict[str, X]`."""
    value = typing.get_args(kind)[1]
    if not dataclasses.is_dataclass(value) or "." not in rest:
        return True
    inner = rest.partition(".")[2]
    hints = typing.get_type_hints(typing.cast(type, value))
    head = inner.partition(".")[0]
    return head in hints and ("." not in inner or typing.get_origin(hints[head]) is dict)


def _nearest(root: type, key: str) -> str:
    """A hint: the valid key that looks most like `key`."""
    leaves = list(_leaves(root))
    last = key.rpartition(".")[2]
    close = [
        name for name in leaves if name.rpartition(".")[2] == last and name.startswith(key.partition(".")[0])
    ]
    close = close or difflib.get_close_matches(key, leaves, n=1, cutoff=0.5)
    if not close:
        tails = {name.rpartition(".")[2]: name for name in leaves}
        close = [tails[t] for t in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)]
    return f"did you mean '{close[0]}'?" if close else "see docs/configuration.md for the valid keys."


# ---------------------------------------------------------------- composition


def _locate(recipe: str) -> tuple[Path, str]:
    """`(folder, config name)` of a shipped recipe or a user's file."""
    if recipe.endswith(".yml"):
        raise UserError(f"Recipe file '{recipe}': the name must end in .yaml: rename it.")
    if recipe.endswith(".yaml"):
        path = Path(recipe).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"Recipe file '{recipe}' does not exist.")
        return path.parent, path.stem
    if (RECIPES / f"{recipe}.yaml").is_file() and recipe in _described():
        return RECIPES, recipe
    close = difflib.get_close_matches(recipe, _described(), n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'?" if close else "'rlhf recipes' lists them."
    raise UserError(f"Unknown recipe '{recipe}': {hint}")


def _compose(root: type, recipe: str, choices: list[str]) -> dict[str, Any]:
    """Schema, then the recipe with these choices of groups (`algorithm=grpo`), as a plain dictionary."""
    folder, name = _locate(recipe)
    store = ConfigStore.instance()
    store.store(name="schema", node=root)
    primary = {
        "defaults": ["schema", f"/{name}@_global_", "_self_"],
        "hydra": {"searchpath": [f"file://{RECIPES}"]},
    }
    store.store(name=_PRIMARY, node=primary)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            composed = compose(_PRIMARY, overrides=choices)
            return typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise _sentence(root, error, recipe) from error
    except yaml.YAMLError as error:
        raise UserError(f"{recipe}: {_yaml_mistake(error)}") from error


def _structured(root: type[Root], plain: dict[str, Any], values: list[Override]) -> Root:
    """Merge onto the structured root, which refuses every unknown key and every wrong type."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(root), plain)
        for override in values:
            merged = OmegaConf.merge(merged, _nested(override))
        return typing.cast(Root, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise _sentence(root, error, "the configuration") from error


def _nested(override: Override) -> dict[str, Any]:
    """`a.b=1` -> `{"a": {"b": 1}}`."""
    *sections, last = override.key_or_group.split(".")
    nested: dict[str, Any] = {last: override.value()}
    for name in reversed(sections):
        nested = {name: nested}
    return nested


def _sentence(root: type, error: Exception, where: str) -> UserError:
    """Hydra's and OmegaConf's exceptions, said in one sentence."""
    cause: BaseException = error
    while not isinstance(cause, OmegaConfBaseException) and (cause.__cause__ or cause.__context__):
        cause = typing.cast(BaseException, cause.__cause__ or cause.__context__)
    if not isinstance(cause, OmegaConfBaseException):
        return UserError(f"{where}: {str(error).splitlines()[0]}")
    key = cause.full_key or str(cause.key or "")
    key = ".".join(part for part in key.split(".") if part)
    if not known_key(key, root) and not _is_section(root, key):
        return UserError(f"Unknown key '{key}' in {where}: {_nearest(root, key)}")
    given = cause.value if isinstance(cause.value, str) or cause.value is None else str(cause.value).lower()
    return UserError(f"{key}={given}: {_expected(root, key)}")


def _yaml_mistake(error: yaml.YAMLError) -> str:
    """What is wrong in a YAML file, and where: lines and columns count from 1."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"this is not YAML ({str(error).splitlines()[0]})."
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1} is not YAML ({error.problem}): mend it."


def _is_section(root: type, key: str) -> bool:
    return any(name.startswith(key + ".") for name in _leaves(root))


def _expected(root: type, key: str) -> str:
    """What a key accepts, in words."""
    kind = _leaves(root).get(key)
    if kind is None:
        return "this is a section: set one of its keys."
    if isinstance(kind, type) and issubclass(kind, Enum):
        quotes = " (write 'off' in quotes in YAML)" if "off" in kind.__members__ else ""
        return f"choose one of {', '.join(kind.__members__)}{quotes}."
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return f"give {names.get(kind, str(kind))}."
