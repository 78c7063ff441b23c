"""State put elsewhere between calls: nothing is left behind, and everything comes back bit for bit."""

from __future__ import annotations

import copy
import gc
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.parallel import ranks
from tests.trainer.parallel.ranks import adam, build, config, join, led
from tests.trainer.samples import Reinforce, random_rows, tiny_model
from trainer.config import Device, LearnerConfig, LoraConfig, OptimizerConfig, OptimizerName, Precision
from trainer.errors import OffloadError
from trainer.learner import Learner
from trainer.memory.config import ActivationCheckpointing, MemoryConfig, OffloadState
from trainer.memory.offload import SMALL, FileStore, StateOffload

DISK = MemoryConfig(offload_state=OffloadState.disk)
ROWS = random_rows(groups=5, samples=4)


def scenario(learner: Learner) -> dict[str, Any]:
    """Everything that a run asks of a learner, each time after its state was put away."""
    found: dict[str, Any] = {}
    for step in range(3):
        learner.offload()
        found[f"logprobs {step}"] = learner.logprobs(ROWS)
        learner.offload()
        found[f"update {step}"] = learner.update([ROWS[:8], ROWS[8:]])
        learner.end_rollout()
    learner.offload()
    found["reference"] = learner.reference_logprobs(ROWS)
    learner.offload()
    found["weights"] = {name: tensor.clone() for name, tensor in learner.weights()}
    learner.offload()
    found["adapter"] = {name: tensor.clone() for name, tensor in learner.adapter_weights().items()}
    learner.offload()
    found["gap"] = learner.merge_gap()
    learner.offload()
    state = copy.deepcopy(learner.state_dict())
    learner.update([ROWS])
    learner.offload()
    learner.load_state_dict(copy.deepcopy(state))
    found["again"] = learner.update([ROWS])
    return found | {"state": state}


def equal(one: Any, other: Any) -> bool:
    """Nested containers, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": Precision.bfloat16},
    "float32, untied": {"kind": "qwen2"},
    "sgd": {"optimizer": OptimizerConfig(name=OptimizerName.sgd, lr=0.01)},
    "schedule-free": {"optimizer": OptimizerConfig(name=OptimizerName.schedulefree, lr=0.01)},
    "lora": {"lora": LoraConfig(rank=4), "dtype": Precision.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_results_are_the_same(case: str) -> None:
    changes = {"optimizer": adam(), **CASES[case]}
    kind = changes.pop("kind", "llama")
    stays, moves = (
        scenario(build(config(**changes, memory=memory), None, kind=kind, needs_reference=True))
        for memory in (MemoryConfig(), DISK)
    )
    assert [name for name in stays if not equal(stays[name], moves[name])] == []


def spread() -> dict[str, Any] | None:
    """The scenario on this rank, with and without; what was away on each."""
    team = join()
    found = {}
    for name, memory in (("stays", MemoryConfig()), ("moves", DISK)):
        settings = config(optimizer=adam(), memory=memory, dtype=Precision.bfloat16)
        found[name] = led(scenario, settings, team, needs_reference=True)
    if team is not None:
        team.leave()
    return found


def test_ranks_put_their_parts_away_together() -> None:
    leader, other = ranks.run(2, spread)
    assert other == {"stays": None, "moves": None}
    assert [n for n in leader["stays"] if not equal(leader["stays"][n], leader["moves"][n])] == []


def test_all_of_the_state_is_away() -> None:
    """bfloat16 weights, float32 masters and two moments: 14 bytes a parameter, less small tensors."""
    learner = build(config(optimizer=adam(), memory=DISK, dtype=Precision.bfloat16), None)
    learner.update([ROWS])
    working = [(p, p.nbytes) for p in learner.policy.parameters()]
    rest = [(t, t.nbytes) for t in [*learner.master.parameters, *learner.optimizer.tensors()]]
    large = [(tensor, size) for tensor, size in [*working, *rest] if size >= SMALL]
    learner.offload()
    assert learner._state_offload.bytes_away == sum(size for _, size in large)
    assert not any(interior(tensor).any() for tensor, _ in large)
    assert learner._state_offload.bytes_away > 0.9 * sum(size for _, size in [*working, *rest])
    learner.logprobs(ROWS)
    assert learner._state_offload.bytes_away == 0
    assert all(interior(tensor).any() for tensor, _ in large if len(interior(tensor)))


def interior(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes that lie at least a page from either end: those are on pages of their own."""
    return tensor.detach().flatten().view(torch.uint8)[4096:-4096]


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_the_memory_goes_back_to_the_system(tmp_path: Path) -> None:
    """128 MB in four storages, and a view and an alias that take nothing."""
    offload = StateOffload(FileStore(tmp_path))
    tensors = [torch.rand(8 << 20) for _ in range(4)]
    copies = [tensor.sum(dtype=torch.float64) for tensor in tensors]
    faces = [*tensors, tensors[0][5:], tensors[1].view(2, -1), torch.rand(7)]
    gc.collect()
    before = resident()
    offload.offload(faces)
    assert offload.bytes_away == 4 * 4 * (8 << 20)
    assert before - resident() > 0.95 * offload.bytes_away
    offload.offload([torch.rand(1 << 20)])  # what is away stays so until it is brought back
    assert offload.bytes_away == 4 * 4 * (8 << 20)
    assert list(tmp_path.iterdir()) == []  # nothing that a killed process could leave
    offload.reload()
    assert [tensor.sum(dtype=torch.float64) for tensor in tensors] == copies
    assert faces[4][0] == tensors[0][5]
    offload.close()


