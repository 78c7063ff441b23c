from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from rlhf.evaluation.config import EvaluationConfig


def test_when_it_is_due() -> None:
    config = EvaluationConfig(every=10)
    assert [step for step in range(26) if config.due(step, 25)] == [0, 10, 20, 25]
    ends = EvaluationConfig(every=0)
    assert [step for step in range(26) if ends.due(step, 25)] == [0, 25]
    never = EvaluationConfig(every=0, at_start=False, at_end=False)
    assert not any(never.due(step, 25) for step in range(26))
    assert not EvaluationConfig(every=5, at_end=False).due(25, 25)


def test_composes() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(EvaluationConfig), {"every": 5, "prompts": 200})
    assert OmegaConf.to_object(merged) == EvaluationConfig(every=5, prompts=200)
    assert EvaluationConfig().check() == []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"every": -1},
            "evaluation.every=-1 is negative: set a number of steps, or 0 for none between the first and the "
            "last.",
        ),
        ({"prompts": -5}, "evaluation.prompts=-5 is negative: set a number of prompts, or 0 for all."),
        (
            {"max_new_tokens": -1},
            "evaluation.max_new_tokens=-1 is negative: set a number of tokens, or 0 for training's limit.",
        ),
        (
            {"temperature": -0.1},
            "evaluation.temperature=-0.1 is negative: set 0 for greedy, or a positive temperature.",
        ),
        ({"top_p": 0.0}, "evaluation.top_p=0.0 is outside (0, 1]: set 1.0 to keep every token."),
        ({"top_p": 1.5}, "evaluation.top_p=1.5 is outside (0, 1]: set 1.0 to keep every token."),
    ],
)
def test_bad_values_say_what_to_do(values: dict[str, float], sentence: str) -> None:
    assert EvaluationConfig(**values).check() == [sentence]  # type: ignore[arg-type]
