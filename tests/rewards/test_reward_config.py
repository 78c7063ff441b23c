"""Reward configuration: three lines are enough, every mistake is one sentence, torch stays out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf.rewards.base import Scorer
from rlhf.rewards.config import RewardConfig
from rlhf.rewards.exact import ExactSpec
from rlhf.rewards.grade import Kind, build_spec, find_kind, kind_names, register


def make(parts: dict[str, Any], **keys: Any) -> RewardConfig:
    given: Any = {"parts": parts, **keys}
    merged = OmegaConf.merge(OmegaConf.structured(RewardConfig), given)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RewardConfig)
    return config


def test_three_lines_of_yaml() -> None:
    text = "parts:\n  answer: {kind: exact_integer}\n"
    merged = OmegaConf.merge(OmegaConf.structured(RewardConfig), OmegaConf.create(text))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RewardConfig)
    assert config.check() == []
    with Scorer(config) as scorer:
        assert scorer.graders() == {"answer": "exact_integer@1"}
        scorer.check_sources(["anything"])


@pytest.mark.parametrize(
    ("parts", "keys", "sentence"),
    [
        ({"a": {}}, {}, "reward.parts.a.kind is empty: choose one of aime, dapo_math, exact_integer,"),
        ({"a": {"kind": "exact"}}, {}, "reward.parts.a.kind='exact' is not known"),
        (
            {"a": {"kind": "math_verifi"}},
            {},
            "reward.parts.a.kind='math_verifi' is not known: did you mean 'math_verify'?",
        ),
        (
            {"a": {"kind": "exact_integer", "args": {"rul": "boxed"}}},
            {},
            "reward.parts.a.args.rul is no option of exact_integer: did you mean 'rule'?",
        ),
        (
            {"a": {"kind": "exact_integer", "args": {"rule": "box"}}},
            {},
            "reward.parts.a.args of exact_integer: Invalid value 'box', expected one of "
            "[last_number, any_mention, answer_line, boxed]",
        ),
        (
            {"a": {"kind": "format"}},
            {},
            "reward.parts.a.args.pattern is empty: give the regular expression that a whole",
        ),
        (
            {"a": {"kind": "format", "args": {"pattern": "("}}},
            {},
            "reward.parts.a.args.pattern='(' is no regular expression: missing ), unterminated subpattern at "
            "position 0.",
        ),
        (
            {"a": {"kind": "length", "args": {"free": 9, "limit": 9}}},
            {},
            "reward.parts.a.args.limit=9 must be above args.free=9: there the value reaches -1.",
        ),
        (
            {"a": {"kind": "dapo_math", "args": {"tail": 0}}},
            {},
            "reward.parts.a.args.tail=0 must be at least 1",
        ),
        (
            {"a": {"kind": "exact_integer", "values": [1.0]}},
            {},
            "reward.parts.a.values=[1.0] must be two numbers from -1e9 to 1e9, [wrong, right].",
        ),
        (
            {"a": {"kind": "exact_integer", "weight": float("nan")}},
            {},
            "reward.parts.a.weight=nan must be a number from -1e9",
        ),
        (
            {"a": {"kind": "exact_integer", "path": "m:f"}},
            {},
            "reward.parts.a.path='m:f' is for kind=function only",
        ),
        (
            {"a": {"kind": "function", "path": "m:f", "values": [-1, 1]}},
            {},
            "reward.parts.a.values=[-1.0, 1.0] does not apply to a function: let it return the values.",
        ),
        (
            {"a": {"kind": "function", "sandbox": True}},
            {},
            "reward.parts.a.sandbox=true needs reward.parts.a.path: a function given in Python runs in",
        ),
        ({"a b": {"kind": "exact_integer"}}, {}, "reward.parts.a b: name a part with letters, digits and"),
        ({"kl": {"kind": "exact_integer"}}, {}, "reward.parts.kl: the algorithm has a part of this name"),
        (
            {"a": {"kind": "exact_integer"}},
            {"accuracy_from": "b"},
            "reward.accuracy_from='b' is no part of the reward: choose one of a.",
        ),
        ({}, {"workers": -1}, "reward.workers=-1 is negative: give 1 or more, or 0 for one a core."),
        ({}, {"timeout_s": 0}, "reward.timeout_s=0.0 must be a positive number of seconds."),
        ({}, {"memory_mb": 5}, "reward.memory_mb=5 is too little to start a worker: give 256 or more, or 0."),
    ],
)
def test_one_sentence_a_mistake(parts: dict[str, Any], keys: dict[str, Any], sentence: str) -> None:
    problems = make(parts, **keys).check()
    assert len(problems) == 1
    assert problems[0].startswith(sentence)


def test_kinds_register_once() -> None:
    assert kind_names() == [
        "aime",
        "dapo_math",
        "exact_integer",
        "format",
        "length",
        "math_verify",
        "function",
    ]
    for name in ("exact_integer", "function"):
        with pytest.raises(ValueError, match=f"reward kind '{name}' is registered already"):
            register(Kind(name=name, version=2, spec=ExactSpec, grade=find_kind("exact_integer").grade))


def test_spec_types_are_converted_and_checked() -> None:
    kind = find_kind("length")
    assert build_spec(kind, {"free": "5", "limit": 9}).free == 5
    with pytest.raises(ValueError, match="args of length: Value 'many'"):
        build_spec(kind, {"limit": "many"})


def test_config_imports_neither_torch_nor_graders_libraries() -> None:
    code = (
        "import sys, rlhf.rewards.config, rlhf.rewards.base\n"
        "heavy = {'torch', 'vllm', 'transformers', 'sympy', 'math_verify'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
