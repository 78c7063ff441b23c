from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.tracking.base import Continued
from rlhf.tracking.config import TrackingConfig
from rlhf.tracking.tensorboard import TensorBoardTracker
from tests.tracking.samples import group


def _read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def _text(accumulator: EventAccumulator, tag: str) -> str:
    (event,) = accumulator.Tensors(f"{tag}/text_summary")
    return bytes(event.tensor_proto.string_val[0]).decode()


def test_scalars_and_texts_are_read_back_by_tensorboard(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(TrackingConfig(completions_shown=1))
    tracker.start({"loop": {"steps": 3}}, tmp_path)
    tracker.log(0, {"eval/accuracy": 0.25})
    tracker.log(1, {"train/accuracy": 0.5, "learner/grad_norm": math.nan})
    tracker.completions(1, [group(1, {"2 <b>|\nend": 1.0})])
    assert _read(tmp_path).Scalars("train/accuracy")[0].value == 0.5  # flushed while the run goes on
    tracker.log(2, {"train/accuracy": 0.75})
    tracker.close()
    tracker.close()
    found = _read(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/accuracy")] == [(1, 0.5), (2, 0.75)]
    assert [(e.step, e.value) for e in found.Scalars("eval/accuracy")] == [(0, 0.25)]
    assert math.isnan(found.Scalars("learner/grad_norm")[0].value)
    assert '"steps": 3' in _text(found, "config")
    assert "| 2 &lt;b>\\|<br>end | 2 | 1 | 1 | kept |" in _text(found, "completions")


def test_what_came_after_the_checkpoint_is_hidden(tmp_path: Path) -> None:
    for continued, steps in ((None, range(5)), (Continued(step=2), range(3, 4))):
        tracker = TensorBoardTracker(TrackingConfig())
        tracker.start({}, tmp_path, continued)
        for step in steps:
            tracker.log(step, {"train/accuracy": step + (10 if continued else 0)})
        tracker.close()
    assert [(e.step, e.value) for e in _read(tmp_path).Scalars("train/accuracy")] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 13),
    ]


def test_logging_before_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        TensorBoardTracker(TrackingConfig()).log(1, {})
