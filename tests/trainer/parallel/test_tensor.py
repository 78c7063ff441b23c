"""What does not let itself be split is refused by name; ranges cover the vocabulary once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer.samples import tiny_model
from trainer.parallel.tensor import VocabularyGroup, split_layers
from trainer.policy import Policy


def mesh(size: int, rank: int = 0) -> Any:
    """A mesh of one dimension that nothing is sent over."""
    return SimpleNamespace(size=lambda: size, get_group=lambda: None, get_local_rank=lambda: rank)


@pytest.mark.parametrize(
    ("kind", "changes", "ranks", "said"),
    [
        (
            "llama",
            {},
            4,
            "learner.parallel.tensor=4 does not divide the 6 query heads and 2 key-value heads of "
            "LlamaForCausalLM: set one of 1, 2.",
        ),
        (
            "llama",
            {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3},
            2,
            "learner.parallel.tensor=2 does not divide the 9 query heads and 3 key-value heads of "
            "LlamaForCausalLM: set one of 1, 3.",
        ),
        ("llama", {"intermediate_size": 65}, 2, "learner.parallel.tensor=2 does not divide the 65 hidden "),
        (
            "qwen3",
            {},
            2,
            "learner.parallel.tensor=2 splits plain Llama and Qwen2 blocks, which those of Qwen3",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(kind: str, changes: Any, ranks: int, said: str) -> None:
    with pytest.raises(ValueError, match="learner") as caught:
        split_layers(Policy(tiny_model(kind, **changes)), mesh(ranks))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(("vocabulary", "ranks"), [(300, 2), (301, 4), (3, 4)])
def test_ranges_cover_the_vocabulary_once(vocabulary: int, ranks: int) -> None:
    ranges = [VocabularyGroup(mesh(ranks, rank)).range(vocabulary) for rank in range(ranks)]
    assert [token for first, last in ranges for token in range(first, last)] == list(range(vocabulary))
