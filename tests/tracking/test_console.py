from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.tracking.config import TrackingConfig
from rlhf.tracking.console import ConsoleTracker, Pace, visible
from tests.tracking.samples import group

CONFIG = {"loop": {"steps": 100}}
STEP = {
    "train/accuracy": 0.412,
    "train/reward": -0.176,
    "length/mean": 5.125,
    "policy/entropy": 0.61,
    "mismatch/logprob_gap": 0.00312,
    "learner/grad_norm": 1.5,
    "time/step": 8.12,
    "policy/clip_low": 0.1,
}
EVALUATION = {
    "eval/accuracy": 0.56,
    "eval/accuracy_low": 0.491,
    "eval/accuracy_high": 0.627,
    "eval/any_mention": 0.61,
    "eval/format": 0.98,
    "eval/length_mean": 4.9,
    "eval/truncated": 0.0,
}


def _run(folder: Path, *, terminal: bool, width: int = 200) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=width, color_system=None)
    tracker = ConsoleTracker(TrackingConfig(completions_shown=2), console)
    tracker.start(CONFIG, folder)
    tracker.log(0, EVALUATION)
    tracker.log(7, STEP)
    tracker.completions(7, [group(1, {"\x1b[31m2\n[bold]": 1.0}), group(2, {"5": 0.0}, verdict="all_wrong")])
    tracker.close()
    tracker.close()
    return output.getvalue()


def test_piped_output_is_one_plain_line_a_step(tmp_path: Path) -> None:
    lines = _run(tmp_path, terminal=False).splitlines()
    assert lines[0] == f"run {tmp_path}: 100 steps"
    assert lines[1] == (
        "eval   0/100  accuracy 56.0 % [49.1, 62.7]  any mention 61.0 %  format 98.0 %  length 4.9  "
        "truncated 0.0 %"
    )
    assert lines[2].startswith(
        "step   7/100  accuracy 41.2 %  reward -0.176  length 5.12  entropy 0.61  gap 0.00312  gradient 1.5  "
        "step 8.1 s"
    )
    assert lines[2].endswith(" left")
    assert lines[3] == "  prompt    <|im_start|>user⏎What is 1 + 1?<|im_end|>⏎<|im_start|>assistant"
    assert lines[4] == r"  response  \x1b[31m2⏎[bold]"
    assert lines[5] == "            reward 1  right  kept"
    assert lines[8] == "            reward -1  wrong  all_wrong"
    assert len(lines) == 9
    assert "\x1b" not in "".join(lines)


def test_lines_are_not_wrapped_in_a_narrow_pipe(tmp_path: Path) -> None:
    lines = _run(tmp_path, terminal=False, width=20).splitlines()
    assert sum(line.startswith(("step", "eval")) for line in lines) == 2
    assert len(lines) == 9


def test_terminal_gets_a_bar_with_time_left_and_a_table(tmp_path: Path) -> None:
    text = _run(tmp_path, terminal=True)
    assert "7/100" in text
    assert "left" in text
    assert "completions of step 7" in text
    assert "│ wrong" in text
    assert r"\x1b[31m2⏎[bold]" in text
    assert "\x1b[31m2" not in text


def test_pace_is_the_median_interval() -> None:
    clock = iter([100.0, 110.0, 112.0, 114.0, 120.0])
    pace = Pace(10, now=lambda: next(clock))
    pace.update(0)
    assert pace.seconds is None
    assert pace.left is None
    for step in (1, 2, 3):
        pace.update(step)
    assert pace.seconds == 2.0  # of 10, 2, 2: one slow start does not count
    assert pace.left == 7 * 2.0
    pace.update(5)  # two steps in 6 seconds
    assert pace.seconds == 2.5
    assert pace.left == 5 * 2.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", "a⏎b"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("tab\there", r"tab\there"),
        ("ünïcode ✓", "ünïcode ✓"),
        ("x" * 50, "x" * 5 + " … " + "x" * 5),
    ],
)
def test_text_is_made_safe_for_a_terminal(text: str, expected: str) -> None:
    assert visible(text, limit=20 if len(text) < 50 else 10) == expected


def test_a_real_pipe(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from rlhf.tracking.config import TrackingConfig
from rlhf.tracking.console import ConsoleTracker
tracker = ConsoleTracker(TrackingConfig())
tracker.start({CONFIG!r}, Path({str(tmp_path)!r}))
for step in range(1, 4):
    tracker.log(step, {STEP!r})
tracker.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["step", f"{i}/100"] for i in (1, 2, 3)
    ]
    assert "\x1b" not in done.stdout
