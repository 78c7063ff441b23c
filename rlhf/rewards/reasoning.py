"""Where a response's reasoning ends and its answer begins: models that think aloud close with `</think>`."""

from __future__ import annotations

from enum import StrEnum

THINK = "<think>"
THINK_END = "</think>"


class Reasoning(StrEnum):
    """What a grader does with the text before the last `</think>`."""

    keep = "keep"
    """Reads it like the rest, as DAPO's and Hendrycks' graders do: an answer in cut-off reasoning counts."""
    drop = "drop"
    """Leaves it out. Reasoning that was opened in the response and never closed holds no answer; a response
    without either tag is read whole (so is one whose `<think>` stood in the prompt: take `require` there)."""
    require = "require"
    """Leaves it out, and a response without `</think>` holds no answer (DeepScaleR's rule)."""


def answer_part(text: str, reasoning: Reasoning) -> str | None:
    """The part of a response in which an answer may stand; None when there is none."""
    if reasoning is Reasoning.keep:
        return text
    before, end, after = text.rpartition(THINK_END)
    if end:
        return after
    return None if reasoning is Reasoning.require or THINK in before + after else text
