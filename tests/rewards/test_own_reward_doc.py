"""docs/own-reward.md runs: its modules import, its recipes compose, its assertions hold."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf.rewards.base import Scorer
from rlhf.rewards.config import BUILT_IN, RewardConfig
from rlhf.rewards.grade import kind_names

PAGE = Path(__file__).parents[2] / "docs" / "own-reward.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds the modules of the page."""
    for code in blocks("python"):
        name = re.match(r"# (\w+)\.py\n", code)
        if name:
            (tmp_path / f"{name[1]}.py").write_text(code)
            monkeypatch.delitem(sys.modules, name[1], raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_recipes_compose_and_their_functions_load(folder: Path) -> None:
    recipes = blocks("yaml")
    assert len(recipes) == 5
    for text in recipes:
        given = OmegaConf.create(text)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RewardConfig), given.reward))
        assert isinstance(config, RewardConfig)
        assert config.check() == []
        with Scorer(config) as scorer:
            scorer.check_sources(["arithmetic", "math_train"])


def test_code_runs(folder: Path) -> None:
    scripts = [code for code in blocks("python") if not code.startswith("# ")]
    assert len(scripts) == 1
    for code in scripts:
        exec(compile(code, str(PAGE), "exec"), {"__name__": "docs"})


def test_every_kind_and_option_is_on_the_page() -> None:
    text = PAGE.read_text()
    for name in kind_names():
        assert f"| `{name}` |" in text
    for kind in BUILT_IN:
        for option in fields(kind.spec):
            assert f"`{option.name}`" in text, option.name
