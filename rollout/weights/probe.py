"""The fixed probe: sequences that engine and learner score after every publish, and what must then hold."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Scores = list[list[float]]

LENGTH = 48
"""Most tokens of a probe sequence."""

MOVED_SHARE = 0.5
"""Share of the learner's log-probs that must have changed before an engine's may not stand still."""


@dataclass(slots=True, kw_only=True)
class Gap:
    """How far an engine's log-probs are from the learner's, in nats, over all tokens of the probe."""

    mean: float
    max: float
    sequence: int
    """Where the largest gap is."""
    token: int
    """Its position in that sequence."""


def probe_sequences(
    prompts: Sequence[Sequence[int]], vocabulary: int, *, count: int = 1, length: int = LENGTH, seed: int = 0
) -> list[list[int]]:
    """The first `count` prompts, cut to `length` tokens, and `count` sequences of `length` random tokens.

    Prompts are where log-probs matter; random tokens, below `vocabulary`, read many rows of the embedding.
    The same arguments give the same probe. It is small, for prompt log-probs cost an engine more than
    generating does. `length` may not exceed what the engine can score, see `probe_length`.
    """
    generator = random.Random(seed)
    drawn = [[generator.randrange(vocabulary) for _ in range(length)] for _ in range(count)]
    return [list(prompt[:length]) for prompt in prompts[:count] if len(prompt) > 1] + drawn


def probe_length(max_model_len: int) -> int:
    """Tokens of a probe sequence for an engine of `max_model_len` tokens: scoring makes one more."""
    return max(2, min(LENGTH, max_model_len - 1))


def gap(engine: Scores, learner: Scores) -> Gap:
    """Compare two scorings of the same sequences. A value that is not a number counts as an infinite gap.

    Raises ValueError when they are not of the same shape.
    """
    if [len(row) for row in engine] != [len(row) for row in learner]:
        raise ValueError(
            "Engine and learner scored different numbers of tokens: both return len(tokens) - 1 each."
        )
    gaps = [
        (_distance(one, other), sequence, token)
        for sequence, rows in enumerate(zip(engine, learner))
        for token, (one, other) in enumerate(zip(*rows))
    ]
    largest, sequence, token = max(gaps)
    return Gap(mean=sum(g for g, _, _ in gaps) / len(gaps), max=largest, sequence=sequence, token=token)


def _distance(one: float, other: float) -> float:
    distance = abs(one - other)
    return distance if distance == distance else float("inf")


def stood_still(engine_before: Scores, engine: Scores, learner_before: Scores, learner: Scores) -> bool:
    """Whether the learner's log-probs moved and not one of the engine's did.

    An engine scores the same tokens with the same weights to the same bit, so this finds a publish that was
    dropped also where the move is smaller than rounding.
    """
    moved = [a != b for then, now in zip(learner_before, learner) for a, b in zip(then, now)]
    return sum(moved) > MOVED_SHARE * len(moved) and engine_before == engine
