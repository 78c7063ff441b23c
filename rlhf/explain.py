"""`rlhf explain`: what a recipe will do, before anything is loaded."""

from __future__ import annotations

from rlhf.algorithms.config import (
    AlgorithmConfig,
    CorrectionLevel,
    Estimator,
    Objective,
    OldLogprobs,
    Ratio,
    Surplus,
    WhenExhausted,
)
from rlhf.config import Config
from rlhf.memory_plan import MemoryPlan, plan_memory
from rollout.config import Numerics
from trainer.memory.config import OffloadState

GB = 1e9

_NUMERICS = {
    Numerics.standard: "",
    Numerics.layercast: ", which engines and learner compute with in float32 (rollout.numerics=layercast)",
    Numerics.batch_invariant: " with vLLM's batch-invariant kernels (rollout.numerics)",
}


def explain(recipe: str, config: Config) -> str:
    """Values that matter, batch arithmetic, a memory estimate, and a sentence for each switch."""
    sections = [
        ("What runs", _what(recipe, config)),
        ("Batch arithmetic", _arithmetic(config)),
        ("Memory (estimate)", _memory(config, plan_memory(config))),
        ("Algorithm", algorithm_sentences(config.algorithm, config.loop.optimizer_steps)),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _what(recipe: str, config: Config) -> list[str]:
    rollout, learner = config.rollout, config.learner
    parts = ", ".join(f"{name} ({part.kind} x {part.weight:g})" for name, part in config.reward.parts.items())
    sources = ", ".join(config.data.named_sources()) or "none: give data.path or rows in Python"
    trained = f"all weights but {', '.join(learner.freeze)}" if learner.freeze else "all weights"
    if learner.lora.rank:
        trained = f"LoRA of rank {learner.lora.rank}"
    return [
        f"recipe {recipe}, seed {config.run.seed}, model {config.model.path}",
        f"data {sources}; {config.data.validation} validation and {config.data.heldout} held-out rows; "
        f"prompts up to {config.data.max_prompt_tokens} tokens",
        f"reward {parts or 'none: give reward.parts or a function in Python'}",
        f"sampling at temperature {rollout.temperature:g}, up to {rollout.max_new_tokens} new tokens, "
        f"{rollout.engines} engine(s) in {rollout.dtype}{_NUMERICS[rollout.numerics]}",
        f"learner trains {trained} in {learner.dtype} with {learner.optimizer.name}, "
        f"lr {learner.optimizer.lr:g}, {learner.schedule.name} schedule, "
        f"{learner.schedule.warmup_steps} warm-up rollout steps",
        f"evaluation at temperature {config.evaluation.temperature:g}"
        + (
            f" every {config.evaluation.every} steps" if config.evaluation.every else " at start and end only"
        ),
    ]


def _arithmetic(config: Config) -> list[str]:
    """Which batch size is which, and what each counter counts."""
    loop, rollout = config.loop, config.rollout
    responses = loop.prompts * loop.group_size
    sampling = config.algorithm.dynamic_sampling
    lines = [
        f"one rollout step keeps {loop.prompts} groups (loop.prompts) of {loop.group_size} responses "
        f"(loop.group_size) = {responses} responses, up to {responses * rollout.max_new_tokens} new tokens",
        f"one mini-batch is {loop.groups_per_mini_batch} groups = "
        f"{loop.groups_per_mini_batch * loop.group_size} responses (loop.mini_batch)",
        f"{loop.epochs} epoch(s) x {loop.prompts // loop.groups_per_mini_batch} mini-batches = "
        f"{loop.optimizer_steps} optimizer steps a rollout step; {loop.steps} rollout steps = "
        f"{loop.steps * loop.optimizer_steps} optimizer steps",
        f"micro-batches hold up to {config.learner.token_budget} packed tokens (learner.token_budget); "
        f"they change memory and speed, not the gradient",
        "counters: step and the schedule count rollout steps, learner/optimizer_steps optimizer steps, "
        "train/prompts prompts drawn, weights/version publishes",
    ]
    if loop.max_tokens:
        lines.append(f"the step that generates token {loop.max_tokens} (loop.max_tokens) is the last")
    if loop.staleness:
        lines.append(
            f"engines generate up to {loop.staleness} step(s) ahead of the learner (loop.staleness): groups "
            f"that are not carried over are up to {loop.staleness} update(s) old when they are learned from"
        )
    if rollout.sleep_level:
        lines.append(
            f"engines sleep from the end of generation to the publish, at vLLM's level {rollout.sleep_level} "
            "(rollout.sleep_level), and the learner has their GPU memory meanwhile"
        )
    if sampling.enabled:
        most = loop.prompts * sampling.oversample * sampling.max_rounds
        lines.insert(1, f"to find them it draws at most {most:g} prompts in {sampling.max_rounds} rounds")
    return lines


def _memory(config: Config, plan: MemoryPlan) -> list[str]:
    if plan.unknown:
        return [plan.unknown]
    place = config.learner.memory.offload_state
    lines = []
    learner = "the learner" if plan.ranks == 1 else f"each of {plan.ranks} learner ranks"
    for name, estimate in ((learner, plan.learner), ("one engine", plan.engine)):
        parts = ", ".join(f"{part} {size / GB:.2f}" for part, size in estimate.parts.items())
        lines.append(f"{name} {estimate.total / GB:.1f} GB: {parts}")
    if plan.checkpoint:
        lines.append(
            f"rank 0 takes {plan.checkpoint / GB:.1f} GB of the host's memory besides while it writes or "
            "reads a checkpoint"
        )
    if place is not OffloadState.never:
        lines.append(
            f"{plan.learner.state / GB:.2f} GB of {learner} lie on the {place} while engines generate "
            "(learner.memory.offload_state)"
        )
    lines.append(f"whole run {plan.total / GB:.1f} GB with {plan.engines} engine(s)")
    return lines


# ---------------------------------------------------------------- the algorithm in sentences


def algorithm_sentences(algorithm: AlgorithmConfig, optimizer_steps: int = 1) -> list[str]:
    """A plain sentence for every switch, also for those that are off."""
    return [
        _advantage(algorithm),
        _objective(algorithm, optimizer_steps),
        _aggregation(algorithm),
        _sampling(algorithm),
        _overlong(algorithm),
        _kl(algorithm),
        _entropy(algorithm),
        _old(algorithm),
        _correction(algorithm),
    ]


def _advantage(algorithm: AlgorithmConfig) -> str:
    meaning = {
        Estimator.group_mean_std: "reward minus its group's mean, over its group's standard deviation",
        Estimator.group_mean: "reward minus its group's mean",
        Estimator.rloo: "reward minus the mean of the other responses of its group",
        Estimator.reinforce_plus_plus: "reward normalized over the whole step",
        Estimator.reinforce_plus_plus_baseline: "reward minus its group's mean, normalized over the step",
    }[algorithm.advantage.estimator]
    return f"advantage: {meaning} ({algorithm.advantage.estimator})."


def _objective(algorithm: AlgorithmConfig, optimizer_steps: int) -> str:
    clip = algorithm.clip
    what = (
        "a response's geometric-mean ratio (GSPO)"
        if algorithm.ratio is Ratio.sequence
        else "each token's ratio"
    )
    bounds = f"[{1 - clip.low:g}, {1 + clip.high:g}]"
    if algorithm.objective is Objective.cispo:
        return f"objective: CISPO, {what} is clipped to {bounds} as a weight; every token keeps a gradient."
    kind = "clip-higher: rare tokens may grow more" if clip.high > clip.low else "symmetric"
    dual = f", dual clip at {clip.dual:g}" if clip.dual else ", dual clip off"
    on_policy = optimizer_steps == 1 and algorithm.old_logprobs is not OldLogprobs.rollout
    idle = " With one optimizer step a rollout the ratio is 1 and the clip idle." if on_policy else ""
    return f"clip: {what} is clipped to {bounds} ({kind}){dual}.{idle}"


def _aggregation(algorithm: AlgorithmConfig) -> str:
    meaning = {
        "token_mean": "every token of a mini-batch weighs the same",
        "token_mean_group": "a token mean in each group, then the mean over groups",
        "seq_mean_token_mean": "a token mean in each response, then the mean over responses",
        "seq_mean_token_sum": "a token sum in each response, then the mean over responses",
        "seq_mean_token_sum_norm": "a token sum in each response over the response limit, then the mean",
    }[algorithm.aggregation.value]
    return f"aggregation: {meaning} ({algorithm.aggregation}); counts are of the whole mini-batch."


def _sampling(algorithm: AlgorithmConfig) -> str:
    sampling = algorithm.dynamic_sampling
    if not sampling.enabled:
        return "dynamic sampling: off, groups without variance are learned from and teach nothing."
    surplus = (
        f"carried for up to {sampling.max_age} steps" if sampling.surplus is Surplus.carry else "dropped"
    )
    end = "the run stops" if sampling.when_exhausted is WhenExhausted.stop else "the step goes on with fewer"
    return (
        f"dynamic sampling: groups all right or all wrong are dropped and refilled, "
        f"up to {sampling.max_rounds} rounds; surplus is {surplus}; when groups run out {end}."
    )


def _overlong(algorithm: AlgorithmConfig) -> str:
    overlong = algorithm.overlong
    mask = "; truncated responses are masked out of the loss" if overlong.mask_truncated else ""
    if not overlong.buffer:
        return f"overlong: no penalty{mask}."
    return (
        f"overlong: a penalty grows from 0 to {overlong.penalty_factor:g} over the last "
        f"{overlong.buffer} tokens before the limit{mask}."
    )


def _kl(algorithm: AlgorithmConfig) -> str:
    kl = algorithm.kl
    if not kl.coefficient:
        return "KL: off, no reference model is kept."
    return f"KL: {kl.coefficient:g} x {kl.estimator} to the frozen reference, in the {kl.place}."


def _entropy(algorithm: AlgorithmConfig) -> str:
    weight = algorithm.entropy_coefficient
    return f"entropy bonus: {weight:g} x the token entropy." if weight else "entropy bonus: off."


def _old(algorithm: AlgorithmConfig) -> str:
    return {
        OldLogprobs.current: "old log-probs: the learner's own at the update, no extra pass.",
        OldLogprobs.recompute: "old log-probs: the learner's before the update, by one more pass "
        "over all but the first mini-batch.",
        OldLogprobs.rollout: "old log-probs: the engine's; the ratio then holds the mismatch too.",
    }[algorithm.old_logprobs]


def _correction(algorithm: AlgorithmConfig) -> str:
    correction = algorithm.correction
    if correction.level is CorrectionLevel.off:
        return "correction: off, the gap between engine and learner is measured but not corrected."
    bounds = f"[{correction.low:g}, {correction.high:g}]"
    return f"correction: learner / engine probability by {correction.level}, {correction.mode} at {bounds}."
