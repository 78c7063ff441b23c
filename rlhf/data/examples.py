"""`Example`: one data row before it becomes a prompt, and what makes two rows the same problem."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""One chat turn, `{"role": ..., "content": ...}`."""


@dataclass(slots=True, kw_only=True)
class Example:
    """One data row: what is asked, the answer, and every column."""

    id: str
    """`source:index`, or the row's own id."""
    source: str
    prompt: str | list[Message]
    """Plain text, or the turns of a conversation that ends with the user's."""
    answer: str | None
    key: str
    """Rows with equal keys are one problem and never lie on two sides of a split."""
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as plain text, its turns one after the other."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(message["content"] for message in self.prompt)


def same_text(text: str) -> str:
    """A text without what does not make it another problem: case and white space."""
    return " ".join(text.casefold().split())


TEXT = "text:"


def text_key(example: Example) -> str:
    """The key of a problem that is known by its text alone."""
    return TEXT + same_text(example.text)


def rank(key: str) -> bytes:
    """A fixed pseudo-random place of a problem in the order that splits are cut from.

    It depends on the problem alone, so every run, seed and machine holds out the same problems.
    """
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
