"""The `Engine` protocol: token ids in, token ids and behaviour log-probs out, weights by version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from rollout.types import FinishReason, VersionSpan


@dataclass(slots=True, kw_only=True, frozen=True)
class Sampling:
    """How responses are sampled. Nothing else (no `generation_config`) alters it."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Every end token of the model and its chat template."""
    ignore_eos: bool = False
    """Only benchmarks set it: generate exactly `max_tokens`."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens get probability zero (top-p, top-k or min-p)."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(slots=True, kw_only=True)
class Request:
    """One response to generate."""

    prompt_ids: list[int]
    seed: int
    adapter: str | None = None


@dataclass(slots=True, kw_only=True)
class Completion:
    """One generated response."""

    token_ids: list[int]
    logprobs: list[float]
    """Under the sampling distribution (temperature and truncation applied), one per token."""
    finish_reason: FinishReason
    version_spans: list[VersionSpan] = field(default_factory=list)


class Engine(Protocol):
    """One generation engine. Implementations: `rollout.vllm_engine`, `rollout.child_engine`,
    `rollout.ray_engine`."""

    @property
    def weight_version(self) -> int:
        """The version of the installed weights; 0 are those loaded from disk."""
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Generate one completion a request, in order. The whole round is handed over before it starts."""
        ...

    def score(self, sequences: Sequence[list[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of `tokens[1:]` given what precedes, one list of `len(tokens) - 1` a sequence."""
        ...

    def effective_sampling(self, sampling: Sampling) -> dict[str, Any]:
        """Every sampling parameter as the engine gets it, defaults included, to be printed."""
        ...

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Open the weight channel (vLLM's `init_weight_transfer_engine`)."""
        ...

    def receive_weights(self, info: dict[str, Any], version: int) -> dict[str, Any]:
        """Verify and install one version; the old version stays when verification fails.

        Returns receiver-side timings and hashes. Raises `WeightTransferError` naming the bad tensors.
        """
        ...

    def memory(self) -> dict[str, float]:
        """Bytes: `peak`, the most that the engine's process has had in main memory, and `kv_cache`."""
        ...

    def close(self) -> None:
        """Release the engine and whatever process holds it; safe to call twice."""
        ...


@runtime_checkable
class Sleeper(Protocol):
    """What an engine that can sleep has besides."""

    def sleep(self, level: int) -> None:
        """Give GPU memory back until the next call that needs it; see `VllmEngine.sleep`."""
        ...


@runtime_checkable
class OwnProcess(Protocol):
    """What an engine in a process of its own has besides."""

    @property
    def label(self) -> str:
        """What it is called where its stacks are written."""
        ...

    def stacks(self) -> str:
        """Where every Python thread of that process is, also while a call hangs; empty when it cannot say."""
        ...
