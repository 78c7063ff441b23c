"""TRL's side of the race: one training with its GRPOTrainer, timed by rollout.

    /tmp/trl-venv/bin/python tests/benchmarks/trl_side.py JOB.json

`tests.benchmarks.versus_trl` writes the job and runs this with TRL's own interpreter. Of Whetstone it imports
the grader and the length penalty alone, so that both sides get the same rewards; `PYTHONPATH` must hold the
checkout.
"""

from __future__ import annotations

import fnmatch
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rlhf.algorithms.overlong import penalty
from rlhf.rewards.exact import ExactSpec, grade
from rlhf.rewards.grade import Response

Json = dict[str, Any]


def main() -> None:
    """Train, and write what each rollout took."""
    job: Json = json.loads(Path(sys.argv[1]).read_text())
    work: Json = json.loads(Path(job["work"]).read_text())
    trainer = build(job, work)
    watch = Stopwatch(trainer, keep=bool(job["record"]))
    trainer.train()
    watch.finish()
    if job["record"]:
        Path(job["record"]).write_text(json.dumps(watch.recorded))
    if job["save"]:
        trainer.save_model(job["save"])
    result = {
        "rollouts": watch.rollouts,
        "optimizer_steps": work["optimizer_steps"],
        "bytes": tensor_bytes(trainer.model),
        "attention": trainer.model.config._attn_implementation,
        "versions": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
    }
    Path(job["out"]).write_text(json.dumps(result))


def build(job: Json, work: Json) -> GRPOTrainer:
    """The trainer of a job: the work is Whetstone's, the job says how TRL goes about it."""
    model = AutoModelForCausalLM.from_pretrained(
        work["model"],
        dtype=torch.bfloat16 if job["precision"] == "bfloat16" else torch.float32,
        attn_implementation=job["attention"],
    )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in work["freeze"]):
            parameter.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(work["tokenizer"], padding_side="left", truncation_side="left")
    ids = tokenizer(text=[prompt["text"] for prompt in work["prompts"]])["input_ids"]
    if ids != [prompt["ids"] for prompt in work["prompts"]]:
        raise ValueError("TRL would tokenize the prompts differently: this is not the same work.")
    return GRPOTrainer(
        model=model,
        reward_funcs=reward_of(work),
        args=arguments(job, work),
        train_dataset=Dataset.from_list(
            [{"prompt": p["text"], "answer": p["answer"]} for p in work["prompts"]]
        ),
        processing_class=tokenizer,
        rollout_func=replay_of(job["replay"]) if job["replay"] else None,
    )


def arguments(job: Json, work: Json) -> GRPOConfig:
    """`optimizer_steps` steps on each rollout of `prompts_a_rollout * group_size` responses."""
    samples = work["prompts_a_rollout"] * work["group_size"]
    accumulated = samples // work["optimizer_steps"] // job["micro_batch"]
    return GRPOConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * work["optimizer_steps"],
        max_steps=work["optimizer_steps"] * job["rollouts"],
        num_generations=work["group_size"],
        max_completion_length=work["max_new_tokens"],
        temperature=work["temperature"],
        loss_type="dapo",
        epsilon=work["clip_low"],
        epsilon_high=work["clip_high"],
        beta=0.0,
        learning_rate=work["lr"],
        lr_scheduler_type="constant",
        adam_beta1=work["betas"][0],
        adam_beta2=work["betas"][1],
        max_grad_norm=work["max_grad_norm"],
        shuffle_dataset=False,
        seed=work["seed"],
        bf16=job["precision"] == "autocast",
        gradient_checkpointing=job["checkpointing"],
        torch_compile=job["compile"],
        use_transformers_continuous_batching=job["continuous_batching"],
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def reward_of(work: Json) -> Any:
    """The recipe's reward: exact answer, and the soft punishment of length."""

    def reward(
        completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        found = []
        for text, ids, gold in zip(completions, completion_ids, answer):
            response = Response(text=text, finished=ids[-1] in work["end_tokens"], length=len(ids))
            overlong = penalty(
                len(ids), work["max_new_tokens"], work["overlong_buffer"], work["overlong_factor"]
            )
            found.append(grade(response, gold, ExactSpec()).accuracy + overlong)
        return found

    return reward


def replay_of(path: str) -> Any:
    """A rollout function that answers with recorded rollouts, one after another: TRL's learner alone."""
    recorded = iter(json.loads(Path(path).read_text()))

    def replay(prompts: list[str], trainer: GRPOTrainer) -> Json:
        rollout = next(recorded)
        return {
            "prompt_ids": [sample["prompt_ids"] for sample in rollout],
            "completion_ids": [sample["response_ids"] for sample in rollout],
            "logprobs": None,
        }

    return replay


class Stopwatch:
    """Seconds of each rollout, from the start of its generation to the start of the next one's."""

    def __init__(self, trainer: GRPOTrainer, keep: bool) -> None:
        """Wrap the trainer's two methods around generation. `keep`: record what was generated."""
        self.rollouts: list[Json] = []
        self.recorded: list[list[Json]] = []
        self._began = 0.0
        self._keep = keep
        self._generate = trainer._generate_single_turn
        self._score = trainer._generate_and_score_completions
        self._group_size = trainer.num_generations
        trainer._generate_single_turn = self._timed_generate
        trainer._generate_and_score_completions = self._timed_score

    def finish(self) -> None:
        """Close the books of the last rollout."""
        if self.rollouts:
            rollout = self.rollouts[-1]
            rollout["seconds"] = time.perf_counter() - self._began
            rollout["learner"] = rollout["seconds"] - rollout["generation"]

    def _timed_generate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        made = self._generate(*args, **kwargs)
        self.rollouts[-1]["generation"] = time.perf_counter() - start
        return made

    def _timed_score(self, inputs: Any) -> Any:
        self.finish()
        self.rollouts.append({"generation": 0.0})
        self._began = time.perf_counter()
        scored = self._score(inputs)
        mask = scored["completion_mask"]
        self.rollouts[-1] |= {"samples": len(mask), "tokens": int(mask.sum())}
        if self._keep:
            self.recorded.append(samples_of(scored, self._group_size))
        return scored


def samples_of(scored: Any, group_size: int) -> list[Json]:
    """The samples of a rollout without padding, before TRL shuffles them."""
    old = scored.get("old_per_token_logps")
    found = []
    for index, advantage in enumerate(scored["advantages"].tolist()):
        prompt, response = scored["prompt_mask"][index].bool(), scored["completion_mask"][index].bool()
        ids = scored["completion_ids"][index][response].tolist()
        found.append(
            {
                "group": index // group_size,
                "prompt_ids": scored["prompt_ids"][index][prompt].tolist(),
                "response_ids": ids,
                "logprobs": [-1.0] * len(ids) if old is None else old[index][response].tolist(),
                "advantage": advantage,
            }
        )
    return found


def tensor_bytes(model: Any) -> dict[str, int]:
    """Bytes of weights, of the gradient, and of Adam's two moments, each in the weights' own precision."""
    sizes = [(math.prod(p.shape) * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, requires_grad in sizes if requires_grad)
    return {"weights": sum(size for size, _ in sizes), "gradient": trained, "adam": 2 * trained}


if __name__ == "__main__":
    main()
