"""A data row as JSON and back: times, decimals and bytes, which JSON does not have, carry a tag."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

_Codec = tuple[type, Callable[[Any], str], Callable[[str], Any]]

_CODECS: dict[str, _Codec] = {
    "__datetime__": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "__date__": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "__time__": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "__decimal__": (Decimal, str, Decimal),
    "__bytes__": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
}
"""By tag: type, value to text, text to value. A datetime is a date too, so it comes first."""


def encode(row: Mapping[str, Any]) -> str:
    """The row as JSON. Raises ValueError that names the column whose value cannot be written."""
    try:
        return json.dumps(row, default=_tagged)
    except (TypeError, ValueError):
        column, error = next(found for found in map(_trouble, row.items()) if found[1])
        raise ValueError(
            f"column '{column}' {error}, which cannot be recorded: turn that column into text or drop it."
        ) from None


def decode(text: str) -> dict[str, Any]:
    """The row that `encode` wrote."""
    row: dict[str, Any] = json.loads(text, object_hook=_untagged)
    return row


def _trouble(item: tuple[str, Any]) -> tuple[str, str]:
    """A column and what is wrong with it, empty when nothing is."""
    column, value = item
    try:
        json.dumps({column: value}, default=_tagged)
    except (TypeError, ValueError) as error:
        return column, str(error)
    return column, ""


def _tagged(value: Any) -> dict[str, str]:
    for tag, (kind, written, _) in _CODECS.items():
        if isinstance(value, kind):
            return {tag: written(value)}
    raise ValueError(f"holds a {type(value).__name__}")


def _untagged(value: dict[str, Any]) -> Any:
    for tag, (_, _, read) in _CODECS.items():
        if tag in value:
            return read(value[tag])
    return value
