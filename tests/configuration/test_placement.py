"""Which GPUs engines get, with counts made up."""

from __future__ import annotations

import pytest

from rlhf.compose import load
from rlhf.errors import UserError
from rlhf.placement import place, placement_of


@pytest.mark.parametrize(
    ("gpus", "engines", "tensor_parallel", "learner", "expected", "shared"),
    [
        (0, 2, 1, True, ((), ()), False),
        (1, 1, 1, True, ((0,),), True),
        (2, 1, 1, True, ((1,),), False),
        (4, 3, 1, True, ((1,), (2,), (3,)), False),
        (8, 2, 3, True, ((1, 2, 3), (4, 5, 6)), False),
        (1, 1, 1, False, ((0,),), False),
        (4, 2, 2, False, ((0, 1), (2, 3)), False),
    ],
)
def test_engines_get_gpus_of_their_own_where_there_are_enough(
    gpus: int, engines: int, tensor_parallel: int, learner: bool, expected: tuple[object, ...], shared: bool
) -> None:
    found = place(gpus, engines=engines, tensor_parallel=tensor_parallel, learner=learner)
    assert (found.engines, found.shared, found.on_gpu) == (expected, shared, gpus > 0)


@pytest.mark.parametrize(("gpus", "engines", "tensor_parallel"), [(1, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_engines_that_would_collide_are_refused(gpus: int, engines: int, tensor_parallel: int) -> None:
    with pytest.raises(UserError) as caught:
        place(gpus, engines=engines, tensor_parallel=tensor_parallel)
    assert str(caught.value) == (
        f"rollout.engines={engines} of rollout.tensor_parallel={tensor_parallel} need "
        f"{engines * tensor_parallel} GPUs beside the learner, of {gpus} that this process sees: lower them, "
        f"or show it more (CUDA_VISIBLE_DEVICES)."
    )


def test_a_learner_of_several_ranks_takes_as_many_gpus() -> None:
    assert place(8, engines=2, tensor_parallel=2, ranks=4).engines == ((4, 5), (6, 7))
    with pytest.raises(UserError, match="of 2 that this process sees"):
        place(2, engines=1, tensor_parallel=1, ranks=2)


def test_a_sleep_that_frees_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("dapo/tiny", ["rollout.sleep_level=1", "rollout.process=child"])
    see_gpus(monkeypatch, 0)
    with pytest.raises(UserError, match=r"^rollout\.sleep_level=1 frees GPU memory, and here engines run on"):
        placement_of(config.rollout)
    see_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=r"^rollout\.sleep_level=1 frees memory of a GPU that engine and"):
        placement_of(config.rollout)
    assert placement_of(config.rollout, learner=False).engines == ((0,),)
    see_gpus(monkeypatch, 1)
    assert placement_of(config.rollout).shared


def test_batch_invariance_wants_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["rollout.numerics=batch_invariant", "rollout.process=child", "rollout.dtype=bfloat16"]
    config = load("dapo/tiny", asked)
    see_gpus(monkeypatch, 0)
    with pytest.raises(
        UserError, match=r"^rollout\.numerics=batch_invariant switches vLLM's GPU kernels, and"
    ):
        placement_of(config.rollout)
    see_gpus(monkeypatch, 2)
    assert placement_of(config.rollout).engines == ((1,),)


def test_gpus_of_a_cluster_are_not_counted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 1)
    asked = ["rollout.process=child", "rollout.pool=ray", "rollout.engines=4", "rollout.tensor_parallel=2"]
    found = placement_of(load("dapo/tiny", [*asked, "rollout.ray.address=head:6379"]).rollout, ranks=8)
    assert (found.engines, found.shared) == (((0, 1),) * 4, False)
    with pytest.raises(UserError, match="of 1 that this process sees"):
        placement_of(load("dapo/tiny", asked).rollout)


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Have torch count so many GPUs."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
