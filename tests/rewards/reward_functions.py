"""Reward functions that the tests name by dotted path."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any


def brevity(
    prompts: list[str], responses: list[str], answers: list[str], rows: list[dict[str, Any]], **extra: Any
) -> list[float]:
    """1 for an empty response, 0 for one of `limit` characters."""
    return [max(0.0, 1.0 - len(response) / extra.get("limit", 100)) for response in responses]


def plain(
    prompts: list[str], responses: list[str], answers: list[str], rows: list[dict[str, Any]]
) -> list[float]:
    """No room for keyword arguments."""
    return [float(response == answer) for response, answer in zip(responses, answers)]


def detailed(
    prompts: list[str], responses: list[str], answers: list[str], rows: list[dict[str, Any]]
) -> list[dict[str, float]]:
    """Two named parts and the accuracy; uses a column of the data."""
    return [
        {"level": float(row["level"]), "short": float(len(text) < 5), "accuracy": float(text == answer)}
        for text, answer, row in zip(responses, answers, rows)
    ]


async def judged(
    prompts: list[str], responses: list[str], answers: list[str], rows: list[dict[str, Any]]
) -> list[float]:
    """Waits for all at once."""

    async def one(text: str) -> float:
        await asyncio.sleep(0.05)
        return float(len(text) % 2)

    return list(await asyncio.gather(*(one(text) for text in responses)))


def hostile(
    prompts: list[str], responses: list[str], answers: list[str], rows: list[dict[str, Any]]
) -> list[float]:
    """Does what the response says."""
    if "hang" in responses:
        time.sleep(600)
    if "crash" in responses:
        os._exit(5)
    if "raise" in responses:
        raise RuntimeError("no judge")
    return [1.0] * len(responses)


def words(
    prompts: list[str], responses: list[str], answers: list[str], rows: list[dict[str, Any]]
) -> list[str]:
    """Returns the wrong type."""
    return ["good"] * len(responses)


NOT_A_FUNCTION = 3
