"""A learner in processes of its own and what each of them took: for the estimate's test and the benchmark.

    python -m tests.trainer.memory.measured '{"dtype": "float32"}'

prints one line of JSON. torchrun's variables make the process one of several ranks.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Device, LearnerConfig, OptimizerConfig, OptimizerName, Precision
from trainer.memory.config import ActivationCheckpointing, MemoryConfig, OffloadState
from trainer.memory.estimate import ModelShape

SHAPE = ModelShape(
    hidden=768, layers=12, intermediate=2048, vocabulary=16384, heads=12, kv_heads=4, head_dim=64, tied=True
)
"""A Llama of 88 million parameters."""
TOKENS = 512
"""Packed tokens of a micro-batch; a step has two."""
STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one rank took."""

    peak: int
    """Most that was resident at once, loading included, bytes (the kernel's own count)."""
    held: int
    """Resident after `Learner.offload`, bytes."""
    seconds: float
    """CPU seconds of the last step, `offload` and what it brings back included."""


def measured(settings: Mapping[str, Any], ranks: int = 1) -> list[Measured]:
    """Run `STEPS` steps with `settings` (see `_config`) on so many ranks; what each took."""
    command = [sys.executable, "-m", "tests.trainer.memory.measured", json.dumps(dict(settings))]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    statuses = [process.returncode for process in processes]
    assert statuses == [0] * ranks, f"exit statuses {statuses}"
    return [Measured(**json.loads(output.splitlines()[-1])) for output in outputs]


def _free_port() -> int:
    from tests.trainer.parallel.ranks import free_port

    return free_port()


def _config(settings: Mapping[str, Any]) -> LearnerConfig:
    """Keys: `dtype`, `optimizer`, `checkpointing`, `offload_state`, `folder`, at their defaults if absent."""
    return LearnerConfig(
        device=Device.cpu,
        dtype=Precision(settings.get("dtype", "bfloat16")),
        optimizer=OptimizerConfig(name=OptimizerName(settings.get("optimizer", "adamw")), lr=1e-5),
        memory=MemoryConfig(
            activation_checkpointing=ActivationCheckpointing(settings.get("checkpointing", "none")),
            offload_state=OffloadState(settings.get("offload_state", "never")),
            folder=settings.get("folder", ""),
        ),
        token_budget=TOKENS,
        threads=1,
    )


def _model() -> Any:
    from transformers import LlamaConfig

    from tests.trainer.samples import from_config

    return from_config(
        LlamaConfig(
            hidden_size=SHAPE.hidden,
            num_hidden_layers=SHAPE.layers,
            intermediate_size=SHAPE.intermediate,
            vocab_size=SHAPE.vocabulary,
            num_attention_heads=SHAPE.heads,
            num_key_value_heads=SHAPE.kv_heads,
            head_dim=SHAPE.head_dim,
            tie_word_embeddings=SHAPE.tied,
        )
    )


def _rows(groups: int) -> list[Any]:
    """So many groups, each a micro-batch in full: a prompt and three responses of a quarter of it."""
    from tests.trainer.samples import VOCABULARY, make_row

    draw, part = random.Random(0), TOKENS // 4
    tokens = [[draw.randrange(VOCABULARY) for _ in range(part)] for _ in range(4 * groups)]
    return [
        make_row(tokens[4 * group], tokens[4 * group + place], group, draw)
        for group in range(groups)
        for place in (1, 2, 3)
    ]


def _learn(learner: Any) -> dict[str, float]:
    """The last of `STEPS` steps in seconds, and what is held after it."""
    rows = _rows(2 * learner.ranks.size)
    seconds = 0.0
    for _ in range(STEPS):
        start = time.process_time()
        learner.update([rows])
        learner.offload()
        seconds = time.process_time() - start
    return {"seconds": seconds}


def _status(name: str) -> int:
    """Bytes that the kernel gives in this process's status under `name`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Learn and print what it took."""
    from tests.trainer.parallel.ranks import join, led

    settings = json.loads(sys.argv[1])
    team = join()
    found: dict[str, Any] = {"held": 0}

    def scenario(learner: Any) -> dict[str, float]:
        return _learn(learner) | {"held": _status("VmRSS")}

    found |= led(scenario, _config(settings), team, model=_model()) or {"seconds": 0.0}
    if team is not None:
        team.leave()
    print(json.dumps({**found, "peak": _status("VmHWM")}))


if __name__ == "__main__":
    main()
