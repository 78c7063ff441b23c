"""The ablation: cached runs by what they were made with, equal tokens, fired switches, and one real call."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.algorithms.config import Aggregation, AlgorithmConfig
from rlhf.compose import load
from rlhf.config import Config, LoopConfig
from rollout.types import Group
from tests.benchmarks.ablation import page
from tests.benchmarks.ablation.__main__ import collect, main, valid
from tests.benchmarks.ablation.arms import (
    AGGREGATION,
    ARMS,
    BY_NAME,
    CLIP,
    OVERLONG,
    RECIPE,
    SAMPLING,
    fingerprint,
    relevant,
    resolve,
    still_valid,
)
from tests.benchmarks.ablation.results import (
    Result,
    count_overlong,
    count_reweighed,
    interpolate,
    path_of,
    read,
)
from tests.benchmarks.ablation.runs import Job
from tests.loop.groups import group, trajectory

ROOT = Path(__file__).resolve().parents[2]


def result(arm: str = "dapo", seed: int = 0, last: float = 0.5, **changes: object) -> Result:
    """A made-up run: accuracy 0.1 before, `last` after 1 200 tokens of a budget of 1 000."""
    values = relevant(resolve("dapo/tiny", BY_NAME[arm], seed))
    made = Result(
        arm=arm, seed=seed, recipe="dapo/tiny", hash=fingerprint(values), commit="abc", minutes=2.0,
        budget=1000, problems=200, optimizer_steps=24, tokens=[400, 800, 1200],
        curves={"entropy": [0.5, None, 0.3], "length": [30.0, 20.0, 10.0]},
        evaluated_at=[0, 800, 1200], accuracies=[0.1, 0.3, last],
        fired={CLIP: (3, 1000), SAMPLING: (5, 20), AGGREGATION: (500, 1000), OVERLONG: (0, 160)},
        config=values,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- arms and the cache


def test_each_arm_changes_its_own_switch_and_nothing_else() -> None:
    full = relevant(resolve(RECIPE, BY_NAME["dapo"], 0))
    changed = {}
    for arm in ARMS:
        values = relevant(resolve(RECIPE, arm, 0))
        assert values.keys() == full.keys()
        changed[arm.name] = {key for key in full if values[key] != full[key]}
    clip, filtering = "algorithm.clip.high", "algorithm.dynamic_sampling.enabled"
    weights, buffer = "algorithm.aggregation", "algorithm.overlong.buffer"
    assert changed == {
        "dapo": set(),
        "no_clip_higher": {clip},
        "no_dynamic_sampling": {filtering},
        "no_token_level": {weights},
        "no_overlong": {buffer},
        "grpo": {clip, filtering, weights, buffer},
        "token_mean_group": {weights},
        "seq_mean_token_sum": {weights},
        "seq_mean_token_sum_norm": {weights},
    }


def test_every_switch_of_the_recipe_can_act() -> None:
    config = load(RECIPE)
    assert config.loop.optimizer_steps >= 4
    assert config.algorithm.clip.high > config.algorithm.clip.low
    assert config.algorithm.dynamic_sampling.enabled
    assert 0 < config.algorithm.overlong.buffer < config.rollout.max_new_tokens
    assert config.loop.max_tokens > 0


def test_the_fingerprint_sees_what_decides_a_run_and_nothing_else() -> None:
    config = load("dapo/tiny")
    before = fingerprint(relevant(config))
    assert len(before) == 12
    elsewhere = copy.deepcopy(config)
    elsewhere.run.dir, elsewhere.resume, elsewhere.checkpoint.every = "elsewhere", "auto", 5
    assert fingerprint(relevant(elsewhere)) == before
    assert fingerprint(dict(reversed(relevant(config).items()))) == before
    for change in ("run.seed=1", "learner.optimizer.lr=1e-4", "data.sources.sums.args.high=5"):
        assert fingerprint(relevant(load("dapo/tiny", [change]))) != before, change


def test_a_key_that_is_new_since_leaves_a_result_valid_at_its_default_only() -> None:
    now = relevant(load("dapo/tiny"))
    recorded = {key: value for key, value in now.items() if key != "algorithm.clip.dual"}
    assert still_valid(recorded, now)
    assert not still_valid(recorded, now | {"algorithm.clip.dual": 3.0})
    assert not still_valid(now | {"loop.gone": 1}, now)
    assert not still_valid(now | {"loop.steps": 7}, now)


def test_a_result_survives_its_file_and_counts_for_its_recipe_only(tmp_path: Path) -> None:
    made = result(seed=2)
    assert made.write(tmp_path) == path_of(tmp_path, "dapo", 2)
    assert read(path_of(tmp_path, "dapo", 2)) == made
    assert read(path_of(tmp_path, "dapo", 3)) is None
    assert path_of(tmp_path, "dapo", 2).stat().st_size < 8000
    assert valid(tmp_path, "dapo/tiny", BY_NAME["dapo"], 2) == made
    assert valid(tmp_path, "dapo/tiny", BY_NAME["dapo"], 2, ("loop.steps=7",)) is None
    assert [run.seed for run in collect(tmp_path, "dapo/tiny")["dapo"]] == [2]
    path_of(tmp_path, "dapo", 2).write_text('{"arm": "dapo"}')
    with pytest.raises(ValueError, match="is not a result of the ablation"):
        read(path_of(tmp_path, "dapo", 2))


def test_a_run_has_a_folder_for_its_configuration_and_goes_on_in_it(tmp_path: Path) -> None:
    job = Job(BY_NAME["grpo"], 1, "dapo/tiny")
    other = Job(BY_NAME["grpo"], 1, "dapo/tiny", ("loop.steps=7",))
    assert job.folder(tmp_path) != other.folder(tmp_path)
    assert job.folder(tmp_path).name.startswith("grpo-seed1-")
    assert job.command(tmp_path)[-2:] == [f"run.dir={job.folder(tmp_path)}", "resume=auto"]


# ---------------------------------------------------------------- equal tokens, fired switches


def test_interpolation_at_equal_tokens() -> None:
    assert result().accuracy_at(1000) == pytest.approx(0.4)
    assert result().accuracy_at(400) == pytest.approx(0.2)
    assert result().accuracy_at(1200) == 0.5
    assert interpolate([0, 5, 5, 9], [1.0, 2.0, 3.0, 4.0], 5) == 2.0
    for outside in (-1, 1201):
        with pytest.raises(ValueError, match=f"asked for a value at {outside}, and values reach from 0 to"):
            result().accuracy_at(outside)


def test_the_mean_over_a_stretch_of_tokens() -> None:
    """From 0.225 at 500 over 0.3 at 800 to 0.4 at 1 000."""
    area = 300 * (0.225 + 0.3) / 2 + 200 * (0.3 + 0.4) / 2
    assert result().accuracy_over(500, 1000) == pytest.approx(area / 500)
    assert result().accuracy_over(0, 800) == pytest.approx(0.2)


def configured(aggregation: Aggregation) -> Config:
    config = Config(algorithm=AlgorithmConfig(aggregation=aggregation))
    config.loop = LoopConfig(prompts=2, group_size=2, mini_batch=1)
    config.rollout.max_new_tokens = 20
    return config


def rollout(*lengths: tuple[int, int]) -> list[Group]:
    """One group of two responses for each pair of lengths."""
    return [group([trajectory(a), trajectory(b)], str(i)) for i, (a, b) in enumerate(lengths)]


def test_tokens_that_weigh_otherwise() -> None:
    dapo, grpo = configured(Aggregation.token_mean), configured(Aggregation.seq_mean_token_mean)
    assert count_reweighed([rollout((5, 5), (5, 5))], grpo, dapo) == (0, 20)
    # Lengths 2 and 8: token_mean 1/10 each, seq_mean_token_mean 1/4 and 1/16; a second group agrees at 1/10.
    assert count_reweighed([rollout((2, 8), (5, 5))], grpo, dapo) == (10, 20)
    assert count_reweighed([rollout((2, 8), (5, 5))], dapo, dapo) == (10, 20)
    assert count_reweighed([[]], grpo, dapo) == (0, 0)


def test_a_factor_that_all_tokens_share_is_no_difference() -> None:
    dapo, sums = configured(Aggregation.token_mean), configured(Aggregation.seq_mean_token_sum)
    assert count_reweighed([rollout((2, 8), (5, 5))], sums, dapo) == (0, 20)
    # Mini-batches of 4 and 16 tokens: the mean gives each a total of 1, the sum goes by their tokens.
    assert count_reweighed([rollout((2, 2), (8, 8))], sums, dapo) == (20, 20)


def test_overlong_responses_are_counted_where_the_penalty_is_off_too() -> None:
    dapo = load("dapo/tiny")
    assert (dapo.rollout.max_new_tokens, dapo.algorithm.overlong.buffer) == (8, 4)
    assert count_overlong([3, 4, 5, 8], dapo) == 2


# ---------------------------------------------------------------- table and page


def test_the_row_of_an_arm() -> None:
    results = {
        "dapo": [result(seed=0), result(seed=1, last=0.7)],
        "no_clip_higher": [result("no_clip_higher", 0, 0.4), result("no_clip_higher", 1, 0.4)],
    }
    assert page.cells(BY_NAME["no_clip_higher"], results) == [
        "without clip-higher",
        "0, 1",
        "35.0 (35.0 to 35.0)",
        "28.7 to 41.8",
        "-10.0 (-15.0 to -5.0)",
        "28.7 (28.7 to 28.7)",
        "24",
        "0.400",
        "20.0",
        "clip-higher: 0.3 % of tokens stopped above 1.2",
        "",
    ]
    full = page.cells(BY_NAME["dapo"], results)
    assert full[2] == "45.0 (40.0 to 50.0)"
    assert full[4] == ""
    assert full[-1] == "50"


def test_a_switch_that_never_fired_is_inactive() -> None:
    assert page.cells(BY_NAME["dapo"], {"dapo": [result()]})[-2] == (
        "clip-higher: 0.3 % of tokens let through; dynamic sampling: 25.0 % of groups dropped; "
        "token weights: 50.0 % of tokens weigh otherwise; overlong penalty: inactive"
    )
    without = [result("no_overlong", fired={OVERLONG: (0, 160)})]
    assert page.cells(BY_NAME["no_overlong"], {"no_overlong": without})[-2] == "overlong penalty: inactive"
    assert page.activity(OVERLONG, [result("no_overlong", fired={OVERLONG: (16, 160)})]) == (
        "overlong penalty: 10.0 % of responses not penalized"
    )
    assert (
        page.activity(SAMPLING, [result("grpo")])
        == "dynamic sampling: 25.0 % of groups all right or all wrong"
    )


def test_what_was_not_run_says_so() -> None:
    row = page.cells(BY_NAME["grpo"], {})
    assert len(row) == len(page.COLUMNS)
    assert row[:3] == ["plain GRPO, none of them", "0", "not run yet"]
    assert row[-1] == "30"
    alone = page.cells(BY_NAME["grpo"], {"grpo": [result("grpo")]})
    assert alone[4] == "DAPO not run yet"
    text = page.section({})
    assert text.startswith("0 of 27 runs are there.\n\n| arm | seeds |")
    assert text.count("not run yet") == 9


def test_the_section_is_written_between_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write_page(path, {"dapo": [result()]})
    text = path.read_text()
    assert text.startswith(f"before\n{page.BEGIN}\n1 of 27 runs are there. Accuracies are at 1,000 generated")
    assert text.endswith(f"\n{page.END}\nafter\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="the page has no lines"):
        page.splice("nothing", "text")


def test_pictures_of_what_was_run(tmp_path: Path) -> None:
    assert page.draw({}, tmp_path) == []
    runs = {"dapo": [result(), result(seed=1, last=0.7)], "grpo": [result("grpo")]}
    made = page.draw(runs, tmp_path / "new")
    assert [path.name for path in made] == ["ablation_parts.png", "ablation_weights.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_the_shipped_page_is_what_the_results_say() -> None:
    results = collect(ROOT / "docs/measured/ablation")
    text = (ROOT / "docs/dapo.md").read_text(encoding="utf-8")
    assert page.splice(text, page.section(results)) == text, "run python -m tests.benchmarks.ablation --page"


def test_arms_that_cannot_be_compared_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in [
        ([], "loop.max_tokens=0 is no budget to compare arms at: set it to a number of tokens."),
        (["loop.stpes=3"], "Unknown key 'loop.stpes' in 'loop.stpes=3': did you mean 'loop.steps'?"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["--recipe", "dapo/tiny", *arguments])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


# ---------------------------------------------------------------- one real call


def test_a_call_runs_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    text = f"{page.BEGIN}\n{page.END}\n"
    (tmp_path / "page.md").write_text(text)
    command = [
        sys.executable, "-m", "tests.benchmarks.ablation", "--recipe", "dapo/tiny",
        "--arms", "no_token_level", "--seeds", "3", "--out", str(tmp_path / "runs"),
        "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "page.md"),
        "loop.max_tokens=400", "evaluation.every=1",
    ]  # fmt: skip
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.startswith("1 of 1 runs are to be made.")
    made = read(path_of(tmp_path / "results", "no_token_level", 3))
    assert made is not None
    before, last = [0, *made.tokens][-2:]
    assert before < 400 <= last, "the step that reaches the budget is the last"
    assert made.evaluated_at == [0, *made.tokens]
    assert 0 <= made.accuracy_at(400) <= 1
    assert made.fired[SAMPLING][1] > made.fired[SAMPLING][0] >= 0
    assert 0 < made.fired[AGGREGATION][0] <= made.fired[AGGREGATION][1]
    assert not list((tmp_path / "runs").glob("*/checkpoints"))
    assert "without token-level loss (`seq_mean_token_mean`) | 3 |" in (tmp_path / "page.md").read_text()

    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.startswith("0 of 1 runs are to be made.")
    assert second.stdout.splitlines()[1:] == first.stdout.splitlines()[3:]
