"""`rlhf explain BENCHMARK`: what will be asked, how it is graded, and how sure the number can be."""

from __future__ import annotations

import math

from rlhf.evaluation.benchmark import BenchmarkConfig


def explain(recipe: str, config: BenchmarkConfig) -> str:
    """A few sentences; neither problems nor a model are loaded."""
    protocol, data = config.protocol, config.data
    grader = protocol.graders[data.answers.value]
    greedy = protocol.temperature == 0
    cut = f"top-p {protocol.top_p:g}, top-k {protocol.top_k or 'off'}"
    sampling = "greedy" if greedy else f"temperature {protocol.temperature:g}, {cut}"
    asked = f"the first {data.problems} problems" if data.problems else "every problem"
    worst = 0.5 / math.sqrt(30 * protocol.samples)
    by = f"the server {config.endpoint.url}" if config.endpoint.url else f"model.path={config.model.path}"
    return "\n".join(
        [
            f"{recipe}: {asked} of {data.path or 'data.path'}, answered by {by}",
            f"protocol {protocol.label}: {protocol.samples} responses to each, {sampling}, at most "
            f"{protocol.max_new_tokens} tokens ({protocol.samples * protocol.max_new_tokens:,} a problem)",
            f"prompt: {protocol.template!r}",
            f"grader: {grader.kind} {dict(grader.args) or ''}".rstrip(),
            "asked again, greedy answers are the same on one machine with the same rounds; for other "
            "problems like these they are one draw"
            if greedy
            else f"asked again, avg@{protocol.samples} of 30 problems has a standard error of up to "
            f"{worst:.1%}; for other problems like these it is larger, and more samples do not help",
        ]
    )
