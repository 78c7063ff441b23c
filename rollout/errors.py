"""What an engine raises: one sentence each, which crosses process boundaries. Imports no torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from trainer.errors import asked_for, described, out_of_memory

LOADING = "loading its model"
"""What an engine is doing until it is ready."""

_LESS = (
    "lower rollout.kv_cache_gib (on a GPU rollout.gpu_memory) or rollout.max_num_seqs, or free memory that "
    "other processes hold"
)
_MORE = (
    "raise rollout.kv_cache_gib (on a GPU rollout.gpu_memory), or lower rollout.max_new_tokens or "
    "data.max_prompt_tokens"
)
_REFUSALS = {
    r"Available memory on node|Free memory on device": _LESS,
    r"KV cache is needed|No available memory for the cache": _MORE,
}
"""How vLLM says before it allocates that memory will not do, and what helps."""


class EngineError(RuntimeError):
    """A call to an engine failed; of an engine in a process of its own, the sentence names the log that holds
    the traceback."""


class EngineOutOfMemory(EngineError):
    """An engine could not allocate what it needs; the sentence names the keys that need less."""


class EngineDied(EngineError):
    """An engine's process is gone; the sentence says how it ended and names its log."""


class EndpointError(RuntimeError):
    """A server did not answer, or refused; the sentence names the key that helps."""


@contextlib.contextmanager
def engine_failures(doing: str) -> Iterator[None]:
    """What fails inside vLLM or torch while an engine is `doing` something becomes an `EngineError`.

    Other exceptions than those that say that memory ran out, and a bare `RuntimeError`, pass through.
    """
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        remedy = _LESS if out_of_memory(error) else _refusal(error)
        if remedy:
            raise EngineOutOfMemory(
                f"the engine ran out of memory while {doing} ({_need(error)}): {remedy}."
            ) from error
        if type(error) is RuntimeError:
            raise EngineError(f"the engine failed while {doing}: {described(error)}.") from error
        raise


def _refusal(error: Exception) -> str:
    """The remedy where vLLM refuses to start for want of memory, else empty."""
    if not isinstance(error, ValueError):
        return ""
    return next((remedy for text, remedy in _REFUSALS.items() if re.search(text, str(error))), "")


def _need(error: Exception) -> str:
    """What was asked for, or what vLLM says first."""
    asked = asked_for(error)
    return f"it asked for {asked} more" if asked else str(error).partition(". ")[0]
