"""`model.init_from=RUN@STEP`: a new run begins with the trained weights of another run's checkpoint.

Only weights come over: no optimizer, no step, no position in the data. They come in full precision: the
float32 master weights of the checkpoint's training state. From its exported model come those tensors alone
that were frozen, which it holds in the precision that the run computed with. Imports torch only where weights
are moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import resume, run_steps
from rlhf.checkpoint import MANIFEST, STATE, Checkpoints
from rlhf.config import Config
from rlhf.errors import UserError
from rlhf.files import replace_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.models import ResolvedModel
    from trainer.learner import Learner

RECORD = "initial_weights.json"
"""File of a run's folder that says where its weights came from."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every tensor by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """A whole checkpoint of another run, from which weights are taken."""

    name: str
    """`RUN@STEP` as it was given."""
    checkpoint: Path
    digest: str
    """BLAKE2b of the checkpoint's manifest, which holds a checksum of every file."""
    adapter: bool
    """Whether what was trained is a LoRA adapter."""


def find(config: Config, runs: Path = Path("runs")) -> InitialWeights | None:
    """What `model.init_from` names, every checksum right; None when it names nothing.

    Raises `UserError` when it is not there or damaged, or when one run trains an adapter and the other does
    not.
    """
    name = config.model.init_from
    if not name:
        return None
    where = run_steps.find(name, f"model.init_from={name}", runs)
    checkpoints = Checkpoints(where.folder)
    problem = checkpoints.problem(where.step)
    if problem:
        whole = [str(step) for step in checkpoints.steps() if not checkpoints.problem(step)]
        raise UserError(
            f"model.init_from={name}: the checkpoint {checkpoints.path(where.step)} cannot be used, "
            f"{problem}: whole checkpoints are {', '.join(whole) or 'none'}."
        )
    folder = checkpoints.path(where.step)
    adapter = folder / "adapter" / "adapter_config.json"
    _check_kind(config, name, adapter if adapter.is_file() else None)
    if adapter.is_file():
        _check_base(config, name, resume.recorded(where.folder))
    digest = hashlib.blake2b((folder / STATE / MANIFEST).read_bytes(), digest_size=16).hexdigest()
    return InitialWeights(name=name, checkpoint=folder.resolve(), digest=digest, adapter=adapter.is_file())


def attach(resolved: ResolvedModel, config: Config, runs: Path = Path("runs")) -> ResolvedModel:
    """`resolved` with the weights that `model.init_from` names. Raises `UserError` as `find`, and when the
    checkpoint's model is another one."""
    initial = find(config, runs)
    if initial is None:
        return resolved
    if resolved.adapter is not None:
        raise UserError(
            f"model.init_from={initial.name} and model.path={config.model.path} both bring an adapter: name "
            f"the base model as model.path."
        )
    from trainer.model import parameter_shapes

    ours, theirs = (
        parameter_shapes(folder, trust_remote_code=resolved.trust_remote_code)
        for folder in (resolved.folder, initial.checkpoint)
    )
    _refuse_other(initial.name, f"model.path={config.model.path}", ours, theirs)
    described = f"{resolved.description}, trained weights of {initial.name} ({initial.checkpoint})"
    return dataclasses.replace(resolved, initial=initial, description=described)


def load(resolved: ResolvedModel) -> PreTrainedModel:
    """The model that a learner is given, in float32; what an adapter holds is put in by `install_adapter`."""
    from trainer.model import load_model

    initial, code = resolved.initial, resolved.trust_remote_code
    if initial is None or initial.adapter:
        return load_model(resolved.folder, trust_remote_code=code)
    import torch

    model = load_model(initial.checkpoint, trust_remote_code=code)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, master in _masters(initial).items():
            parameters[name.removeprefix("model.")].copy_(master)
    return model


def install_adapter(resolved: ResolvedModel, learner: Learner) -> None:
    """Put the checkpoint's adapter into a learner that was built with a fresh one; otherwise do nothing."""
    initial = resolved.initial
    if initial is None or not initial.adapter:
        return
    masters = _masters(initial)
    _refuse_other(
        initial.name, "the adapter of learner.lora", shapes(learner.master.state_dict()), shapes(masters)
    )
    learner.master.load_state_dict(masters)


def agree(initial: InitialWeights | None, folder: Path) -> None:
    """Refuse, with `UserError`, to go on in a run's folder that was begun with other weights."""
    path = folder / RECORD
    if initial is None or not path.is_file():
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    if then["manifest"] != initial.digest:
        raise UserError(
            f"model.init_from={initial.name}: {initial.checkpoint} is not the checkpoint that {folder} began "
            f"with, it was written anew since: start a new run in another run.dir."
        )


def write(initial: InitialWeights | None, folder: Path) -> None:
    """Write into a run's folder where its weights came from."""
    if initial is not None:
        record = {
            "init_from": initial.name,
            "checkpoint": str(initial.checkpoint),
            "manifest": initial.digest,
            "trained": "adapter" if initial.adapter else "model",
            "precision": "float32",
        }
        replace_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def first_difference(ours: Shapes, theirs: Shapes) -> str:
    """The first tensor in which two models differ, as a clause; empty when names and shapes are the same."""
    for name in sorted({*ours, *theirs}):
        here, there = ours.get(name), theirs.get(name)
        if here is None or there is None:
            return f"{name} is only in the {'checkpoint' if here is None else 'model'}"
        if here != there:
            return f"{name} is {list(here)}, in the checkpoint {list(there)}"
    return ""


def _masters(initial: InitialWeights) -> dict[str, Any]:
    """The checkpoint's trained weights in float32, by the learner's names."""
    from rlhf import state_file

    masters: dict[str, Any] = state_file.read(initial.checkpoint / STATE)["learner"]["weights"]
    return masters


def _refuse_other(name: str, what: str, ours: Shapes, theirs: Shapes) -> None:
    difference = first_difference(ours, theirs)
    if difference:
        raise UserError(
            f"model.init_from={name} does not fit {what}: {difference}: name a checkpoint of the same model."
        )


def _check_kind(config: Config, name: str, adapter: Path | None) -> None:
    """LoRA goes on as LoRA of the same rank and scale, full fine-tuning as full fine-tuning."""
    lora = config.learner.lora
    if adapter is None:
        if lora.rank:
            raise UserError(
                f"model.init_from={name} trained the whole model but learner.lora.rank={lora.rank} trains an "
                f"adapter: set model.path={name} for a fresh adapter on that model."
            )
        return
    if not lora.rank:
        raise UserError(
            f"model.init_from={name} trained an adapter but learner.lora.rank=0 trains the whole model: set "
            f"model.path={name} to begin with the merged model."
        )
    saved = json.loads(adapter.read_text(encoding="utf-8"))
    for key, then in (("rank", saved["r"]), ("alpha", saved["lora_alpha"])):
        now = getattr(lora, key)
        if now != then:
            raise UserError(
                f"learner.lora.{key}={now} is not that of model.init_from={name}: set "
                f"learner.lora.{key}={then}."
            )


def _check_base(config: Config, name: str, then: Mapping[str, Any]) -> None:
    """An adapter means something on the model that it was trained on alone."""
    base = then.get("model", {}).get("path", "")
    if base != config.model.path:
        raise UserError(
            f"model.path={config.model.path} is not the model that the adapter of model.init_from={name} was "
            f"trained on: set model.path={base}."
        )
