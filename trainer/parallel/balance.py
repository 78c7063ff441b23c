"""Which rank learns from which rows: by what they cost, and the same on every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.batch import Row
from trainer.packing import packed_length
from trainer.policy import Policy


@dataclass(frozen=True, slots=True)
class Costs:
    """What rows cost, in the work that one token makes outside attention."""

    per_key: float
    """Work of one query with one key."""
    shares_prompts: bool
    """Whether a group's prompt is computed once."""

    @classmethod
    def of(cls, policy: Policy) -> Costs:
        """Those of a policy.

        A token takes two operations for every parameter of the layers, and in every layer four for every
        dimension of every head and every key that it sees.
        """
        decoder, config = policy.model.get_decoder(), policy.model.config
        embeddings = {id(p) for p in policy.model.get_input_embeddings().parameters()}
        weights = sum(p.numel() for p in decoder.parameters() if id(p) not in embeddings)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim
        return cls(per_key=attention / max(1, 2 * weights), shares_prompts=policy.shares_prompts)

    def of_rows(self, rows: Sequence[Row]) -> float:
        """Rows of one group: its prompt (once where it is shared), then each response behind it."""
        rows = [row for row in rows if row.response_ids]
        if not rows:
            return 0.0
        prompt = len(rows[0].prompt_ids)
        copies = 1 if self.shares_prompts else len(rows)
        lengths = [packed_length(row) for row in rows]
        tokens = copies * prompt + sum(lengths)
        keys = copies * prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in lengths)
        return tokens + self.per_key * keys


def deal(rows: Sequence[Row], ranks: int, costs: Costs) -> list[list[int]]:
    """Indices of `rows` for each rank, ascending; a group stays together, for its prompt is shared.

    The costliest group goes first, each to the rank that has least to do (the lower one of equals): within
    a third of the best there is. Without sharing, a row stands for itself. Rows and order alone decide.
    """
    units: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        units.setdefault((row.group, 0 if costs.shares_prompts else index), []).append(index)
    priced = [(costs.of_rows([rows[i] for i in indices]), indices) for indices in units.values()]
    load = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for cost, indices in sorted(priced, key=lambda unit: -unit[0]):
        least = min(range(ranks), key=lambda rank: load[rank])
        load[least] += cost
        shares[least] += indices
    return [sorted(share) for share in shares]
