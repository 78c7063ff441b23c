"""`Answers`: the folder of one evaluation. What was answered is on the disk, round by round."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.evaluation import runner
from rlhf.evaluation.proportions import mean
from rlhf.evaluation.runner import Problem
from rlhf.evaluation.stamp import Stamp
from rlhf.files import replace_text, sync

LINES, STAMP, SCORE = "answers.jsonl", "stamp.json", "score.json"


class Answers:
    """Responses of one evaluation in the order of problems and samples."""

    def __init__(self, folder: Path, stamp: Stamp) -> None:
        """Begin in `folder`, or go on with the very evaluation that it holds.

        Raises `UserError` when it holds something else.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.dir={folder} cannot be made ({error.strerror}): name another folder."
            ) from error
        path = folder / STAMP
        if path.exists():
            _refuse_other(folder, json.loads(path.read_text()), stamp)
        elif any(folder.iterdir()):
            raise UserError(f"run.dir={folder} holds other files: name a new or an empty folder.")
        else:
            replace_text(path, json.dumps(stamp.plain(), indent=2) + "\n")
        self.problems = read(folder)

    def whole(self, sizes: Sequence[int]) -> int:
        """How many of the rounds are answered, of which the n-th has `sizes[n]` responses.

        What lies behind the last whole one, of a round in which the evaluation was killed, is cut off.
        """
        rounds, lines = 0, 0
        while rounds < len(sizes) and lines + sizes[rounds] <= len(self.problems):
            lines += sizes[rounds]
            rounds += 1
        self.problems = self.problems[:lines]
        replace_text(self.folder / LINES, "".join(map(_line, self.problems)))
        return rounds

    def append(self, problems: Sequence[Problem]) -> None:
        """Write one round, and wait until it is on the disk."""
        with (self.folder / LINES).open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, problems)))
            file.flush()
            os.fsync(file.fileno())
        sync(self.folder)
        self.problems += problems

    def finish(self, stamp: Stamp, score: dict[str, Any]) -> None:
        """Write `score.json`: the stamp with its counts, and the numbers."""
        text = json.dumps({"stamp": stamp.plain(), "score": score}, indent=2, allow_nan=False)
        replace_text(self.folder / SCORE, text + "\n")


def read(folder: Path) -> list[Problem]:
    """The responses of an evaluation; a last line that a kill cut short is left out."""
    path = folder / LINES
    if not path.exists():
        return []
    *lines, _cut_short = path.read_text(encoding="utf-8").split("\n")
    return [Problem(**json.loads(line)) for line in lines]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """An evaluation that came to its end."""

    stamp: dict[str, Any]
    problems: list[Problem]

    @property
    def accuracy(self) -> float:
        """Share of right responses."""
        return mean([problem.accuracy for problem in self.problems])


def finished(path: Path) -> Finished:
    """What the folder of an evaluation holds, or a run's `evaluations/step-N.json`.

    Raises `UserError` when it is none of the two, or has not come to its end.
    """
    if path.suffix == ".json" and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if "stamp" not in found:
            raise UserError(f"{path} has no stamp: it is of an older run, or no evaluation.")
        return Finished(stamp=found["stamp"], problems=runner.read(path.with_suffix(".jsonl")))
    folder = path
    if (folder / SCORE).is_file():
        found = json.loads((folder / SCORE).read_text(encoding="utf-8"))
        return Finished(stamp=found["stamp"], problems=read(folder))
    if (folder / STAMP).is_file():
        raise UserError(f"{folder} has not come to its end: give the same `rlhf eval` command again.")
    raise UserError(f"{folder} is no evaluation: name a folder that `rlhf eval` wrote.")


def _line(problem: Problem) -> str:
    return json.dumps(asdict(problem), ensure_ascii=False) + "\n"


def _refuse_other(folder: Path, there: dict[str, Any], stamp: Stamp) -> None:
    if there.get("digest") == stamp.digest:
        return
    here = stamp.plain()
    changed = [name for name in here if name not in ("digest", "counts") and there.get(name) != here[name]]
    raise UserError(
        f"run.dir={folder} holds another evaluation ({', '.join(changed) or 'the format'} differs): name "
        "another folder."
    )
