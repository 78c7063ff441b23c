"""`BenchmarkConfig`: everything that one `rlhf eval BENCHMARK` is made of. A second root beside `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.compose import BENCHMARKS, RECIPES, load_as
from rlhf.data.config import DataConfig, SourceConfig
from rlhf.errors import UserError
from rlhf.evaluation.protocol import AnswerKind, ProtocolConfig
from rlhf.models import ModelConfig
from rollout.config import RolloutConfig


@dataclass
class BenchmarkRunConfig:
    """Where an evaluation lies and how it goes on."""

    dir: str = ""
    """Folder of the evaluation; empty names it `evaluations/BENCHMARK-PROTOCOL-...` after all that can move
    its numbers, so that the same command finds what it began."""
    seed: int = 0
    """Seeds every response, by a hash of seed, problem and number of the sample. At least 0."""
    round: int = 0
    """Responses that the engines are handed at once; what is saved, and lost when the evaluation is killed,
    goes by rounds. At least one problem; 0: twice what the engines decode at once."""

    def check(self) -> list[str]:
        """Sentences about values out of range."""
        return [
            f"run.{name}={getattr(self, name)} must be at least 0: raise it."
            for name in ("seed", "round")
            if getattr(self, name) < 0
        ]


@dataclass
class BenchmarkDataConfig:
    """The problems of a benchmark."""

    path: str = ""
    """Hub id, `.jsonl` or `.parquet` file, folder or pattern."""
    split: str = "test"
    """Split of a hub set; files have one. Slices such as `test[:100]` work for both."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of `datasets.load_dataset` (`{name: main}`)."""
    fields: dict[str, str] = field(default_factory=dict)
    """Columns of `prompt`, `answer` and `id`; what is left out is looked for under the usual names (problem,
    question, prompt; answer, final_answer, ground_truth). `answer_after: "####"` takes what follows a mark in
    an answer that has it."""
    answers: AnswerKind = AnswerKind.integer
    """`aime`, `integer` or `expression`: which of the protocol's graders judges."""
    problems: int = 0
    """Ask only this many, the first ones; 0 asks all. Then the score is not the benchmark's, which the stamp
    shows."""
    max_prompt_tokens: int = 4096
    """Longest rendered prompt in tokens; a longer one stops the evaluation. At least 1."""

    def check(self) -> list[str]:
        """Sentences about values that cannot work."""
        if not self.path:
            return ["data.path is empty: name a hub id or a .jsonl file."]
        found = []
        if self.problems < 0:
            found.append(f"data.problems={self.problems} is negative: set a number, or 0 for all.")
        if self.max_prompt_tokens < 1:
            found.append(f"data.max_prompt_tokens={self.max_prompt_tokens} must be at least 1: raise it.")
        data = DataConfig(sources={"benchmark": SourceConfig(path=self.path, fields=dict(self.fields))})
        return found + [sentence.replace("data.sources.benchmark.", "data.") for sentence in data.check()]


@dataclass
class EndpointConfig:
    """An OpenAI-compatible server that answers instead of our engines."""

    url: str = ""
    """Its base, `http://localhost:8000/v1`; empty: our own engines answer."""
    model: str = ""
    """The name that it serves the model (or adapter) under; empty: the only one it serves."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; none is sent when it is not set."""
    requests: int = 32
    """Requests in flight. At least 1."""
    timeout_s: float = 600.0
    """Seconds that one response may take. Above 0."""
    retries: int = 5
    """How often a request is sent again that failed for want of a connection, for a limit of rate, or for a
    fault of the server. At least 0."""

    def check(self) -> list[str]:
        """Sentences about values that cannot work."""
        found = []
        if self.url and not self.url.startswith(("http://", "https://")):
            found.append(f"endpoint.url={self.url} is no address: write http://host:port/v1.")
        if self.model and not self.url:
            found.append(f"endpoint.model={self.model} has no server: set endpoint.url, or use model.path.")
        if self.requests < 1:
            found.append(f"endpoint.requests={self.requests} must be at least 1: raise it.")
        if self.retries < 0:
            found.append(f"endpoint.retries={self.retries} must be at least 0: raise it.")
        if not self.timeout_s > 0:
            found.append(f"endpoint.timeout_s={self.timeout_s:g} must be above 0: raise it.")
        return found


