"""The one naming table: what every metric of a run means, and in what unit.

`docs/metrics.md` is printed from it (`python -m rlhf.metrics > docs/metrics.md`); a test compares the two.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. A `<placeholder>` in the name stands for letters, digits, `_`, `-` and `.`."""

    name: str
    unit: str
    meaning: str

    @property
    def section(self) -> str:
        """What stands before the slash."""
        return self.name.partition("/")[0]


SECTIONS = {
    "train": "Everything generated in the step, before selection",
    "reward": "Reward parts and graders, over everything generated",
    "selection": "Dynamic sampling",
    "length": "Responses generated in the step",
    "policy": "The loss, over the tokens learned from",
    "mismatch": "Learner against engine on the same tokens",
    "learner": "The update",
    "rollout": "The engines",
    "weights": "Publishing weights to the engines",
    "staleness": "How old the experience is",
    "ahead": "Generation beside learning (`loop.staleness` above 0), by a clock of its own",
    "eval": "The problems of `evaluation.split`, with their own sampling settings",
    "throughput": "Speed",
    "time": "Where the step's seconds went; phases and `time/other` add up to `time/step`",
    "memory": "What the processes hold",
    "tracking": "The trackers themselves",
}

_ROWS = """
train/accuracy | share | right responses (raw correctness, never shaped)
train/reward | reward | mean of what advantages are computed from: the weighted, shaped sum of the parts
train/reward_std | reward | its standard deviation over responses
train/format | share | responses that ended and from which an answer could be read
train/responses | responses | responses generated
train/empty_responses | responses | kept responses without a token to learn from (masked, aborted or empty)
train/tokens | tokens | response tokens generated since the start of the run, evaluations not counted
train/prompts | prompts | prompts consumed since the start of the run
train/epoch | epochs | passes over the training prompts so far

reward/<part>_mean | reward | mean of a named part before its weight
reward/<part>_std | reward | its standard deviation over responses
reward/<part>_no_answer | responses | responses in which the part found no answer
reward/<part>_gold_unparsable | responses | responses whose own reference answer is unreadable
reward/<part>_timeout | responses | gradings stopped at their time limit
reward/<part>_error | responses | gradings that failed
reward/replaced_workers | processes | grading processes that were killed or died and were replaced

selection/offered | groups | groups generated and looked at in the step
selection/kept | groups | groups learned from
selection/missing | groups | groups that the batch lacks because the cap or the data ran out
selection/rounds | rounds | generation rounds until the batch was full
selection/carried_in | groups | groups kept back by the step before
selection/carried_out | groups | groups kept back for the next step
selection/dropped_<reason> | groups | groups dropped, by reason: `all_wrong`, `surplus`, `stale`, ...
selection/acceptance | share | groups offered that teach something
selection/zero_variance | share | groups offered whose responses all have the same accuracy
selection/all_wrong | share | groups offered whose responses are all wrong
selection/all_right | share | groups offered whose responses are all right

length/mean | tokens | mean response length, end token included
length/p95 | tokens | 95th percentile
length/max | tokens | longest response
length/right_mean | tokens | mean length of right responses
length/wrong_mean | tokens | mean length of wrong responses
length/prompt_mean | tokens | mean prompt length
length/truncated | share | responses cut at the limit

policy/loss | loss | the loss that was differentiated
policy/entropy | nats | mean entropy of the sampling distribution
policy/token_prob | probability | mean probability of the tokens learned from
policy/ratio | ratio | mean of new over old probability
policy/ratio_max | ratio | largest such ratio
policy/clip_low | share | tokens whose gradient the lower clip removed (advantage below 0)
policy/clip_high | share | tokens whose gradient the upper clip removed (advantage above 0)
policy/clip_spared | share | tokens that clip.high let through and a bound of clip.low would have stopped
policy/clip_dual | share | tokens whose gradient the dual clip removed
policy/up_clipped_prob | probability | mean probability of the tokens that the upper clip stopped
policy/kl_old_k1 | nats | k1 estimate of KL(old, new)
policy/kl_old_k3 | nats | k3 estimate of KL(old, new)
policy/kl_reference | nats | estimate of KL(new, reference), when a reference is used

mismatch/logprob_gap | nats | mean of |learner log-prob - engine log-prob|
mismatch/logprob_gap_max | nats | largest such gap
mismatch/prob_gap | probability | mean of |learner probability - engine probability|
mismatch/prob_gap_max | probability | largest such gap
mismatch/kl | nats | k3 estimate of KL(engine, learner)
mismatch/weight | weight | mean correction weight
mismatch/weight_square | weight | mean of its square
mismatch/weight_bounded | share | tokens whose correction weight met a bound
mismatch/ess | share | effective sample size of the correction weights: 1 when all are equal

learner/grad_norm | norm | gradient norm before clipping
learner/lr | rate | learning rate of the step
learner/optimizer_steps | steps | optimizer steps since the start of the run
learner/skipped_steps | steps | optimizer steps dropped so far (`learner.on_nonfinite=skip`)
learner/micro_batches | batches | packed micro-batches of an optimizer step, on the rank that has most
learner/tokens | tokens | tokens computed, shared prompts counted once
learner/prompt_saving | share | tokens saved by computing a group's prompt once

rollout/engine_restarts | restarts | engines started again so far (`rollout.restarts` above 0)

weights/version | version | version installed in the engines
weights/bytes | bytes | bytes transferred
weights/merge_gap | share | share of the adapter's update that rounding loses when it is merged (LoRA only)
weights/unchanged | tensors | tensors that did not change since the last version
weights/read_back | places | places read back out of the live model; 0 where the transport cannot
weights/probe_gap_mean | nats | mean |learner - engine| log-prob on the probe after the publish
weights/probe_gap_max | nats | largest such gap; beyond the tolerance the run stops
weights/<phase>_seconds | seconds | one phase of the publish: gather, transfer, hash, install, readback, probe

staleness/mean | versions | mean age of the groups learned from: versions published since they were generated
staleness/max | versions | age of the oldest of them
staleness/token_mean | versions | mean age of the tokens learned from: newest version minus their own
staleness/token_max | versions | age of the oldest of them

ahead/rollout_seconds | seconds | generation of this step's groups
ahead/reward_seconds | seconds | grading them
ahead/wait_seconds | seconds | its waiting for engines that took weights or answered an evaluation
ahead/bound_seconds | seconds | its waiting for learning, `loop.staleness` steps behind, before it began
ahead/other_seconds | seconds | its drawing and selecting
ahead/ready | steps | further steps whose groups were complete when this one took its own

eval/accuracy | share | prompts answered right under the strict rule
eval/accuracy_low | share | lower end of the 95 % Wilson interval
eval/accuracy_high | share | upper end of the 95 % Wilson interval
eval/accuracy_se | share | standard error of the accuracy
eval/any_mention | share | right answer mentioned anywhere in the response, where all answers are integers
eval/format | share | responses that ended and from which an answer could be read
eval/reward | reward | mean weighted reward
eval/length_mean | tokens | mean response length
eval/truncated | share | responses cut at the limit
eval/ungraded | responses | aborted by the engine or not gradable; counted as wrong
eval/prompts | prompts | prompts answered

throughput/generated | tokens/s | generated tokens over the seconds of rollout
throughput/learned | tokens/s | tokens computed over the seconds of update
throughput/total | tokens/s | generated tokens over the seconds of the step

time/rollout | seconds | generation
time/reward | seconds | grading
time/wait | seconds | waiting for groups, or for engines in the middle of a round
time/batching | seconds | advantages and rows
time/logprobs | seconds | old and reference log-probs
time/update | seconds | forward, backward, optimizer
time/publish | seconds | weight transfer and probe
time/record | seconds | writing rollouts
time/evaluation | seconds | answering and grading the problems of `evaluation.split`
time/checkpoint | seconds | saving the checkpoint of the step before
time/tracking | seconds | the trackers
time/other | seconds | everything outside a named phase
time/step | seconds | the whole step
time/elapsed | seconds | wall clock since training began, evaluation included

memory/pss | bytes | resident memory of all processes of the run, shared pages counted once
memory/peak_pss | bytes | highest seen in the step
memory/rss | bytes | resident memory of all processes, shared pages counted in each
memory/rss_driver | bytes | resident memory of the main process
memory/processes | processes | processes of the run
memory/peak_<phase> | bytes | highest memory/rss sampled in a phase
memory/device_allocated | bytes | allocated on the CUDA device by the main process
memory/device_peak | bytes | highest in the step

tracking/failures | calls | tracker calls that failed so far; the run goes on
"""


