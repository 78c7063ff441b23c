"""What a publish costs: `OMP_NUM_THREADS=2 python -m tests.benchmarks.publish_speed [speed|faults] [dtype]
[model]`.

`speed`: milliseconds by phase, best and median of twenty publishes into an engine of this process, beside a
copy of the same bytes (same threads, warm pages, measured between the publishes), vLLM's own
`reload_weights`, and oneDNN's repacking alone, which no installation can go below.

`faults`: the probe's gap after one update at the demo's learning rate, right and under each fault of the
learner's source. It shows what log-probs alone can and cannot tell in a number format;
`rollout.weights.config.TOLERANCES` and the other checks of `rollout.weights` rest on it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from rollout.engine_spec import EngineSpec
from rollout.vllm_engine import VllmEngine
from rollout.weights.config import WeightsConfig
from rollout.weights.probe import gap, probe_sequences
from rollout.weights.publisher import Publisher
from rollout.weights.shm import ShmSender
from tests.rollout.weights.learners import PlainLearner

MODEL = Path.home() / ".cache/whetstone/models/smollm2-135m-instruct"
ROUNDS = 20
PHASES = ("gather", "transfer", "install", "hash", "readback", "probe")


def build(folder: Path, dtype: str) -> tuple[VllmEngine, PlainLearner, list[list[int]]]:
    """An engine, a learner of the same model, and a probe of random tokens."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    spec = EngineSpec(
        model=str(folder), dtype=dtype, max_model_len=256, max_num_seqs=32, threads=threads, eager=True,
        transport="shm",
    )  # fmt: skip
    engine = VllmEngine(spec)
    torch.set_num_threads(threads)
    learner = PlainLearner(folder, getattr(torch, dtype))
    return engine, learner, probe_sequences([], learner.model.config.vocab_size)


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def line(title: str, seconds: list[float], copy: float) -> None:
    """Best and median in milliseconds, and the best as a multiple of the copy."""
    best = min(seconds)
    print(f"{title:36} {best * 1e3:8.1f} {median(seconds) * 1e3:8.1f} ms {best / copy:6.1f} x copy")


def speed(folder: Path, dtype: str) -> None:
    """The table of phases."""
    engine, learner, probe = build(folder, dtype)
    publisher = Publisher([engine], WeightsConfig(), probe)
    publisher.publish(learner.weights(), learner.score)
    flat = torch.cat([tensor.flatten() for _, tensor in learner.weights()])
    target = flat.clone()
    phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
    copies: list[float] = []
    for _ in range(ROUNDS):
        copies.append(timed(lambda: target.copy_(flat)))
        report = publisher.publish(learner.weights(), learner.score)
        for phase in PHASES:
            phases[phase].append(report.seconds[phase])
    best = min(copies)
    tensors = len(learner.weights())
    print(f"{dtype}, {flat.nbytes / 1e6:.0f} MB, {torch.get_num_threads()} threads, {tensors} tensors")
    line("memory copy", copies, best)
    line("transfer + install", [a + b for a, b in zip(phases["transfer"], phases["install"])], best)
    for phase in PHASES:
        line(f"  {phase}", phases[phase], best)
    packing = list(repacking(learner))
    line("oneDNN repacking alone", packing, best)
    reloads = [timed(lambda: reload(engine, learner.weights())) for _ in range(5)]
    line("vLLM reload_weights (tied head stale)", reloads, best)
    engine.close()


def repacking(learner: PlainLearner) -> Iterator[float]:
    """Seconds that vLLM's kernels take to repack every matrix, nothing else."""
    from vllm import _custom_ops as ops

    matrices = [tensor for _, tensor in learner.weights() if tensor.dim() == 2]
    handlers = [ops.create_onednn_mm(matrix.t(), 32) for matrix in matrices]
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for index, matrix in enumerate(matrices):
            handlers[index] = ops.create_onednn_mm(matrix.t(), 32)
        yield time.perf_counter() - started


def reload(engine: VllmEngine, weights: list[tuple[str, Tensor]]) -> None:
    """vLLM's own way."""
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})


def faults(folder: Path, dtype: str) -> None:
    """The table of gaps."""
    engine, learner, probe = build(folder, dtype)
    old = {name: tensor.clone() for name, tensor in learner.weights()}
    sender = ShmSender([engine], columns=-1)
    scores = learner.score(probe)

    def show(title: str, weights: dict[str, Tensor], learned: list[list[float]]) -> None:
        sender.install(sender.stage(list(weights.items()), engine.weight_version + 1))
        found = gap(engine.score(probe), learned)
        print(f"{title:44} gap mean {found.mean:9.6f} max {found.max:9.5f}", flush=True)

    show("right, before the update", old, scores)
    learner.update()
    new = {name: tensor.clone() for name, tensor in learner.weights()}
    learned = learner.score(probe)
    moved = sum(int((old[name] != new[name]).sum()) for name in old) / sum(t.numel() for t in old.values())
    print(f"the update changed {moved:.1%} of all weights")
    print(f"{'the update moved log-probs':44} gap mean {gap(scores, learned).mean:9.6f}")
    show("right, after the update", new, learned)
    show("the whole update left out", old, learned)
    layers = learner.model.config.num_hidden_layers
    for layer in (0, layers // 2, layers - 1):
        left = {name: old[name] if f".layers.{layer}." in name else tensor for name, tensor in new.items()}
        show(f"layer {layer} left out", left, learned)
    for part in ("input_layernorm", "self_attn.k_proj", "mlp.up_proj"):
        for layer in (layers // 3, 2 * layers // 3):
            one, other = (f"model.layers.{index}.{part}.weight" for index in (layer, layer + 1))
            swapped = new | {one: new[other], other: new[one]}
            show(f"{part} of layers {layer} and {layer + 1} swapped", swapped, learned)
    engine.close()


def main() -> None:
    """Entry point."""
    mode, dtype, model = (sys.argv[1:] + ["speed", "bfloat16", str(MODEL)][len(sys.argv) - 1 :])[:3]
    {"speed": speed, "faults": faults}[mode](Path(model), dtype)


if __name__ == "__main__":
    main()