def test_mapped_files_and_what_numpy_has_seen(tmp_path: Path) -> None:
    """Storages that cannot be resized: a private mapping that was written to, and one shared with numpy."""
    torch.arange(1 << 16, dtype=torch.float32).numpy().tofile(tmp_path / "weights")
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=1 << 16)
    mapped.add_(1)
    seen = torch.arange(1 << 16, dtype=torch.float32)
    array = seen.numpy()
    offload = StateOffload(FileStore(tmp_path))
    offload.offload([mapped, seen])
    assert not interior(seen).any()
    offload.reload()
    assert torch.equal(mapped, torch.arange(1, (1 << 16) + 1, dtype=torch.float32))
    assert torch.equal(seen, torch.arange(1 << 16, dtype=torch.float32))
    assert array[-1] == (1 << 16) - 1
    offload.close()


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path) -> None:
    offload = StateOffload(FileStore(tmp_path))
    tensors = [torch.rand(1 << 16) for _ in range(3)]
    copies = [tensor.clone() for tensor in tensors]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    try:
        with pytest.raises(OffloadError) as caught:
            offload.offload(tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        "the file of learner.memory.offload_state=disk failed (File too large): name a learner.memory.folder "
        "with more room, or set learner.memory.offload_state=never."
    )
    assert offload.bytes_away == 0
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies))
    offload.close()


def refused(memory: MemoryConfig) -> str:
    with pytest.raises(ValueError, match=r"learner\.memory") as caught:
        Learner(
            LearnerConfig(device=Device.cpu, memory=memory),
            tiny_model(),
            loss=Reinforce(),
            temperature=1.0,
            total_steps=1,
            seed=0,
        )
    return str(caught.value)


def test_what_is_no_gain_on_a_cpu_is_refused(tmp_path: Path) -> None:
    assert refused(MemoryConfig(offload_state=OffloadState.host)) == (
        "learner.memory.offload_state=host moves weights from a GPU to the host's memory, where those of a "
        "learner on a CPU are already: set disk, or never."
    )
    assert refused(MemoryConfig(ActivationCheckpointing.full, offload_activations=True)) == (
        "learner.memory.offload_activations=true moves activations from a GPU to the host's memory, where "
        "those of a learner on a CPU are already: set it to false."
    )
    missing = tmp_path / "nowhere"
    assert refused(MemoryConfig(offload_state=OffloadState.disk, folder=str(missing))) == (
        f"learner.memory.folder={missing} does not exist: make it, or name another."
    )


@pytest.mark.gpu
@pytest.mark.parametrize("place", [OffloadState.host, OffloadState.disk])
def test_a_gpu_is_freed(place: OffloadState) -> None:
    stays, moves = (
        build(LearnerConfig(device=Device.cuda, optimizer=adam(), memory=memory), None, needs_reference=True)
        for memory in (MemoryConfig(), MemoryConfig(offload_state=place))
    )
    assert equal(scenario(stays), scenario(moves))
    del stays
    before = torch.cuda.memory_allocated()
    moves.offload()
    away = moves._state_offload.bytes_away
    assert away > 14 * 0.9 * sum(p.numel() for p in moves.policy.parameters())
    assert before - torch.cuda.memory_allocated() >= away
