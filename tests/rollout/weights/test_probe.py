"""The probe's sequences and what is made of their scores."""

from __future__ import annotations

import math

import pytest

from rollout.weights.probe import gap, probe_length, probe_sequences, stood_still


def test_sequences_are_fixed_and_cover_many_tokens() -> None:
    prompts = [[1, 2, 3], [4], list(range(100))]
    probe = probe_sequences(prompts, 49152, count=8, length=64)
    assert probe[:2] == [[1, 2, 3], list(range(64))]  # one token gives nothing to score
    assert [len(sequence) for sequence in probe[2:]] == [64] * 8
    assert len({token for sequence in probe[2:] for token in sequence}) > 500
    assert max(map(max, probe)) < 49152
    assert probe == probe_sequences(prompts, 49152, count=8, length=64)
    assert probe != probe_sequences(prompts, 49152, count=8, length=64, seed=1)


def test_gap_is_over_tokens_and_says_where() -> None:
    found = gap([[-1.0, -2.0], [-3.0]], [[-1.0, -2.5], [-2.9]])
    assert found.mean == pytest.approx(0.2)
    assert found.max == 0.5
    assert (found.sequence, found.token) == (0, 1)


def test_no_number_is_an_infinite_gap() -> None:
    found = gap([[-1.0, math.nan]], [[-1.0, -1.0]])
    assert found.mean == found.max == math.inf
    assert gap([[-math.inf]], [[-math.inf]]).max == math.inf


def test_scores_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different numbers of tokens"):
        gap([[-1.0, -2.0]], [[-1.0]])


def test_standing_still() -> None:
    before, learner, moved = [[-1.0, -2.0]], [[-1.1, -2.1]], [[-1.0, -2.2]]
    assert not stood_still(before, before, learner, learner)  # nobody moved
    assert not stood_still(before, moved, learner, [[-1.2, -2.2]])  # both did
    assert not stood_still(before, before, learner, [[-1.1, -2.2]])  # half of the learner's is too little
    assert stood_still(before, before, learner, [[-1.2, -2.2]])


def test_a_probe_is_no_longer_than_an_engine_scores() -> None:
    """Scoring generates one token more."""
    assert [probe_length(length) for length in (2, 3, 20, 48, 49, 4096)] == [2, 2, 19, 47, 48, 48]
    assert max(map(len, probe_sequences([list(range(90))], 100, length=probe_length(20)))) == 19