def _parse(rows: str) -> tuple[Metric, ...]:
    return tuple(Metric(*(cell.strip() for cell in row.split("|", 2))) for row in rows.splitlines() if row)


METRICS = _parse(_ROWS)
"""Every metric of a run."""


@cache
def lookup(name: str) -> Metric | None:
    """The table's row for `name`; an exact name goes before a pattern. None when it is not in the table."""
    exact = next((metric for metric in METRICS if metric.name == name), None)
    return exact or next((metric for metric in METRICS if _pattern(metric.name).fullmatch(name)), None)


def unknown(names: Iterable[str]) -> list[str]:
    """Those of `names` that the table does not know, in order."""
    return [name for name in names if lookup(name) is None]


def check(names: Iterable[str]) -> None:
    """Raise `ValueError` when a name is not in the table, naming the nearest one that is."""
    for name in unknown(names):
        near = difflib.get_close_matches(name, [metric.name for metric in METRICS], n=1, cutoff=0.0)[0]
        raise ValueError(f"metric '{name}' is not in rlhf/metrics.py: did you mean '{near}'? Else add a row.")


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """`reward/<part>_mean` -> a pattern in which `<part>` is one or more name characters."""
    pieces = re.split(r"<\w+>", name)
    return re.compile(r"[\w.\-]+".join(re.escape(piece) for piece in pieces))


def show(name: str, value: float) -> str:
    """A value as a reader wants it, by the unit of its metric: `41.2 %`, `8.1 s`, `1.5 GiB`, `0.00312`."""
    metric = lookup(name)
    unit = metric.unit if metric else ""
    if not math.isfinite(value):
        return str(value)
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB"
    if unit == "seconds":
        return duration(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`0.24 s`, `8.1 s`, `75 s`, `12 min 5 s`, `3 h 2 min`."""
    if seconds < 100:
        return (
            f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
        )
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def markdown() -> str:
    """The table as `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Every number that a run logs, by name. `metrics.jsonl` holds one object a step with these names",
        "beside `step` and `timestamp` (Unix seconds). A number that is not finite is written as `null`, and",
        '`nonfinite` says which it was (`"nan"`, `"inf"` or `"-inf"`). A metric that does not apply to a',
        "step is absent.",
        "",
        "This page is printed from `rlhf/metrics.py`: `python -m rlhf.metrics > docs/metrics.md`.",
    ]
    for section, title in SECTIONS.items():
        lines += ["", f"## {section}: {title}", "", "| name | unit | meaning |", "|---|---|---|"]
        rows = [metric for metric in METRICS if metric.section == section]
        lines += [
            f"| `{row.name}` | {row.unit} | {row.meaning.replace('|', chr(92) + '|')} |" for row in rows
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
