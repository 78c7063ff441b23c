from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf import metrics
from rlhf.metrics import METRICS, SECTIONS, check, duration, lookup, markdown, show, unknown

ROOT = Path(__file__).parents[2]


def test_table_is_whole() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert {metric.section for metric in METRICS} == set(SECTIONS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z]+/[a-z0-9_<>]+", metric.name), metric.name
        assert metric.unit, metric.name
        assert 0 < len(metric.meaning) < 110, metric.name


def test_docs_page_is_the_table() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m rlhf.metrics > docs/metrics.md"


def _written_names(path: Path) -> Iterator[tuple[int, str]]:
    """Whole string constants of a module that look like metric names; pieces of f-strings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pieces = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
    shape = re.compile(rf"(?:{'|'.join(SECTIONS)})/[a-z]\w*")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in pieces:
            continue
        if isinstance(node.value, str) and shape.fullmatch(node.value):
            yield node.lineno, node.value


def test_every_name_in_the_source_is_in_the_table() -> None:
    strangers = []
    for package in ("rlhf", "rollout", "trainer", "adapters"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for line, name in _written_names(path):
                if lookup(name) is None:
                    strangers.append(f"{path.relative_to(ROOT)}:{line} {name}")
    assert not strangers, "add rows to rlhf/metrics.py, or use a name that is there:\n" + "\n".join(strangers)


def test_exact_names_go_before_patterns() -> None:
    found = lookup("memory/peak_pss")
    assert found is not None
    assert found.name == "memory/peak_pss"
    pattern = lookup("memory/peak_update")
    assert pattern is not None
    assert pattern.name == "memory/peak_<phase>"


@pytest.mark.parametrize("name", ["reward/exact_mean", "reward/my-part.2_std", "reward/exact_timeout"])
def test_placeholders_match_names(name: str) -> None:
    assert lookup(name) is not None


@pytest.mark.parametrize("name", ["reward/_mean", "reward/a/b_mean", "train/acc", "accuracy", "time/", ""])
def test_strangers_are_found(name: str) -> None:
    assert unknown(["train/accuracy", name, "time/step"]) == [name]


def test_check_names_the_nearest() -> None:
    check(["train/accuracy", "reward/exact_mean"])
    with pytest.raises(ValueError, match=r"metric 'train/acuracy' .* did you mean 'train/accuracy'\?"):
        check(["train/accuracy", "train/acuracy"])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train/accuracy", 0.41234, "41.2 %"),
        ("time/step", 8.123, "8.1 s"),
        ("memory/pss", 1.5 * 2**30, "1.50 GiB"),
        ("mismatch/logprob_gap", 0.0031234, "0.00312"),
        ("throughput/generated", 1234.6, "1,235"),
        ("eval/prompts", 200.0, "200"),
        ("learner/lr", 1e-6, "1e-06"),
        ("learner/grad_norm", float("nan"), "nan"),
        ("learner/grad_norm", float("inf"), "inf"),
        ("no/such", 2.0, "2"),
    ],
)
def test_values_are_shown_by_their_unit(name: str, value: float, expected: str) -> None:
    assert show(name, value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, "0.00 s"), (0.244, "0.24 s"), (8.14, "8.1 s"), (75.2, "75 s"), (99.99, "100 s"),
     (725, "12 min 5 s"), (10920, "3 h 2 min")],
)  # fmt: skip
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_page_is_printed_by_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(metrics.__file__).read_text()
    exec(compile(source, metrics.__file__, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == markdown()
