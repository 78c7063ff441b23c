"""Sources -> train, validation and held-out examples, disjoint by problem, with a count of all that went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.config import ROWS, DataConfig, SourceConfig, SourceKind, SourceUse
from rlhf.data.examples import TEXT, Example, rank, text_key
from rlhf.data.sources import read_source
from rlhf.errors import UserError
from rollout import row_json


@dataclass(slots=True)
class SourceCount:
    """What became of the rows of one source."""

    read: int = 0
    duplicates: int = 0
    """Left out because an earlier row asks the same."""
    conflicts: int = 0
    """Those of the duplicates whose answer differs from the earlier row's."""
    withheld: int = 0
    """Left out because the same problem is in a set that must not be trained on."""


@dataclass(slots=True, kw_only=True)
class Splits:
    """Three sets of examples; no problem (`Example.key`) is in two of them."""

    train: dict[str, list[Example]]
    """By source, in the order read."""
    weights: dict[str, float]
    """Mixture weight of each training source."""
    validation: list[Example]
    heldout: list[Example]
    counts: dict[str, SourceCount] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What was read and left out, a line for each source and one for the sets."""
        found = []
        for name, count in self.counts.items():
            left_out = [
                f"{number} {what}"
                for number, what in [
                    (count.duplicates, "duplicates"),
                    (count.conflicts, "of them with another answer"),
                    (count.withheld, "like a validation or held-out problem"),
                ]
                if number
            ]
            found.append(
                f"{name}: {count.read} rows" + (f", left out {', '.join(left_out)}" if left_out else "")
            )
        sizes = f"train {sum(map(len, self.train.values()))}, validation {len(self.validation)}"
        return [*found, f"{sizes}, held out {len(self.heldout)}"]


def load_splits(config: DataConfig, rows: Iterable[Mapping[str, Any]] | None = None) -> Splits:
    """Read every source and cut the splits. `rows`, given in Python, replace the configured sources.

    Which problems are held out depends on the problems alone (`rank`), not on the seed of the run.
    Raises `UserError` when there is no source or too few rows, when two rows of a source have one id, or a
    training row holds what rollouts cannot record.
    """
    sources = _sources(config, rows)
    given = list(rows) if rows is not None else None
    counts = {name: SourceCount() for name in sources}
    pools = {}
    for name, source in sources.items():
        key = "data.path" if config.path else f"data.sources.{name}.path"
        examples = read_source(name, source, config.fields, given, key)
        pools[name] = _deduplicated(examples, counts[name], config.deduplicate)
        if not pools[name]:
            raise UserError(
                f"{'dataset' if source.kind is SourceKind.rows else f'{key}={source.path}'} has no rows."
            )
        _check_ids(name, pools[name], sources[name].fields.get("id") or config.fields.get("id", ""))
    _join_problems(pools)
    taken: set[str] = set()
    heldout = _cut("heldout", config.heldout, sources, pools, taken)
    validation = _cut("validation", config.validation, sources, pools, taken)
    train = _remaining(sources, pools, taken)
    if not train:
        raise UserError(
            f"data.validation={config.validation} and data.heldout={config.heldout} leave no training rows: "
            f"lower them or add data."
        )
    for name, pool in train.items():
        _check_recordable(pool)
        evaluated = sum(example.source == name for example in heldout + validation)
        counts[name].withheld = len(pools[name]) - len(pool) - evaluated
    weights = {name: sources[name].weight for name in train}
    return Splits(train=train, weights=weights, validation=validation, heldout=heldout, counts=counts)


def _sources(config: DataConfig, rows: Iterable[Mapping[str, Any]] | None) -> dict[str, SourceConfig]:
    """The sources in effect. Rows from Python fill the source of kind `rows`, or stand alone."""
    sources = config.named_sources()
    if rows is not None and not any(source.kind is SourceKind.rows for source in sources.values()):
        return {ROWS: SourceConfig(kind=SourceKind.rows)}
    if not sources:
        raise UserError(
            "there are no data: set data.path, data.sources, or hand rows to rlhf.train(dataset=...)."
        )
    return sources


def _deduplicated(examples: Iterable[Example], count: SourceCount, wanted: bool) -> list[Example]:
    """The first of every prompt, the others counted; read as a stream, so copies take no memory."""
    first: dict[str, str | None] = {}
    kept = []
    for example in examples:
        count.read += 1
        text = example.text.strip()
        if wanted and text in first:
            count.duplicates += 1
            count.conflicts += first[text] != example.answer
            continue
        first[text] = example.answer
        kept.append(example)
    return kept


def _check_ids(source: str, pool: Sequence[Example], field: str) -> None:
    """Rows are told apart by their ids; only a column of the data can repeat one."""
    seen: set[str] = set()
    for example in pool:
        if example.id in seen:
            row = example.id.removeprefix(f"{source}:")
            raise UserError(
                f"data.fields.id={field} names two rows of {source} '{row}': "
                f"name a column without repeats, or leave it out and rows are numbered."
            )
        seen.add(example.id)


def _check_recordable(pool: Sequence[Example]) -> None:
    """Every column of a row that is trained on is recorded beside its responses."""
    for example in pool:
        try:
            row_json.encode(example.row)
        except ValueError as error:
            raise UserError(f"the row {example.id}: {error}") from None


def _join_problems(pools: Mapping[str, Sequence[Example]]) -> None:
    """Give rows that ask one problem one key, also where a task knows it by its operands and a file by text.

    A task's key wins, of two tasks' the smaller: which problems are held out stays a matter of the problems.
    """
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while key in parents:
            key = parents[key]
        return key

    keyed = [example for pool in pools.values() for example in pool if not example.key.startswith(TEXT)]
    for example in keyed:
        first, *others = sorted({root(example.key), root(text_key(example))}, key=_precedence)
        parents |= dict.fromkeys(others, first)
    for pool in pools.values():
        for example in pool:
            example.key = root(example.key)


def _precedence(key: str) -> tuple[bool, str]:
    return key.startswith(TEXT), key


def _cut(
    name: str,
    size: int,
    sources: Mapping[str, SourceConfig],
    pools: Mapping[str, list[Example]],
    taken: set[str],
) -> list[Example]:
    """One evaluation set of distinct problems, in `rank` order; its problems are added to `taken`.

    A source that is `use: heldout` (or validation) gives all it has, up to `size` when that is not 0.
    Otherwise `size` problems are taken out of the sources that are `use: all`, by their weights.
    """
    dedicated = [n for n, source in sources.items() if source.use.value == name]
    if dedicated:
        found = _problems([example for n in dedicated for example in pools[n]], taken)[: size or None]
        taken |= {example.key for example in found}
        return found
    shared = {n: source.weight for n, source in sources.items() if source.use is SourceUse.all}
    if size and not shared:
        raise UserError(
            f"data.{name}={size} has no source to come from: set data.sources.<name>.use to {name} or all, "
            f"or data.{name}=0."
        )
    found = []
    for source_name, share in _shares(size, shared).items():
        problems = _problems(pools[source_name], taken)
        if len(problems) < share:
            raise UserError(
                f"data.{name}={size} asks {share} problems of {source_name}, which has {len(problems)} left: "
                f"lower data.{name} or add data."
            )
        found += problems[:share]
        taken |= {example.key for example in problems[:share]}
    return found


def _problems(pool: Sequence[Example], taken: set[str]) -> list[Example]:
    """One example of each problem that is not taken yet, in `rank` order."""
    ordered = sorted((e for e in pool if e.key not in taken), key=lambda e: (rank(e.key), rank(e.text)))
    unique: dict[str, Example] = {}
    for example in ordered:
        unique.setdefault(example.key, example)
    return list(unique.values())


def _shares(size: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`size` cut by weights into whole numbers that add up to it (largest remainders)."""
    total = sum(weights.values())
    exact = {name: size * weight / total for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: size - sum(shares.values())]:
        shares[name] += 1
    return shares


def _remaining(
    sources: Mapping[str, SourceConfig], pools: Mapping[str, list[Example]], taken: set[str]
) -> dict[str, list[Example]]:
    """The training examples of each source that keeps any: what is left when every taken problem has gone."""
    trained = [name for name, source in sources.items() if source.use in (SourceUse.all, SourceUse.train)]
    left = {name: [example for example in pools[name] if example.key not in taken] for name in trained}
    return {name: examples for name, examples in left.items() if examples}
