"""Recipes compose, overrides apply, and every recipe explains itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf import as_overrides
from rlhf.algorithms.config import Aggregation, CorrectionLevel
from rlhf.compose import RECIPES, keys, load, recipe_names, to_dict, to_yaml
from rlhf.config_reference import markdown, reference
from rlhf.explain import explain

SHIPPED = [
    "dapo/ablation",
    "dapo/aime_qwen2.5_32b",
    "dapo/arithmetic",
    "dapo/arithmetic_lora",
    "dapo/gsm8k_smollm2",
    "dapo/math_qwen2.5_7b",
    "dapo/tiny",
    "grpo/arithmetic",
]


def test_shipped_recipes() -> None:
    assert recipe_names() == SHIPPED


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_recipe_composes_and_explains(recipe: str) -> None:
    config = load(recipe)
    text = explain(recipe, config)
    for title in ("What runs", "Batch arithmetic", "Memory (estimate)", "Algorithm"):
        assert title in text
    assert f"{config.loop.prompts} groups" in text


@pytest.mark.parametrize("recipe", SHIPPED)
def test_recipes_state_only_their_differences(recipe: str) -> None:
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    assert len(lines) <= 30
    heads = {line.split(":")[0] for line in lines if line.startswith("#")}
    assert {"# does", "# paper", "# needs"} <= heads


def test_dapo_and_grpo_differ_by_their_switches() -> None:
    dapo, grpo = load("dapo/arithmetic").algorithm, load("grpo/arithmetic").algorithm
    assert (dapo.clip.low, dapo.clip.high, grpo.clip.high) == (0.2, 0.28, 0.2)
    assert dapo.aggregation is Aggregation.token_mean
    assert grpo.aggregation is Aggregation.seq_mean_token_mean
    assert dapo.dynamic_sampling.enabled
    assert not grpo.dynamic_sampling.enabled
    assert (dapo.overlong.buffer, grpo.overlong.buffer) == (4, 0)
    assert grpo.correction.level is CorrectionLevel.off
    assert grpo.clip.dual == 0


def test_the_papers_column() -> None:
    config = load("dapo/aime_qwen2.5_32b")
    assert config.loop.optimizer_steps == 16
    assert config.loop.prompts * config.loop.group_size == 8192
    assert config.algorithm.overlong.buffer == 4096
    assert config.learner.schedule.warmup_steps == 20
    assert config.algorithm.correction.level is CorrectionLevel.off


def test_the_clip_is_idle_only_where_the_ratio_is_one() -> None:
    def clip_line(*overrides: str) -> str:
        text = explain("dapo/arithmetic", load("dapo/arithmetic", overrides))
        return next(line for line in text.splitlines() if line.startswith("  clip: "))

    once = clip_line("loop.mini_batch=0", "algorithm.old_logprobs=current")
    assert once.endswith("With one optimizer step a rollout the ratio is 1 and the clip idle.")
    assert "idle" not in clip_line()
    rollout = clip_line("algorithm.old_logprobs=rollout", "algorithm.correction.level=off")
    assert "idle" not in rollout


def test_overrides_and_groups() -> None:
    config = load(
        "dapo/arithmetic", ["loop.steps=3", "algorithm=grpo", "reward.parts.exact.weight=2", "run.seed=7"]
    )
    assert (config.loop.steps, config.run.seed, config.reward.parts["exact"].weight) == (3, 7, 2.0)
    assert config.algorithm.aggregation is Aggregation.seq_mean_token_mean


def test_a_new_entry_of_a_section() -> None:
    overrides = [
        "reward.parts.style.kind=format",
        "reward.parts.style.weight=0.5",
        "reward.parts.exact.weight=3",
    ]
    parts = load("dapo/tiny", [*overrides, "reward.parts.style.args={pattern: x}"]).reward.parts
    assert (parts["style"].kind, parts["style"].weight, parts["exact"].weight) == ("format", 0.5, 3.0)
    assert parts["exact"].kind == "exact_integer"


def test_a_users_file_builds_on_a_shipped_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# @package _global_\ndefaults: [/dapo/arithmetic, _self_]\nloop: {steps: 5}\n")
    config = load(str(recipe), ["learner.optimizer.lr=3e-6"])
    assert (config.loop.steps, config.learner.optimizer.lr) == (5, 3e-6)
    assert config.model.path == "smollm2-135m-instruct"


def test_python_values_become_overrides() -> None:
    given = {
        "loop.steps": 2,
        "data.system_prompt": 'say "4, 5"',
        "learner.freeze": ["a*", "b"],
        "learner.compile": True,
    }
    assert as_overrides(given) == [
        "loop.steps=2",
        'data.system_prompt="say \\"4, 5\\""',
        'learner.freeze=["a*","b"]',
        "learner.compile=true",
    ]
    config = load("dapo/tiny", as_overrides(given))
    assert config.data.system_prompt == 'say "4, 5"'
    assert config.learner.freeze == ["a*", "b"]
    assert config.learner.compile is True


@pytest.mark.parametrize(
    "text",
    [
        r"{prompt} Answer in \boxed{}.",
        r".*\d+",
        "ends with a backslash\\",
        "ends with two\\\\",
        r'a \"quoted\" word, \\"twice\\"',
        '"',
        "\\",
        "two\nlines\\\n",
        "it's $5, a=b",
        "",
    ],
)
def test_text_from_python_arrives_unchanged(text: str) -> None:
    given = {
        "data.system_prompt": text,
        "learner.freeze": [text, "x"],
        "model.chat_template_args": {"note": text, "other": 1},
    }
    config = load("dapo/tiny", as_overrides(given))
    assert config.data.system_prompt == text
    assert config.learner.freeze == [text, "x"]
    assert config.model.chat_template_args == {"note": text, "other": 1}


def test_what_a_run_writes_composes_again(tmp_path: Path) -> None:
    config = load("dapo/tiny", ["loop.steps=9"])
    written = tmp_path / "config.yaml"
    written.write_text("# @package _global_\n" + to_yaml(config))
    assert to_dict(load(str(written))) == to_dict(config)
    assert yaml.safe_load(to_yaml(config))["loop"]["steps"] == 9


def test_at_most_150_keys_each_with_a_docstring() -> None:
    names = [name for name, _, _ in keys()]
    assert len(names) == len(set(names))
    assert len(reference()) <= 150
    assert [key.name for key in reference() if not key.text] == []


def test_reference_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run: python -m rlhf.config_reference > docs/configuration.md"


def test_generating_ahead_is_explained() -> None:
    lead = "engines generate up to 2 step(s) ahead of the learner (loop.staleness)"
    overrides = ["loop.staleness=2", "rollout.process=child"]
    assert lead in explain("dapo/tiny", load("dapo/tiny", overrides))
    assert "ahead of the learner" not in explain("dapo/tiny", load("dapo/tiny"))


def test_memory_that_moves_is_explained() -> None:
    def lines(*overrides: str) -> str:
        return explain("dapo/arithmetic", load("dapo/arithmetic", list(overrides)))

    moved = "1.54 GB of the learner lie on the disk while engines generate (learner.memory.offload_state)"
    assert moved in lines("learner.memory.offload_state=disk")
    assert "while engines generate" not in lines()
    assert "rank 0 takes 1.3 GB of the host's memory besides" in lines("learner.parallel.shard=2")


def test_names_that_others_rely_on() -> None:
    names = {name for name, _, _ in keys()}
    assert {
        "loop.steps",
        "run.dir",
        "run.seed",
        "algorithm.clip.low",
        "algorithm.clip.high",
        "rollout.engines",
        "rollout.pool",
        "loop.staleness",
        "learner.optimizer.lr",
        "data.path",
        "evaluation.every",
        "resume",
    } <= names


def test_composing_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from rlhf.compose import load; from rlhf.explain import explain; "
        "explain('dapo/tiny', load('dapo/tiny')); "
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
