"""`RolloutConfig`: how responses are generated. Imports neither torch nor vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from rollout.engine import Sampling
from trainer.parallel.config import RayConfig


class PoolKind(StrEnum):
    """Where the engines run."""

    local = "local"
    """On this machine."""
    ray = "ray"
    """On the nodes of a Ray cluster, or of a Ray that is started on this machine."""


class EngineProcess(StrEnum):
    """Which process holds an engine."""

    child = "child"
    """A process of its own: own threads and libraries, dies with the run."""
    inprocess = "inprocess"
    """The learner's: starts sooner, one engine only, never beside a learner of several ranks."""


class EngineDtype(StrEnum):
    """Number format of an engine's weights; without LayerCast also of activations and KV cache."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Numerics(StrEnum):
    """How an engine, and the learner with it, computes."""

    standard = "standard"
    """In `rollout.dtype` and `learner.dtype`, with vLLM's fastest kernels."""
    layercast = "layercast"
    """Weights are kept in bfloat16 and everything is computed in float32, in engine and learner (LayerCast,
    2506.09501)."""
    batch_invariant = "batch_invariant"
    """vLLM's batch-invariant kernels: a response does not depend on what is decoded beside it. GPUs only."""


@dataclass
class RolloutConfig:
    """Engines and training's sampling."""

    engines: int = 1
    """Engines; the groups of a round are dealt out among them."""
    pool: PoolKind = PoolKind.local
    """Where the engines run: `local` (this machine) or `ray`."""
    ray: RayConfig = field(default_factory=RayConfig)
    process: EngineProcess = EngineProcess.child
    """`child`: an engine has a process of its own; `inprocess`: it shares the learner's."""
    restarts: int = 0
    """How often an engine may be started again whose process, actor or node is gone, over all engines of a
    run. It gets the weights of now, proven anew, and its unfinished groups are generated again with the same
    seeds. 0: a dead engine stops the run."""
    temperature: float = 1.0
    """Sampling temperature, above 0. The learner divides its logits by the same number."""
    top_p: float = 1.0
    """Keep the likeliest tokens of this total probability, in (0, 1]; 1 keeps all."""
    max_new_tokens: int = 16
    """Most tokens of a response; one that reaches it is truncated."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response; it keeps the tokens that spell them. End tokens come from the model."""
    dtype: EngineDtype = EngineDtype.bfloat16
    """`bfloat16`, `float16` or `float32`."""
    numerics: Numerics = Numerics.standard
    """`standard`; `layercast`: weights in bfloat16, all else in float32, in engines and learner, for results
    that hardly depend on batch, threads or machine; `batch_invariant`: vLLM's kernels that do not depend on
    the batch, on GPUs."""
    max_model_len: int = 0
    """Most tokens of prompt and response together; 0: the longest that the run can ask for."""
    max_num_seqs: int = 256
    """Most responses that one engine decodes at once."""
    kv_cache_gib: float = 0.0
    """KV cache of one engine in GiB. 0: on a CPU room for `max_num_seqs` full sequences (at most 4 GiB), on a
    GPU what `gpu_memory` leaves."""
    threads: int = 0
    """CPU threads of one engine; 0: the usable cores, divided among the engines."""
    eager: bool = False
    """Skip compilation: starts sooner, generates more slowly."""
    sleep_level: int = 0
    """What an engine that shares the learner's GPU does while the learner learns: 0 stays as it is; 1 moves
    its weights to main memory and drops its KV cache (vLLM's sleep mode), until the next publish; 2 drops its
    weights too, which the next publish brings anyway. `gpu_memory` may then be larger."""
    prefix_caching: bool = True
    """Compute a prompt's common prefix once for all its samples."""
    tensor_parallel: int = 1
    """GPUs that one engine spans."""
    gpu_memory: float = 0.45
    """Share of each GPU's memory that an engine takes, in (0, 1); leave room for a learner that shares it."""

    def check(self) -> list[str]:
        """Sentences about values that cannot work, empty when all can."""
        problems = [
            f"rollout.{key}={getattr(self, key)} must be at least {least}: raise it."
            for key, least in _LEAST.items()
            if getattr(self, key) < least
        ]
        if self.temperature <= 0:
            problems.append(
                f"rollout.temperature={self.temperature} must be above 0: the learner divides logits by it."
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"rollout.top_p={self.top_p} must lie in (0, 1]: use 1 to keep every token.")
        if not 0 < self.gpu_memory < 1:
            problems.append(
                f"rollout.gpu_memory={self.gpu_memory} must lie in (0, 1): use 0.45 beside a learner."
            )
        if self.max_model_len and self.max_model_len <= self.max_new_tokens:
            problems.append(
                f"rollout.max_model_len={self.max_model_len} leaves no room for a prompt beside "
                f"rollout.max_new_tokens={self.max_new_tokens}: raise max_model_len or use 0."
            )
        if self.process is EngineProcess.inprocess and self.engines > 1:
            problems.append(
                f"rollout.engines={self.engines} with rollout.process=inprocess: one process holds one "
                "engine; use rollout.process=child."
            )
        if self.process is EngineProcess.inprocess and self.tensor_parallel > 1:
            problems.append(
                f"rollout.tensor_parallel={self.tensor_parallel} with rollout.process=inprocess: an engine "
                "over several GPUs needs processes of its own; use rollout.process=child."
            )
        if self.process is EngineProcess.inprocess and self.restarts > 0:
            problems.append(
                f"rollout.restarts={self.restarts} with rollout.process=inprocess: that engine ends with the "
                "run; use rollout.process=child."
            )
        if self.process is EngineProcess.inprocess and self.pool is PoolKind.ray:
            problems.append(
                "rollout.pool=ray with rollout.process=inprocess: an engine on Ray has a process of its own; "
                "use rollout.process=child."
            )
        if self.sleep_level > 2:
            problems.append(f"rollout.sleep_level={self.sleep_level} is none of vLLM's: set 0, 1 or 2.")
        if self.sleep_level and self.restarts > 0:
            problems.append(
                f"rollout.sleep_level={self.sleep_level} is for engines on a GPU, which cannot be started "
                "again: set rollout.restarts=0."
            )
        problems += self._check_numerics()
        problems += self.ray.check()
        if any(not text for text in self.stop):
            problems.append('rollout.stop holds an empty string, which would end every response: remove "".')
        return problems

    def _check_numerics(self) -> list[str]:
        if self.numerics is Numerics.layercast and self.dtype is not EngineDtype.bfloat16:
            return [
                f"rollout.dtype={self.dtype} with rollout.numerics=layercast, which keeps weights in "
                "bfloat16 and computes in float32: set rollout.dtype=bfloat16, or rollout.numerics=standard."
            ]
        if self.numerics is not Numerics.batch_invariant:
            return []
        problems = []
        if self.dtype is EngineDtype.float32:
            problems.append(
                "rollout.dtype=float32 with rollout.numerics=batch_invariant: vLLM's batch-invariant "
                "kernels multiply float32 in TF32; set rollout.dtype=bfloat16."
            )
        if self.process is EngineProcess.inprocess:
            problems.append(
                "rollout.numerics=batch_invariant with rollout.process=inprocess: vLLM decides on it while "
                "it is imported, for a whole process; use rollout.process=child."
            )
        return problems

    @property
    def compute_dtype(self) -> EngineDtype:
        """The number format that engines compute in, and keep activations and KV cache in."""
        return EngineDtype.float32 if self.numerics is Numerics.layercast else self.dtype

    def sampling(self, stop_token_ids: tuple[int, ...] = ()) -> Sampling:
        """Training's sampling, with the end tokens of the model."""
        return Sampling(
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=tuple(self.stop),
            stop_token_ids=stop_token_ids,
        )


_LEAST = {
    "engines": 1,
    "restarts": 0,
    "max_new_tokens": 1,
    "max_model_len": 0,
    "max_num_seqs": 1,
    "kv_cache_gib": 0,
    "sleep_level": 0,
    "threads": 0,
    "tensor_parallel": 1,
}
