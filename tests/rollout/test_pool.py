"""`LocalPool`: groups in order, whole groups to one engine, seeds without duplicates."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rollout.config import EngineDtype, EngineProcess, PoolKind, RolloutConfig
from rollout.engine import Completion, Request, Sampling
from rollout.errors import EngineDied
from rollout.pool import Draw, LocalPool, build_engines, open_host
from rollout.types import FinishReason, Prompt, VersionSpan, sample_seed
from trainer.parallel.config import RayConfig

if TYPE_CHECKING:
    from rollout.vllm_engine import VllmEngine


class Echo:
    """An engine without a model: a response is the prompt's first token and the seed's last digit."""

    weight_version = 3

    def __init__(self, delay: float = 0.0, fails: bool = False) -> None:
        self.delay = delay
        self.fails = fails
        self.seen: list[Request] = []
        self.threads: set[int] = set()
        self.closed = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.seen += requests
        self.threads.add(threading.get_ident())
        time.sleep(self.delay)
        if self.fails:
            raise EngineDied("gone")
        return [
            Completion(
                token_ids=[request.prompt_ids[0], request.seed % 10],
                logprobs=[-0.5, -1.0],
                finish_reason=FinishReason.ABORT if request.seed % 10 == 0 else FinishReason.STOP,
                version_spans=[VersionSpan(start=0, end=2, version=3)],
            )
            for request in requests
        ]

    def score(self, sequences: Sequence[list[int]], temperature: float = 1.0) -> list[list[float]]:
        raise NotImplementedError

    def effective_sampling(self, sampling: Sampling) -> dict[str, Any]:
        raise NotImplementedError

    def init_transfer(self, info: dict[str, Any]) -> None:
        raise NotImplementedError

    def receive_weights(self, info: dict[str, Any], version: int) -> dict[str, Any]:
        raise NotImplementedError

    def memory(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.closed += 1


def draws(count: int, samples: int = 4) -> list[Draw]:
    return [
        Draw(
            prompt=Prompt(id=f"sums:{i}", token_ids=[10 + i, 11], text=str(i), answer=None, source="sums"),
            group_id=f"0/{i}",
            samples=samples,
        )
        for i in range(count)
    ]


def decode(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


def generate(pool: LocalPool, asked: list[Draw]) -> list[Any]:
    return pool.generate(asked, Sampling(max_tokens=2), born=5, decode=decode)


def test_groups_come_in_order_with_everything_filled_in() -> None:
    groups = generate(LocalPool([Echo(), Echo(), Echo()], run_seed=7), draws(9))
    for index, group in enumerate(groups):
        assert (group.id, group.prompt.id, group.born, group.verdict) == (
            f"0/{index}",
            f"sums:{index}",
            5,
            "pending",
        )
        for sample, made in enumerate(group.trajectories):
            seed = sample_seed(7, f"0/{index}", sample)
            assert (made.sample_index, made.seed) == (sample, seed)
            assert made.prompt_ids == [10 + index, 11]
            assert made.response_ids == [10 + index, seed % 10]
            assert made.text == f"{10 + index} {seed % 10}"
            assert made.logprobs == [-0.5, -1.0]
            assert [span.version for span in made.version_spans] == [3]


def test_no_two_requests_share_a_seed() -> None:
    engines = [Echo(), Echo()]
    generate(LocalPool(engines, run_seed=7), draws(200, samples=16))
    seeds = [request.seed for engine in engines for request in engine.seen]
    assert len(set(seeds)) == len(seeds) == 3200
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_seeds_are_the_runs_own() -> None:
    assert sample_seed(7, "0/1", 0) != sample_seed(8, "0/1", 0)
    assert sample_seed(7, "0/1", 0) == sample_seed(7, "0/1", 0)
    assert sample_seed(1, "1/1", 1) != sample_seed(11, "1", 1)


def test_whole_groups_are_dealt_evenly_by_id() -> None:
    engines = [Echo(), Echo(), Echo()]
    asked = draws(32)
    generate(LocalPool(engines, run_seed=7), asked)
    shares = [{request.prompt_ids[0] for request in engine.seen} for engine in engines]
    assert sorted(map(len, shares)) == [10, 11, 11]
    assert len(set.union(*shares)) == 32
    again = [Echo(), Echo(), Echo()]
    generate(LocalPool(again, run_seed=7), asked[::-1])
    assert shares == [{request.prompt_ids[0] for request in engine.seen} for engine in again]


def test_engines_run_at_the_same_time() -> None:
    started = time.monotonic()
    generate(LocalPool([Echo(0.5), Echo(0.5), Echo(0.5)], run_seed=0), draws(6))
    assert time.monotonic() - started < 1.2


def test_a_lone_engine_runs_in_the_calling_thread() -> None:
    engine = Echo()
    generate(LocalPool([engine], run_seed=0), draws(2))
    assert engine.threads == {threading.get_ident()}


def test_aborted_responses_are_counted() -> None:
    pool = LocalPool([Echo(), Echo()], run_seed=7)
    groups = generate(pool, draws(50))
    seeds = [made.seed for group in groups for made in group.trajectories]
    assert pool.aborted == sum(seed % 10 == 0 for seed in seeds) > 0
    generate(pool, draws(50))
    assert pool.aborted == 2 * sum(seed % 10 == 0 for seed in seeds)


def test_an_engines_error_comes_after_the_others_have_finished() -> None:
    slow = Echo(0.3)
    with pytest.raises(EngineDied, match="gone"):
        generate(LocalPool([Echo(fails=True), slow], run_seed=0), draws(8))
    assert slow.seen


def test_bad_draws_are_refused() -> None:
    pool = LocalPool([Echo()], run_seed=0)
    with pytest.raises(ValueError, match="Group id '0/1' was drawn twice"):
        generate(pool, [*draws(2), draws(2)[1]])
    with pytest.raises(ValueError, match="'0/0' asks for 0 samples"):
        generate(pool, draws(1, samples=0))
    with pytest.raises(ValueError, match="at least one engine"):
        LocalPool([], run_seed=0)
    assert generate(pool, []) == []


def test_closing_closes_every_engine() -> None:
    engines = [Echo(), Echo()]
    LocalPool(engines, run_seed=0).close()
    assert [engine.closed for engine in engines] == [1, 1]


def test_real_samples_of_a_group_differ(engine: VllmEngine) -> None:
    sampling = Sampling(max_tokens=16, ignore_eos=True)
    groups = LocalPool([engine], run_seed=3).generate(draws(4), sampling, born=0, decode=decode)
    for group in groups:
        assert len({tuple(made.response_ids) for made in group.trajectories}) == 4
    again = LocalPool([engine], run_seed=3).generate(draws(4)[::-1], sampling, born=0, decode=decode)
    assert [[made.response_ids for made in group.trajectories] for group in again[::-1]] == [
        [made.response_ids for made in group.trajectories] for group in groups
    ]


def test_two_child_engines_serve_one_pool(tiny_llama: Path, tmp_path: Path) -> None:
    config = RolloutConfig(engines=2, dtype=EngineDtype.float32, eager=True, threads=1, max_num_seqs=8)
    engines = build_engines(config, model=str(tiny_llama), length=64, log_folder=tmp_path)
    pool = LocalPool(engines, run_seed=3)
    try:
        groups = pool.generate(draws(6), Sampling(max_tokens=8), born=0, decode=decode)
        assert [len(group.trajectories) for group in groups] == [4] * 6
        assert sorted(path.name for path in tmp_path.iterdir()) == ["engine-0.log", "engine-1.log"]
    finally:
        pool.close()


def test_an_engine_that_cannot_load_closes_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        build_engines(RolloutConfig(engines=2), model=str(tmp_path), length=64)


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "rollout.ray_host", raising=False)
    with pytest.raises(ValueError, match=r"^rollout\.pool=ray needs the package ray, .* use rollout"):
        open_host(RolloutConfig(pool=PoolKind.ray))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engines": 0}, "rollout.engines=0 must be at least 1: raise it."),
        ({"temperature": 0.0}, "rollout.temperature=0.0 must be above 0: the learner divides logits by it."),
        ({"top_p": 1.5}, "rollout.top_p=1.5 must lie in (0, 1]: use 1 to keep every token."),
        (
            {"stop": ["\n", ""]},
            'rollout.stop holds an empty string, which would end every response: remove "".',
        ),
        (
            {"max_model_len": 64, "max_new_tokens": 64},
            "rollout.max_model_len=64 leaves no room for a prompt beside rollout.max_new_tokens=64: "
            "raise max_model_len or use 0.",
        ),
        (
            {"engines": 2, "process": EngineProcess.inprocess},
            "rollout.engines=2 with rollout.process=inprocess: one process holds one engine; "
            "use rollout.process=child.",
        ),
        ({"restarts": -1}, "rollout.restarts=-1 must be at least 0: raise it."),
        (
            {"restarts": 2, "process": EngineProcess.inprocess},
            "rollout.restarts=2 with rollout.process=inprocess: that engine ends with the run; "
            "use rollout.process=child.",
        ),
        (
            {"pool": PoolKind.ray, "process": EngineProcess.inprocess},
            "rollout.pool=ray with rollout.process=inprocess: an engine on Ray has a process of its own; "
            "use rollout.process=child.",
        ),
        ({"sleep_level": 3}, "rollout.sleep_level=3 is none of vLLM's: set 0, 1 or 2."),
        (
            {"sleep_level": 1, "restarts": 1},
            "rollout.sleep_level=1 is for engines on a GPU, which cannot be started again: set "
            "rollout.restarts=0.",
        ),
        ({"ray": RayConfig(wait_s=0)}, "rollout.ray.wait_s=0 must be above 0: raise it."),
        (
            {"ray": RayConfig(address="ray://head:10001")},
            "rollout.ray.address=ray://head:10001 is a Ray client's: run on a node of the cluster and "
            "give the head's host:port, or auto.",
        ),
    ],
)
def test_bad_settings_are_named_with_their_remedy(changes: dict[str, Any], sentence: str) -> None:
    assert RolloutConfig(**changes).check() == [sentence]


def test_the_defaults_are_sound_and_become_sampling() -> None:
    config = RolloutConfig(top_p=0.5, stop=["\n"])
    assert config.check() == []
    assert config.sampling((2, 0)) == Sampling(max_tokens=16, top_p=0.5, stop=("\n",), stop_token_ids=(2, 0))
    assert config.sampling().truncates


def test_the_config_is_a_structured_config() -> None:
    from omegaconf import OmegaConf

    composed = OmegaConf.merge(OmegaConf.structured(RolloutConfig), {"process": "inprocess", "stop": ["x"]})
    assert OmegaConf.to_object(composed) == RolloutConfig(process=EngineProcess.inprocess, stop=["x"])
