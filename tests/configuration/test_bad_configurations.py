# ruff: noqa: E501 (one sentence stays one line)
"""Every mistake is one sentence that names the key, the value and the remedy; exit status 2; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.cli import main

DAPO = "dapo/tiny"
AHEAD = ["loop.staleness=2", "rollout.process=child"]
LAYERCAST = ["rollout.numerics=layercast", "rollout.dtype=bfloat16", "learner.dtype=bfloat16"]

CASES = [
    # unknown keys, with the nearest valid one
    (["loop.stpes=20"], "Unknown key 'loop.stpes' in 'loop.stpes=20': did you mean 'loop.steps'?"),
    (["+loop.extra=1"], "Unknown key 'loop.extra' in '+loop.extra=1': did you mean 'loop.steps'?"),
    (
        ["++learner.lr=1e-6"],
        "Unknown key 'learner.lr' in '++learner.lr=1e-6': did you mean 'learner.optimizer.lr'?",
    ),
    (
        ["algorithm.clip_high=0.3"],
        "Unknown key 'algorithm.clip_high' in 'algorithm.clip_high=0.3': did you mean 'algorithm.clip.high'?",
    ),
    (
        ["reward.parts.exact.wieght=2"],
        "Unknown key 'reward.parts.exact.wieght' in 'reward.parts.exact.wieght=2': ",
    ),
    (["qqqq=1"], "Unknown key 'qqqq' in 'qqqq=1': see docs/configuration.md for the valid keys."),
    (
        ["learner.activation_checkpointing=true"],
        "Unknown key 'learner.activation_checkpointing' in 'learner.activation_checkpointing=true': did you mean 'learner.memory.activation_checkpointing'?",
    ),
    # grammar
    (["loop.steps"], "'loop.steps' is not an override: write key=value, for example loop.steps=20."),
    (["~loop.steps"], "'~loop.steps': a key cannot be deleted; set it to the value that you want instead."),
    (
        ["loop.steps=1,2"],
        "'loop.steps=1,2' lists several values: start one run for each, or write loop.steps=[a,b] for a list.",
    ),
    # wrong types
    (["loop.steps=many"], "loop.steps=many: give an integer."),
    (["loop.steps=2.5"], "loop.steps=2.5: give an integer."),
    (["learner.optimizer.lr=fast"], "learner.optimizer.lr=fast: give a number."),
    (["learner.compile=maybe"], "learner.compile=maybe: give true or false."),
    (
        ["algorithm.aggregation=mean"],
        "algorithm.aggregation=mean: choose one of token_mean, token_mean_group, ",
    ),
    (
        ["algorithm.correction.level=false"],
        "algorithm.correction.level=false: choose one of off, token, sequence, geometric (write 'off' in quotes in YAML).",
    ),
    (["loop=3"], "loop=3: this is a section, set one of its keys (loop.steps, ...)."),
    # ranges
    (["loop.steps=0"], "loop.steps=0 must be at least 1: raise it."),
    (["loop.group_size=0"], "loop.group_size=0 must be at least 1: raise it."),
    (
        ["run.watchdog_minutes=-1"],
        "run.watchdog_minutes=-1 must be at least 0: set a number of minutes, or 0 to watch nothing.",
    ),
    (["run.seed=-1"], "run.seed=-1 must be at least 0: raise it."),
    (
        ["rollout.temperature=0"],
        "rollout.temperature=0.0 must be above 0: the learner divides logits by it.",
    ),
    (
        ["algorithm.clip.low=-0.1"],
        "algorithm.clip.low=-0.1 and clip.high=0.28 are distances from a ratio of 1: neither may be negative.",
    ),
    (["learner.token_budget=0"], "learner.token_budget=0 must be at least 1: raise it."),
    (
        ["learner.optimizer.betas=[0.9]"],
        "learner.optimizer.betas=[0.9] must be two numbers from 0 to below 1: give [0.9, 0.999].",
    ),
    (
        ["evaluation.every=-1"],
        "evaluation.every=-1 is negative: set a number of steps, or 0 for none between the first and the last.",
    ),
    (["data.heldout=-1"], "data.heldout=-1 must be at least 0: raise it."),
    (["reward.workers=-1"], "reward.workers=-1 is negative: give 1 or more, or 0 for one a core."),
    (
        ["learner.memory.offload_activations=true"],
        "learner.memory.offload_activations=true moves the layer inputs that checkpointing keeps, and learner.memory.activation_checkpointing=none keeps everything: set it to full.",
    ),
    (
        ["learner.compile=true", "learner.memory.activation_checkpointing=selective"],
        "learner.memory.activation_checkpointing=selective picks single operations, and learner.compile=true fuses them and picks by itself what to compute again: set it to none or full.",
    ),
    # impossible combinations
    (
        [*AHEAD, "learner.memory.offload_state=disk"],
        "learner.memory.offload_state=disk frees the learner's memory while engines generate, and with loop.staleness=2 it is learning then: set it to never.",
    ),
    (
        ["algorithm.clip.high=0.1"],
        "algorithm.clip.high=0.1 is below algorithm.clip.low=0.2: raise clip.high or lower clip.low.",
    ),
    (["loop.mini_batch=3"], "loop.mini_batch=3 does not divide loop.prompts=4: choose one of 1, 2, 4."),
    (
        ["algorithm.overlong.buffer=9"],
        "algorithm.overlong.buffer=9 is longer than the response limit rollout.max_new_tokens=8: shorten the buffer.",
    ),
    (
        ["loop.group_size=1"],
        "algorithm.dynamic_sampling.enabled=true needs groups that can disagree but loop.group_size=1: set loop.group_size to 2 or more.",
    ),
    (
        ["algorithm.old_logprobs=current"],
        "algorithm.old_logprobs=current needs one optimizer step a rollout but loop.mini_batch=2 and loop.epochs=1 give 2: set algorithm.old_logprobs=recompute.",
    ),
    (
        ["algorithm.old_logprobs=rollout"],
        "algorithm.old_logprobs=rollout already divides by the engine's log-probs, so algorithm.correction.level=token would count the mismatch twice: set correction.level=off, or old_logprobs=recompute.",
    ),
    (
        ["rollout.top_p=0.9"],
        "rollout.top_p=0.9 cuts the sampling distribution, which the learner cannot renormalize: set rollout.top_p=1.",
    ),
    (
        ["rollout.max_model_len=16"],
        "rollout.max_model_len=16 is shorter than data.max_prompt_tokens + rollout.max_new_tokens = 136: raise it or set 0.",
    ),
    (
        ["rollout.max_model_len=150", "evaluation.max_new_tokens=100"],
        "rollout.max_model_len=150 is shorter than data.max_prompt_tokens + evaluation.max_new_tokens = 228: raise it or set 0.",
    ),
    (
        ["learner.token_budget=100"],
        "learner.token_budget=100 is smaller than the longest row, data.max_prompt_tokens + rollout.max_new_tokens = 136: raise it.",
    ),
    (
        ["model.adapter=./mine", "learner.lora.rank=8"],
        "learner.lora.rank=8 asks for a fresh adapter and model.adapter=./mine for an old one: set learner.lora.rank=0 to continue it.",
    ),
    (
        ["rollout.numerics=layercast"],
        "rollout.dtype=float32 with rollout.numerics=layercast, which keeps weights in bfloat16 and computes in float32: set rollout.dtype=bfloat16, or rollout.numerics=standard.",
    ),
    (
        ["rollout.numerics=layercast", "rollout.dtype=bfloat16"],
        "learner.dtype=float32 with rollout.numerics=layercast would have the learner compute with weights that the engines round to bfloat16: set learner.dtype=bfloat16, in which weights are kept; what is computed is float32.",
    ),
    (
        [*LAYERCAST, "learner.lora.rank=8"],
        "learner.lora.rank=8 with rollout.numerics=layercast: engines round base and adapter to bfloat16 together, which the learner's separate adapter does not; set learner.lora.rank=0, or rollout.numerics=standard.",
    ),
    (
        [*LAYERCAST, "learner.parallel.tensor=2"],
        "learner.parallel.tensor=2 with rollout.numerics=layercast: split layers do not upcast their weights; set learner.parallel.tensor=1.",
    ),
    (
        ["rollout.numerics=batch_invariant", "rollout.process=child"],
        "rollout.dtype=float32 with rollout.numerics=batch_invariant: vLLM's batch-invariant kernels multiply float32 in TF32; set rollout.dtype=bfloat16.",
    ),
    (
        ["rollout.numerics=batch_invariant", "rollout.dtype=bfloat16"],
        "rollout.numerics=batch_invariant with rollout.process=inprocess: vLLM decides on it while it is imported, for a whole process; use rollout.process=child.",
    ),
    (
        ["rollout.engines=2"],
        "rollout.engines=2 with rollout.process=inprocess: one process holds one engine; use rollout.process=child.",
    ),
    (
        ["loop.inflight_updates=true"],
        "loop.inflight_updates=true needs generation beside learning and loop.staleness=0 has none: set loop.staleness=1 or more.",
    ),
    (["loop.staleness=-1"], "loop.staleness=-1 must be at least 0: raise it."),
    (
        ["loop.staleness=1"],
        "rollout.process=inprocess cannot generate while the learner works, as loop.staleness=1 asks: set rollout.process=child.",
    ),
    (
        [*AHEAD, "loop.inflight_updates=true", "rollout.restarts=2"],
        "rollout.restarts=2 makes the round of a lost engine again under one version, and loop.inflight_updates=true mixes two in it: set one of them off.",
    ),
    (
        [*AHEAD, "rollout.sleep_level=2"],
        "rollout.sleep_level=2 has engines sleep while the learner learns, and loop.staleness=2 has them generate then: set one of them to 0.",
    ),
    (
        ["learner.parallel.launcher=ray"],
        "learner.parallel.launcher=ray starts replicate x shard x tensor ranks, which are 1: set learner.parallel.shard to the number of ranks.",
    ),
    (
        ["learner.parallel.context=2"],
        "Unknown key 'learner.parallel.context' in 'learner.parallel.context=2': ",
    ),
    (
        [*AHEAD, "algorithm.old_logprobs=current", "loop.mini_batch=0"],
        "algorithm.old_logprobs=current is for fresh groups only, and loop.staleness=2 trains on older ones: set old_logprobs=recompute.",
    ),
    (
        [*AHEAD, "algorithm.correction.level='off'"],
        "loop.staleness=2 trains on groups of older weights, and with algorithm.correction.level=off nothing accounts for it: set correction.level=token, or old_logprobs=rollout.",
    ),
    (
        [*AHEAD, "algorithm.kl.coefficient=0.1", "algorithm.kl.place=reward"],
        "algorithm.kl.place=reward asks the learner for log-probs while groups are scored, and with loop.staleness=2 it is learning then: set algorithm.kl.place=loss.",
    ),
    (
        [
            *AHEAD,
            "algorithm.dynamic_sampling.surplus=carry",
            "algorithm.dynamic_sampling.max_age=2",
        ],
        "algorithm.dynamic_sampling.max_age=2 would drop every carried group that was generated ahead as far as loop.staleness=2 allows: set max_age=3 or more, or surplus=drop.",
    ),
    (["resume=yes"], "resume=yes is not known: set never, auto, or a checkpoint's step (resume=40)."),
    (
        ["resume=4"],
        "resume=4: runs/dapo-tiny holds no run: name the run's folder with run.dir, or start anew with resume=never.",
    ),
    (
        ["checkpoint.every=-1"],
        "checkpoint.every=-1 is negative: set a number of steps, or 0 to save at the end only.",
    ),
    (["checkpoint.keep=0"], "checkpoint.keep=0 must be at least 1: raise it."),
    (
        ["checkpoint.save_best=true"],
        "checkpoint.save_best=true would choose on evaluation.split=heldout, where nothing may be chosen: set evaluation.split=validation, and data.validation to a number of problems.",
    ),
    (
        [
            "checkpoint.save_best=true",
            "evaluation.split=validation",
            "evaluation.every=0",
            "evaluation.at_end=false",
        ],
        "checkpoint.save_best=true needs evaluations to choose by but evaluation.every=0 and evaluation.at_end=false: set evaluation.every.",
    ),
    (["data.path=nowhere.txt"], "data.path=nowhere.txt is neither a task"),
    (
        ["reward.accuracy_from=style"],
        "reward.accuracy_from='style' is no part of the reward: choose one of exact.",
    ),
    (
        ["reward.parts.exact.kind=exact_integr"],
        "reward.parts.exact.kind='exact_integr' is not known: did you mean 'exact_integer'?",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_one_clear_sentence(
    overrides: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", DAPO, *overrides]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"rlhf: {sentence}"), said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dapo/arithmetik"]) == 2
    assert (
        capsys.readouterr().err == "rlhf: Unknown recipe 'dapo/arithmetik': did you mean 'dapo/arithmetic'?\n"
    )


def test_missing_recipe_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "./nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "rlhf: Recipe file './nowhere.yaml' does not exist.\n"


def test_unknown_key_inside_a_recipe_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# @package _global_\ndefaults: [/dapo/tiny, _self_]\nloop: {stpes: 3}\n")
    assert main(["explain", str(recipe)]) == 2
    assert f"Unknown key 'loop.stpes' in {recipe}: did you mean 'loop.steps'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("# @package _global_\nloop: {steps: 3\nmodel: {}\n", "line 3, column 6 is not YAML"),
        ("loop:\n\tsteps: 3\n", "line 2, column 1 is not YAML"),
        ("loop: \u0007\n", "this is not YAML"),
    ],
)
def test_a_recipe_file_that_is_not_yaml(
    text: str, mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    assert main(["explain", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rlhf: {recipe}: {mistake}"), said
    assert said.count("\n") == 1


def test_a_recipe_file_ends_in_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yml"
    recipe.write_text("# @package _global_\ndefaults: [/dapo/tiny, _self_]\n")
    assert main(["explain", str(recipe)]) == 2
    assert capsys.readouterr().err == (
        f"rlhf: Recipe file '{recipe}': the name must end in .yaml: rename it.\n"
    )


def test_an_interrupt_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.recipe_list.table", interrupted)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err == "rlhf: interrupted.\n"


def test_a_run_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    assert main(["train", DAPO, "run.name=mine"]) == 2
    assert "run.name=mine: runs/mine already holds a run" in capsys.readouterr().err
    assert main(["train", DAPO, f"run.dir={folder}"]) == 2
    assert (folder / "metrics.jsonl").read_text() == '{"step": 0}\n'
