"""`Recorder`: every group of a step, kept or dropped, in one parquet file; reads back into equal objects.

One row is one trajectory, so that a table tool shows responses side by side; the columns of its group repeat
(parquet stores a repeated value once). Floats are stored as 64 bits: what is read equals what was written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout import row_json
from rollout.types import FinishReason, Group, Prompt, Trajectory, VersionSpan

_TOKENS = pa.list_(pa.int32())

SCHEMA = pa.schema(
    [
        ("group", pa.string()),
        ("sample_index", pa.int32()),
        ("verdict", pa.string()),
        ("born", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt_text", pa.string()),
        ("answer", pa.string()),
        ("source", pa.string()),
        ("row", pa.string()),
        ("text", pa.string()),
        ("extracted", pa.string()),
        ("accuracy", pa.float64()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("rewards", pa.map_(pa.string(), pa.float64())),
        ("grade_status", pa.string()),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("adapter", pa.string()),
        ("prompt_token_ids", _TOKENS),
        ("prompt_ids", _TOKENS),
        ("response_ids", _TOKENS),
        ("logprobs", pa.list_(pa.float64())),
        (
            "version_spans",
            pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32()), ("version", pa.int64())])),
        ),
        ("step_spans", pa.list_(pa.list_(pa.int32(), 2))),
    ]
)


class Recorder:
    """Writes the rollouts of a run into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, groups: Sequence[Group]) -> Path:
        """Write all groups of `step`; a file of the same step (of a run that was resumed) is replaced.

        The file appears whole or not at all. Raises ValueError for a group without trajectories and for a
        data column that cannot be written.
        """
        rows = [_row(group, trajectory) for group in groups for trajectory in _trajectories(group)]
        path = _path(self.folder, step)
        partial = path.with_suffix(".partial")
        try:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return path


def read(folder: Path, step: int) -> list[Group]:
    """The groups that were written for `step`. Raises FileNotFoundError when there are none."""
    groups: dict[str, Group] = {}
    for row in pq.read_table(_path(Path(folder), step)).to_pylist():
        group = groups.setdefault(row["group"], _empty_group(row))
        group.trajectories.append(_trajectory(row))
    return list(groups.values())


def steps(folder: Path) -> list[int]:
    """The steps that `folder` holds, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in Path(folder).glob("step_*.parquet"))


def cut_back(folder: Path, step: int) -> None:
    """Remove the steps after `step`."""
    for later in steps(folder):
        if later > step:
            _path(folder, later).unlink()


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.parquet"


def _trajectories(group: Group) -> list[Trajectory]:
    if not group.trajectories:
        raise ValueError(f"Group '{group.id}' has no trajectories: there is nothing to record.")
    return group.trajectories


def _row(group: Group, trajectory: Trajectory) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "group": group.id,
        "verdict": group.verdict,
        "born": group.born,
        "prompt_id": prompt.id,
        "prompt_text": prompt.text,
        "prompt_token_ids": prompt.token_ids,
        "answer": prompt.answer,
        "source": prompt.source,
        "row": _encoded(prompt),
        "rewards": list(trajectory.rewards.items()),
        "finish_reason": trajectory.finish_reason.value,
        "version_spans": [
            {"start": span.start, "end": span.end, "version": span.version}
            for span in trajectory.version_spans
        ],
        **{name: getattr(trajectory, name) for name in _PLAIN},
    }


_PLAIN = (
    "sample_index",
    "text",
    "extracted",
    "accuracy",
    "reward",
    "advantage",
    "grade_status",
    "seed",
    "adapter",
    "prompt_ids",
    "response_ids",
    "logprobs",
    "step_spans",
)
"""Fields of a trajectory that are columns as they are."""


def _empty_group(row: dict[str, Any]) -> Group:
    prompt = Prompt(
        id=row["prompt_id"],
        token_ids=row["prompt_token_ids"],
        text=row["prompt_text"],
        answer=row["answer"],
        source=row["source"],
        row=row_json.decode(row["row"]),
    )
    return Group(id=row["group"], prompt=prompt, trajectories=[], born=row["born"], verdict=row["verdict"])


def _trajectory(row: dict[str, Any]) -> Trajectory:
    plain = {name: row[name] for name in _PLAIN} | {"step_spans": [tuple(span) for span in row["step_spans"]]}
    return Trajectory(
        finish_reason=FinishReason(row["finish_reason"]),
        version_spans=[VersionSpan(**span) for span in row["version_spans"]],
        rewards=dict(row["rewards"]),
        **plain,
    )


def _encoded(prompt: Prompt) -> str:
    try:
        return row_json.encode(prompt.row)
    except ValueError as error:
        raise ValueError(f"The data row of prompt '{prompt.id}': {error}") from None
