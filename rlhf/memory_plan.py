"""How much memory a configuration will take: a model's dimensions, arithmetic from `trainer.memory`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from rlhf.config import Config
from rlhf.models import SMOLLM2, local_config
from rollout.config import EngineProcess
from rollout.engine_spec import automatic_cache_bytes
from trainer.config import OptimizerName
from trainer.memory.estimate import (
    Estimate,
    ModelShape,
    checkpoint_memory,
    engine_memory,
    learner_memory,
    rank_memory,
)
from trainer.parallel.world import World

NOTHING = Estimate({})
KNOWN = {
    SMOLLM2: ModelShape(576, 30, 1536, 49152, 9, 3, 64, True),
    "Qwen/Qwen2.5-Math-7B": ModelShape(3584, 28, 18944, 152064, 28, 4, 128, False),
    "Qwen/Qwen2.5-32B": ModelShape(5120, 64, 27648, 152064, 40, 8, 128, False),
}
"""Dimensions of the models in shipped recipes, so that `explain` needs no download."""
STATE_BYTES = {
    OptimizerName.adamw: 8.0,
    OptimizerName.adamw_8bit: 2 * (1 + 4 / 256),
    OptimizerName.schedulefree: 8.0,
    OptimizerName.sgd: 4.0,
    OptimizerName.muon: 4.0,
    OptimizerName.lion: 4.0,
    OptimizerName.adafactor: 0.0,
}
"""Bytes of optimizer state of a trained parameter: float32, or 8 bits and a float32 for every 256."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Estimates for each rank of the learner and each engine."""

    learner: Estimate
    """Of each rank."""
    engine: Estimate
    engines: int
    ranks: int = 1
    checkpoint: float = 0.0
    """Bytes that rank 0 of several takes besides while it writes or reads a checkpoint."""
    unknown: str = ""
    """Why there is no estimate; empty when there is one."""

    @property
    def total(self) -> float:
        """Bytes of the whole run on one machine while it learns."""
        return self.ranks * self.learner.total + self.engines * self.engine.total


def plan_memory(config: Config) -> MemoryPlan:
    """Estimate from dimensions alone; says what is missing when the model's are not known."""
    shape = _shape(config.model.path)
    if isinstance(shape, str):
        return MemoryPlan(NOTHING, NOTHING, config.rollout.engines, unknown=shape)
    learner = config.learner
    width = 4 if learner.dtype.value == "float32" else 2
    rank = learner.lora.rank
    share = _lora_share(shape, rank) if rank else shape.trained_share(learner.freeze)
    state_bytes = STATE_BYTES[learner.optimizer.name]
    parallel = learner.parallel
    apart = parallel.replicate * parallel.tensor
    ranks = max(World.from_environment().size, apart * max(1, parallel.shard))
    build = functools.partial(
        learner_memory if ranks == 1 else rank_memory,
        shape,
        tokens=_tokens(config, ranks // parallel.tensor),
        compute_bytes=width,
        activation_bytes=4 if config.layercast else width,
        state_bytes=state_bytes,
        trained_share=share,
        checkpointing=learner.memory.activation_checkpointing,
        reference=config.algorithm.kl.coefficient > 0 and not rank,
    )
    spread = {"shards": ranks // apart, "split": parallel.tensor}
    estimate = build(master=width != 4) if ranks == 1 else build(**spread)
    saving = functools.partial(checkpoint_memory, shape, trained_share=share, state_bytes=state_bytes)
    copy = saving(compute_bytes=width) if ranks > 1 else 0.0
    return MemoryPlan(estimate, _engine(config, shape), config.rollout.engines, ranks, copy)


def _tokens(config: Config, ranks: int) -> int:
    """Packed tokens of the largest micro-batch: the budget, or a rank's share of a mini-batch if less."""
    loop, learner = config.loop, config.learner
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    copies = 1 if learner.share_prompts else loop.group_size
    whole = math.ceil(loop.groups_per_mini_batch / ranks) * (copies * prompt + loop.group_size * response)
    return min(learner.token_budget, whole)


def _engine(config: Config, shape: ModelShape) -> Estimate:
    rollout = config.rollout
    width, computed = (
        4 if dtype.value == "float32" else 2 for dtype in (rollout.dtype, rollout.compute_dtype)
    )
    length = rollout.max_model_len or config.longest_sequence
    automatic = automatic_cache_bytes(shape.kv_bytes_per_token(computed), rollout.max_num_seqs, length)
    cache = rollout.kv_cache_gib * (1 << 30) or automatic
    estimate = engine_memory(shape, kv_cache_bytes=cache, weight_bytes=width)
    if rollout.process is EngineProcess.inprocess:
        shared = ("process", "kept by malloc")  # counted with the learner, whose process it is
        return Estimate({name: size for name, size in estimate.parts.items() if name not in shared})
    return estimate


def _shape(path: str) -> ModelShape | str:
    """Dimensions from the table or a `config.json` on this machine, else the sentence that says why not."""
    if path in KNOWN:
        return KNOWN[path]
    folder = local_config(path)
    if folder is None:
        return f"{path} has no config.json on this machine, so its dimensions are unknown: no estimate."
    try:
        return ModelShape.read(folder)
    except KeyError as error:
        return f"{folder / 'config.json'} has no {error}, so the dimensions are unknown: no estimate."


def _lora_share(shape: ModelShape, rank: int) -> float:
    """Adapter parameters on all linear layers over all parameters."""
    sizes = [
        (shape.hidden, shape.heads * shape.head_dim),
        (shape.hidden, shape.kv_heads * shape.head_dim),
        (shape.hidden, shape.kv_heads * shape.head_dim),
        (shape.heads * shape.head_dim, shape.hidden),
        (shape.hidden, shape.intermediate),
        (shape.hidden, shape.intermediate),
        (shape.intermediate, shape.hidden),
    ]
    return shape.layers * rank * sum(a + b for a, b in sizes) / shape.parameters
