"""Runs whose disk is full: a real file system of 64 MiB, mounted where nobody else sees it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each run."""
    folder = tmp_path_factory.mktemp("disk")
    probe = [*PRIVATE, "mount", "-t", "tmpfs", "none", str(folder)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no private mounts")
    done = subprocess.run(
        [*PRIVATE, sys.executable, "-m", "tests.integration.full_disk", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) | {"folder": str(folder)}
    return found


@pytest.mark.parametrize(
    ("what", "moment", "saved"),
    [
        ("rollouts", "in step 2", [1]),
        ("metrics", "after step 2", [1]),
        ("checkpoint", "after step 2", [1]),
        ("evaluation", "after step 3", [1, 2]),
    ],
)
def test_what_cannot_be_written_stops_the_run(
    what: str, moment: str, saved: list[int], outcomes: dict[str, Any]
) -> None:
    found, folder = outcomes[what], f"{outcomes['folder']}/{what}"
    shown = what if what in ("rollouts", "metrics") else f"the {what}"
    assert (found["status"], found["said"]) == (
        1,
        [
            f"rlhf: the run stopped {moment}: the disk of {folder} is full, {shown} could not be "
            f"written: free some space. Then the same command with run.dir={folder} resume=auto goes on "
            f"after step {saved[-1]}."
        ],
    )
    assert (found["whole"], found["damaged"], found["leftovers"]) == (saved, [], [])


def test_a_report_that_cannot_be_written_is_said_and_the_run_counts(outcomes: dict[str, Any]) -> None:
    found = outcomes["report"]
    assert (found["status"], found["whole"]) == (0, [2, 3])
    assert found["logged"] == [
        f"the disk of {outcomes['folder']}/report is full, the report could not be written: free some space."
    ]


def test_it_goes_on_once_there_is_space(outcomes: dict[str, Any]) -> None:
    assert outcomes["resumed while full"]["said"] == [
        1,
        [
            "rlhf: the run could not start: the disk is full, the run's files could not be written: free "
            "some space."
        ],
    ]
    assert outcomes["resumed while full"]["whole"] == [1]
    assert outcomes["resumed"]["said"][0] == 0
    assert outcomes["resumed"]["whole"] == [2, 3]
    assert outcomes["resumed"]["metrics"] == [0, 1, 2, 3]
    assert outcomes["resumed"]["rollouts"] == [1, 2, 3]