@dataclass
class BenchmarkConfig:
    """One benchmark under one protocol, answered by one model."""

    run: BenchmarkRunConfig = field(default_factory=BenchmarkRunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    data: BenchmarkDataConfig = field(default_factory=BenchmarkDataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reproducibility: int = 0
    """Answer every problem greedily under this many settings of batch and threads (2 to 6), in bfloat16,
    LayerCast and float32, and report how much the responses differ. 0 evaluates once."""

    @property
    def longest_sequence(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self.data.max_prompt_tokens + self.protocol.max_new_tokens

    @property
    def round_size(self) -> int:
        """Responses handed over at once, before it is made whole problems."""
        return self.run.round or 2 * self.rollout.engines * self.rollout.max_num_seqs


def load(recipe: str, overrides: Sequence[str] = ()) -> BenchmarkConfig:
    """Compose a benchmark (`aime24`, `eval/aime24` or a file) with overrides, and check it.

    Raises `UserError` with one sentence that names the key, the value and the remedy.
    """
    return load_as(BenchmarkConfig, check, full_name(recipe), overrides)


def full_name(recipe: str) -> str:
    """`aime24` -> `eval/aime24`; whatever is no benchmark of ours stays as it is."""
    return BENCHMARKS + recipe if (RECIPES / BENCHMARKS / f"{recipe}.yaml").is_file() else recipe


def is_benchmark(recipe: str) -> bool:
    """Whether a recipe's name or file is a benchmark's and not a training recipe's."""
    if recipe.endswith(".yaml") and Path(recipe).is_file():
        return "protocol" in Path(recipe).read_text(encoding="utf-8", errors="replace")
    return full_name(recipe).startswith(BENCHMARKS)


def check(config: BenchmarkConfig) -> list[str]:
    """Every problem as one sentence each; empty when it can run."""
    sections = (
        config.run, config.model, config.endpoint, config.data, config.protocol, config.rollout
    )  # fmt: skip
    own = [sentence for section in sections for sentence in section.check()]
    return own or _across(config)


def _across(config: BenchmarkConfig) -> list[str]:
    answers, protocol, plain = config.data.answers.value, config.protocol, RolloutConfig()
    found = [
        f"rollout.{name}={getattr(config.rollout, name)} is how training samples: set protocol.{name}."
        for name in ("temperature", "top_p", "max_new_tokens", "stop")
        if getattr(config.rollout, name) != getattr(plain, name)
    ]
    if answers not in protocol.graders:
        found.append(
            f"protocol.graders has none for data.answers={answers}: set protocol.graders.{answers}.kind."
        )
    else:
        sentences = protocol.reward(config.data.answers).check()
        found += [text.replace("reward.parts.answer.", f"protocol.graders.{answers}.") for text in sentences]
    if config.model.init_from:
        found.append(
            f"model.init_from={config.model.init_from} is where training begins: to evaluate that checkpoint "
            f"set model.path={config.model.init_from} and leave model.init_from empty."
        )
    if 0 < config.rollout.max_model_len < config.longest_sequence:
        found.append(
            f"rollout.max_model_len={config.rollout.max_model_len} is shorter than data.max_prompt_tokens + "
            f"protocol.max_new_tokens = {config.longest_sequence}: raise it or set 0."
        )
    return found


def refuse_training_recipe(recipe: str) -> None:
    """Raises `UserError` for `rlhf train` of a benchmark."""
    if is_benchmark(recipe):
        raise UserError(
            f"'{recipe}' is a benchmark, which `rlhf eval` runs: train a recipe of `rlhf recipes`."
        )
