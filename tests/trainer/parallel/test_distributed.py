"""What may not depend on the number of ranks, in real processes: gradients, weights, log-probs, metrics."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from tests.trainer.parallel import ranks
from tests.trainer.parallel.ranks import adam, build, config, join, led, sgd
from tests.trainer.samples import make_row, random_rows
from trainer.batch import Row
from trainer.config import LoraConfig, OnNonfinite, Precision
from trainer.errors import NonFiniteError
from trainer.learner import Learner
from trainer.memory.config import ActivationCheckpointing, MemoryConfig
from trainer.packing import pack
from trainer.parallel.balance import Costs, deal
from trainer.parallel.config import ParallelConfig
from trainer.parallel.mesh import Team
from trainer.step_report import StepReport

LAYOUTS = {
    "2 shards": (2, ParallelConfig()),
    "2 copies": (2, ParallelConfig(replicate=2)),
    "4 shards": (4, ParallelConfig()),
    "2 copies of 2 shards": (4, ParallelConfig(replicate=2, shard=2)),
}
SPLIT = {
    "2 split": (2, ParallelConfig(tensor=2)),
    "2 shards of 2 split": (4, ParallelConfig(tensor=2)),
    "2 copies of 2 split": (4, ParallelConfig(replicate=2, tensor=2)),
}
ROWS = random_rows(groups=5, samples=4)
OPTIMIZERS = {"sgd": sgd(), "adam": adam()}


def outcome(parallel: ParallelConfig | None = None) -> dict[str, Any]:
    """All that is compared, by scenario, of this process and those that it is one of."""
    team = join(parallel)
    found: dict[str, Any] = {"gradients": gradients(team), "sums": sums_over_copies(team)}
    for name, optimizer in OPTIMIZERS.items():
        settings = config(optimizer=optimizer, token_budget=60)
        found[name] = led(ten_steps, settings, team, needs_reference=True)
    found["one group"] = led(one_group, config(), team)
    found["odd"] = led(odd_steps, config(on_nonfinite=OnNonfinite.skip), team)
    found["stopped"] = led(stopped, config(), team)
    found["resumed"] = led(resumed, config(optimizer=adam()), team)
    found["bfloat16"] = led(two_steps, config(dtype=Precision.bfloat16), team)
    if parallel is None or parallel.tensor == 1:
        found["lora"] = led(adapted, config(lora=LoraConfig(rank=2)), team, needs_reference=True)
        narrow = config(dtype=Precision.bfloat16)
        found["layercast"] = led(scored_steps, narrow, team, layercast=True)
    if team is not None:
        team.leave()
    return found


def gradients(team: Team | None) -> dict[str, dict[str, Tensor]]:
    """By case, whole gradients: every token budget, one group alone, prompts not shared."""
    learner = build(config(), team)
    found = {f"budget {budget}": _gradient(learner, ROWS, budget) for budget in (24, 60, 4096)}
    found["one group"] = _gradient(learner, ROWS[:4], 60)
    learner.policy.shares_prompts = False
    found["unshared"] = _gradient(learner, ROWS, 60)
    for kind in (ActivationCheckpointing.full, ActivationCheckpointing.selective):
        recomputing = build(config(memory=MemoryConfig(kind)), team)
        found[f"recomputed: {kind}"] = _gradient(recomputing, ROWS, 60)
    return found


def _gradient(learner: Learner, rows: list[Row], budget: int) -> dict[str, Tensor]:
    team = learner.ranks
    rank = team.share(team.rank) if isinstance(team, Team) else 0
    mine = deal(rows, team.size, Costs.of(learner.policy))[rank]
    learner.master.zero_grad()
    batches = pack([rows[index] for index in mine], budget, learner.policy.shares_prompts)
    learner._accumulate(batches, StepReport())
    grads = {name: p.grad for name, p in zip(learner.master.names, learner.master.working)}
    return {name: team.whole(grad).clone() for name, grad in grads.items() if grad is not None}


def sums_over_copies(team: Team | None) -> int:
    """How often gradients of many micro-batches are summed over copies of the model."""
    learner, count, going_on = build(config(), team), 0, dist.all_reduce

    def counting(tensor: Tensor, *given: Any, **named: Any) -> Any:
        nonlocal count
        count += tensor.is_floating_point()
        return going_on(tensor, *given, **named)

    with mock.patch.object(dist, "all_reduce", counting):
        _gradient(learner, ROWS, 24)
    return count


def ten_steps(learner: Learner) -> dict[str, Any]:
    """Ten steps and what a run asks of a learner on the way."""
    found: dict[str, Any] = {"before": learner.logprobs(ROWS), "metrics": []}
    for step in range(5):
        rows = random_rows(groups=5, samples=4, seed=step)
        found["metrics"] += learner.update([rows[:8], rows[8:]])
        learner.end_rollout()
    found["after"] = learner.logprobs(ROWS)
    found["few"] = learner.logprobs(ROWS[:1])
    found["score"] = learner.score([[5, 6, 7, 8], [9, 10], [11]])
    found["reference"] = learner.reference_logprobs(ROWS)
    found["weights"] = {name: tensor.clone() for name, tensor in learner.weights()}
    return found | {"state": copy.deepcopy(learner.state_dict())}


def one_group(learner: Learner) -> dict[str, Any]:
    """A step in which all but one rank hold no row, and one in which nobody does."""
    rows = ROWS[:4]
    found = {"metrics": learner.update([rows, [make_row([1, 2], [])]]), "logprobs": learner.logprobs(rows)}
    return found | {"none": learner.logprobs([]), "steps": learner.optimizer_steps}


def odd_steps(learner: Learner) -> dict[str, Any]:
    """A loss that is not finite on one rank alone, between two sound steps."""
    odd = random_rows(groups=5, samples=4, seed=1)
    odd[-1].advantages[0] = math.inf
    metrics = learner.update([ROWS, odd, ROWS])
    return {"metrics": metrics, "weights": {name: tensor.clone() for name, tensor in learner.weights()}}


def stopped(learner: Learner) -> dict[str, Any]:
    """What is said of such a loss, and that the learner stands as it stood."""
    odd = random_rows(groups=5, samples=4, seed=1)
    odd[-1].advantages[0] = math.nan
    before = learner.logprobs(ROWS)
    with pytest.raises(NonFiniteError) as caught:
        learner.update([odd])
    return {"said": str(caught.value), "unmoved": learner.logprobs(ROWS) == before}


def resumed(learner: Learner) -> dict[str, Any]:
    """The state of one process goes on here, and what comes of it goes on in one process again."""
    first, last = (build(learner.config, None) for _ in range(2))
    first.update([ROWS[:8], ROWS[8:]])
    first.end_rollout()
    learner.load_state_dict(copy.deepcopy(first.state_dict()))
    found = {"here": learner.update([ROWS]), "there": first.update([ROWS])}
    last.load_state_dict(copy.deepcopy(learner.state_dict()))
    for one in (first, learner, last):
        one.update([ROWS])
    weights = [{name: tensor.clone() for name, tensor in one.weights()} for one in (first, learner, last)]
    return found | {"weights": weights, "steps": (learner.optimizer_steps, learner.rollout_step)}


def two_steps(learner: Learner) -> dict[str, Any]:
    """Two steps, and the weights in float32."""
    metrics = learner.update([ROWS[:8], ROWS[8:]])
    return {"metrics": metrics, "weights": learner.state_dict()["weights"]}


def scored_steps(learner: Learner) -> dict[str, Any]:
    """The same with log-probs before and after."""
    before = learner.logprobs(ROWS)
    return {"before": before} | two_steps(learner) | {"after": learner.logprobs(ROWS)}


def adapted(learner: Learner) -> dict[str, Any]:
    """Two steps, merged and loose; under an adapter where there is one."""
    learner.update([ROWS[:8], ROWS[8:]])
    return {
        "weights": {name: tensor.clone() for name, tensor in learner.weights()},
        "adapter": learner.adapter_weights(),
        "gap": learner.merge_gap(),
        "reference": learner.reference_logprobs(ROWS),
    }


@cache
def alone() -> dict[str, Any]:
    """The outcome of one process."""
    return outcome()


@cache
def spread(layout: str) -> list[dict[str, Any]]:
    """The outcome of every rank of a layout."""
    size, parallel = (LAYOUTS | SPLIT)[layout]
    return ranks.run(size, outcome, parallel)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], share: float = 1e-5) -> None:
    """Distance of all tensors together within a share of their norm."""
    assert got.keys() == expected.keys()
    distance = sum(float((got[name] - tensor).square().sum()) for name, tensor in expected.items()) ** 0.5
    norm = sum(float(tensor.square().sum()) for tensor in expected.values()) ** 0.5
    assert distance < share * norm, f"{distance / norm:.1e} of the norm"


def assert_scores(got: list[list[float]], expected: list[list[float]], nats: float) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=nats)


every_layout = pytest.mark.parametrize("layout", [*LAYOUTS, *SPLIT])
every_unsplit_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_layout
def test_gradients(layout: str) -> None:
    for rank in spread(layout):
        for case, expected in alone()["gradients"].items():
            assert_near(rank["gradients"][case], expected)


@every_unsplit_layout
def test_gradients_cross_from_copy_to_copy_once_a_step(layout: str) -> None:
    """Each of two layers and what remains of the model, however many micro-batches there are."""
    _, parallel = LAYOUTS[layout]
    assert spread(layout)[0]["sums"] == (3 if parallel.replicate > 1 else 0)


@every_layout
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps(optimizer: str, layout: str) -> None:
    expected, (found, *others) = alone()[optimizer], [rank[optimizer] for rank in spread(layout)]
    assert others == [None] * len(others)
    assert_near(found["weights"], expected["weights"])
    assert_near(found["state"]["weights"], expected["state"]["weights"])
    assert_scores(found["before"], expected["before"], 1e-5)
    for name in ("after", "few", "score", "reference"):
        assert_scores(found[name], expected[name], 2e-4)


@every_layout
def test_metrics_are_those_of_all_ranks(layout: str) -> None:
    expected, found = alone()["sgd"]["metrics"], spread(layout)[0]["sgd"]["metrics"]
    for got, one in zip(found, expected, strict=True):
        assert got.keys() == one.keys()
        assert got["learner/micro_batches"] <= one["learner/micro_batches"]
        for name in one.keys() - {"learner/micro_batches"}:
            assert got[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@every_layout
def test_ranks_without_rows_keep_pace(layout: str) -> None:
    expected, found = alone()["one group"], spread(layout)[0]["one group"]
    assert (found["none"], found["steps"]) == ([], 1)
    for name in ("policy/entropy", "policy/ratio_max", "learner/grad_norm", "policy/loss"):
        assert found["metrics"][0][name] == pytest.approx(expected["metrics"][0][name], rel=1e-4, abs=1e-6)
    assert_scores(found["logprobs"], expected["logprobs"], 1e-4)


@every_layout
def test_a_step_that_is_odd_on_one_rank_is_dropped_on_all(layout: str) -> None:
    expected, found = alone()["odd"], spread(layout)[0]["odd"]
    assert [m["learner/skipped_steps"] for m in found["metrics"]] == [0, 1, 1]
    assert_near(found["weights"], expected["weights"])
    stop = spread(layout)[0]["stopped"]
    assert stop == {"said": alone()["stopped"]["said"], "unmoved": True}


@every_layout
def test_a_state_goes_on_with_any_number_of_ranks(layout: str) -> None:
    found = spread(layout)[0]["resumed"]
    assert found["steps"] == (4, 1)
    first, here, last = found["weights"]
    assert_near(here, first)
    assert_near(last, first)
    for name, value in found["there"][0].items():
        if name != "learner/micro_batches":
            assert found["here"][0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@every_layout
def test_bfloat16_learns_as_one_process_does(layout: str) -> None:
    expected, found = alone()["bfloat16"], spread(layout)[0]["bfloat16"]
    for got, one in zip(found["metrics"], expected["metrics"], strict=True):
        assert got["learner/grad_norm"] == pytest.approx(one["learner/grad_norm"], rel=0.03)
    assert_near(found["weights"], expected["weights"], share=2e-3)


@every_unsplit_layout
def test_layercast_computes_in_float32_on_every_rank(layout: str) -> None:
    """From the same bfloat16 weights as one process: scores are as near as float32's."""
    expected, found = alone()["layercast"], spread(layout)[0]["layercast"]
    assert_scores(found["before"], expected["before"], 1e-5)
    assert_near(found["weights"], expected["weights"], share=2e-3)
    assert_scores(found["after"], expected["after"], 0.05)


@every_unsplit_layout
def test_an_adapter(layout: str) -> None:
    expected, found = alone()["lora"], spread(layout)[0]["lora"]
    assert_near(found["weights"], expected["weights"])
    assert_near(found["adapter"], expected["adapter"])
    assert found["gap"] == expected["gap"] == 0
    assert_scores(found["reference"], expected["reference"], 1e-5)
