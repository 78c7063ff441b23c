"""`Learner`: rows in, better weights out. Owns policy, optimizer and schedule; knows no algorithm."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer.batch import Row, TokenBatch
from trainer.config import Device, LearnerConfig, Precision
from trainer.errors import NonFiniteError
from trainer.loss import Loss, LossInputs, LossOutput
from trainer.memory.checkpointing import checkpoint_layers
from trainer.memory.offload import StateOffload
from trainer.model import WeightStream, freeze, hub_names, save_model
from trainer.numerics import require_exact_products, require_float32, upcast_forwards
from trainer.optimizers import build_optimizer
from trainer.packing import pack
from trainer.policy import Policy, PolicyOutput
from trainer.ranks import Alone, Like, Ranks
from trainer.schedules import lr_factor
from trainer.skipping import SkippedSteps
from trainer.step_report import StepReport

if TYPE_CHECKING:
    from adapters.lora import LoraModel

ALONE = Alone()
DTYPES = {Precision.float32: torch.float32, Precision.bfloat16: torch.bfloat16}


class Learner:
    """Trains one policy, on this process alone or as one of several ranks.

    Ranks make the same calls in the same order (see `trainer.parallel.leader`), each with rows of its own.
    The model is taken over: cast, moved, perhaps given adapters. Nothing else may change it afterwards.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: PreTrainedModel,
        *,
        loss: Loss,
        temperature: float,
        total_steps: int,
        seed: int,
        needs_reference: bool = False,
        adapter: Path | None = None,
        ranks: Ranks = ALONE,
        traces: Path = Path("profile"),
        layercast: bool = False,
    ) -> None:
        """Set up for `total_steps` rollout steps.

        Args:
            config: see `LearnerConfig`.
            model: float32 (see `trainer.model.load_model`) or in the precision to train in.
            loss: called once a micro-batch.
            temperature: of sampling; log-probs are taken at it.
            total_steps: rollout steps of the run, for the schedule.
            seed: draws fresh adapter weights.
            needs_reference: keep what `reference_logprobs` needs (a frozen copy in full fine-tuning).
            adapter: PEFT folder to continue.
            ranks: the processes that hold this learner together.
            traces: folder of what `config.profile` asks for.
            layercast: compute in float32 with weights rounded to `config.dtype`, see `trainer.numerics`.

        Raises:
            ValueError: a setting does not fit the model.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.ranks = ranks
        self._traces = traces
        self.temperature = temperature
        self.total_steps = total_steps
        self.loss = loss
        self.dtype = DTYPES[config.dtype]
        self.device = device_of(config.device)
        self.rollout_step = 0
        self.optimizer_steps = 0
        self._skipped = SkippedSteps(config.on_nonfinite)
        _refuse_on_cpu(config, self.device)
        self._state_offload = StateOffload.of(config.memory, self.device)
        model.to(self.device)  # type: ignore[arg-type]
        self.policy = Policy(model, config.share_prompts)
        self._lora = _add_lora(config, model, seed, adapter)
        self._reference = copy.deepcopy(self.policy) if needs_reference and self._lora is None else None
        self._has_reference = needs_reference
        if self._reference is not None:
            ranks.place(self._reference.requires_grad_(False), self.dtype)
        freeze(self.policy, config.freeze)
        checkpoint_layers(model, config.memory.activation_checkpointing, config.memory.offload_activations)
        if config.compile:
            self.policy.compile_layers()
        self.master = ranks.place(self.policy, self.dtype)
        self.optimizer = build_optimizer(config.optimizer, self.master.named)
        if layercast:
            self._compute_in_float32()

    def _compute_in_float32(self) -> None:
        """Upcast weights where they are used, and see on two tokens that nothing else is left narrow."""
        if self._lora is not None:
            raise ValueError(
                "rollout.numerics=layercast does not train adapters: engines round base and adapter to "
                "bfloat16 together, which the learner does not; set rollout.numerics=standard."
            )
        require_exact_products(self.device)
        for policy in filter(None, (self.policy, self._reference)):
            upcast_forwards(policy)
            with torch.no_grad(), require_float32(policy.model):
                policy(_idle_batch().to(self.device))
            self.ranks.rest(policy)

    @property
    def lr(self) -> float:
        """The rate of the current rollout step."""
        return self.config.optimizer.lr * lr_factor(self.config.schedule, self.rollout_step, self.total_steps)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, a fresh one or one that is continued, and the model is frozen."""
        return self._lora is not None

    def update(self, minibatches: Sequence[Sequence[Row]]) -> list[dict[str, float]]:
        """One optimizer step a mini-batch, in order; metrics of each.

        Raises:
            NonFiniteError: a loss or gradient is not finite; that step is not taken. With
                `learner.on_nonfinite=skip` only after too many in a row.
            ValueError: rows that do not fit together, see `trainer.packing.pack`.
        """
        self._state_offload.reload()
        with self._profile():
            return [self._step(rows) for rows in minibatches]

    def end_rollout(self) -> None:
        """Move the schedule on by one rollout step."""
        self.rollout_step += 1

    def offload(self) -> None:
        """Put weights and optimizer states where `learner.memory.offload_state` says, and what they took is
        free: for the time in which engines generate. Whichever call needs them next brings them back."""
        self._state_offload.offload(self._held())

    def _held(self) -> Iterator[Tensor]:
        """This process's part of everything that stays between calls; some of it more than once."""
        for policy in filter(None, (self.policy, self._reference)):
            yield from (self.ranks.part(parameter.detach()) for parameter in policy.parameters())
        yield from (parameter.detach() for parameter in self.master.parameters)
        yield from self.optimizer.tensors()

    def _step(self, rows: Sequence[Row]) -> dict[str, float]:
        batches = pack(rows, self.config.token_budget, self.policy.shares_prompts)
        own = StepReport.of(batches)
        self.master.zero_grad()
        self._accumulate([batch for batch in batches if bool(batch.token_weights.any())], own)
        total = StepReport.join(self.ranks.exchange(own.plain()))
        metrics = total.batch_metrics()
        try:
            metrics |= self._finish(total)
        except NonFiniteError as error:
            self.master.zero_grad()
            self._skipped.drop(error)
        metrics["learner/lr"] = self.lr
        metrics["learner/optimizer_steps"] = self.optimizer_steps
        return metrics | self._skipped.metrics()

    def _accumulate(self, batches: Sequence[TokenBatch], report: StepReport) -> None:
        """Add up the gradients of this rank's micro-batches, then keep step with ranks that have more."""
        rounds = self.ranks.most(len(batches))
        for number in range(rounds):
            self.ranks.defer(self.policy, more=number < rounds - 1)
            if number >= len(batches):
                _vanish(self.policy(_idle_batch().to(self.device)))
                continue
            try:
                report.add(self._backward(batches[number]))
            except NonFiniteError as error:
                report.problem = report.problem or str(error)

    def _finish(self, report: StepReport) -> dict[str, float]:
        """Step, when all ranks' micro-batches went well and there were any."""
        if report.problem:
            raise NonFiniteError(report.problem)
        metrics = report.loss_metrics()
        if report.learning:
            metrics["learner/grad_norm"] = self._optimize()
            self._skipped.taken()
        return metrics

    def _backward(self, batch: TokenBatch) -> LossOutput:
        """Forward, loss and backward of one micro-batch; gradients are added up.

        Raises NonFiniteError for a loss that is not finite, after a backward pass that adds nothing: other
        ranks wait for it.
        """
        batch = batch.to(self.device)
        output = self.policy(batch, self.temperature, getattr(self.loss, "needs_entropy_gradient", False))
        result = self.loss(_loss_inputs(batch, output))
        if not torch.isfinite(result.loss):
            _vanish(output)
            raise NonFiniteError(
                f"The loss is {result.loss.item()} in optimizer step {self.optimizer_steps + 1}: "
                f"{_first_odd(output)}: look at the rewards of this step, start anew with a lower "
                "learner.optimizer.lr"
            )
        (result.loss * self.ranks.size).backward()
        return result

    def _optimize(self) -> float:
        """Clip, step and install; returns the norm before clipping."""
        norm = self.master.norm()
        if not torch.isfinite(norm):
            odd = [name for found in self.ranks.exchange({"odd": self.master.odd()}) for name in found["odd"]]
            raise NonFiniteError(
                f"The gradient norm is {norm.item()} in optimizer step {self.optimizer_steps + 1}, first in "
                f"{odd[0] if odd else 'the sum of all'}: start anew with a lower learner.optimizer.lr or "
                "learner.dtype=float32"
            )
        limit = self.config.max_grad_norm
        if limit and norm > limit:
            torch._foreach_mul_(self.master.gradients, limit / norm.item())
        self.optimizer.set_lr(self.lr)
        self.optimizer.step()
        self.master.install()
        self.master.zero_grad()
        self.optimizer_steps += 1
        return norm.item()

    def logprobs(self, rows: Sequence[Row]) -> list[list[float]]:
        """Log-probs of every response token under the current weights, at the learner's temperature."""
        return self.score_rows(rows, self.temperature)

    def reference_logprobs(self, rows: Sequence[Row]) -> list[list[float]]:
        """The same under the frozen reference: the first weights, or under LoRA the base without adapter.

        Raises:
            ValueError: the learner was built without `needs_reference`.
        """
        if not self._has_reference:
            raise ValueError(
                "Reference log-probs were asked for, but the learner was built without a reference."
            )
        policy = self._reference or self.policy
        without_adapter: AbstractContextManager[None] = self._lora.disabled() if self._lora else nullcontext()
        with without_adapter:
            return self._score_rows(policy, rows, self.temperature)

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of `tokens[1:]` given what precedes, as `Engine.score`; for the probe after a publish."""
        return self.score_rows([_score_row(i, tokens) for i, tokens in enumerate(sequences)], temperature)

    def score_rows(self, rows: Sequence[Row], temperature: float) -> list[list[float]]:
        """Log-probs of every response token under the current weights, at any temperature."""
        return self._score_rows(self.policy, rows, temperature)

    @torch.no_grad()
    def _score_rows(self, policy: Policy, rows: Sequence[Row], temperature: float) -> list[list[float]]:
        self._state_offload.reload()
        scores: list[list[float]] = [[] for _ in rows]
        batches = pack(rows, self.config.token_budget, policy.shares_prompts)
        rounds = self.ranks.most(len(batches))
        for batch in batches:
            logprobs = policy(batch.to(self.device), temperature).logprobs.cpu()
            lengths = torch.bincount(batch.row_ids, minlength=batch.rows).tolist()
            for index, values in zip(batch.row_indices, logprobs.split(lengths)):
                scores[index] = values.tolist()
        for _ in range(rounds - len(batches)):
            policy(_idle_batch().to(self.device))
        self.ranks.rest(policy)
        return scores

    def weights(self, dtype: torch.dtype | None = None) -> WeightStream:
        """Every weight under its Hugging Face name, adapters merged.

        `dtype` is the compute precision when None. Without adapters and casts the tensors are the policy's
        own memory, not copies.
        """
        return WeightStream(lambda: self._named_weights(dtype or self.dtype))

    def _named_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        self._state_offload.reload()
        model = self.policy.model
        whole = self.ranks.whole
        if self._lora is not None:
            plain = self._lora.merged(dtype, self._adapter_masters(), whole)
        else:
            plain = ((name, whole(p.detach().to(dtype))) for name, p in model.named_parameters())
        yield from hub_names(model, plain)

    def adapter_weights(self) -> dict[str, Tensor]:
        """The adapter's weights in float32, under the model's parameter names."""
        return self._adapter_masters()

    def _adapter_masters(self) -> dict[str, Tensor]:
        self._state_offload.reload()
        masters = self.master.state_dict().items()
        return {name.removeprefix("model."): self.ranks.whole(tensor) for name, tensor in masters}

    def merge_gap(self, dtype: torch.dtype | None = None) -> float:
        """Share of the adapter's update that rounding loses when published; 0 in full fine-tuning."""
        if self._lora is None:
            return 0.0
        return self._lora.merge_gap(dtype or self.dtype, self._adapter_masters(), self.ranks.whole)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write a Hugging Face folder with merged weights; under LoRA also `folder/adapter`, in float32."""
        save_model(self.policy.model, self.weights(), folder)
        tokenizer.save_pretrained(folder)
        if self._lora is not None:
            self._lora.save(folder / "adapter", self.adapter_weights())

    def close(self) -> None:
        """Let go of what was put elsewhere, and of other ranks; one process has none."""
        self._state_offload.close()

    def state_dict(self) -> dict[str, Any]:
        """Trained weights in float32, optimizer, counters: what a resumed learner needs beside its model."""
        self._state_offload.reload()
        state = {
            "weights": self.master.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rollout_step": self.rollout_step,
            "optimizer_steps": self.optimizer_steps,
            "skipped": self._skipped.state_dict(),
        }
        return self.ranks.collect(state, self._like())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of a learner with the same config and model, of any number of ranks."""
        self._state_offload.reload()
        state = self.ranks.spread(state, self._like())
        self.master.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rollout_step = state["rollout_step"]
        self.optimizer_steps = state["optimizer_steps"]
        self._skipped.load_state_dict(state.get("skipped", {}))  # older checkpoints have none

    def _like(self) -> Like:
        """The module's parameters by where in `state_dict()` they, or what has their shape, lie."""
        working = dict(zip(map(id, self.master.parameters), self.master.working))
        moments = {path: working[id(parameter)] for path, parameter in self.optimizer.places().items()}
        weights = {("weights", name): p for name, p in zip(self.master.names, self.master.working)}
        return {**weights, **{("optimizer", *path): parameter for path, parameter in moments.items()}}

    @contextmanager
    def _profile(self) -> Iterator[None]:
        """Trace the update of the rollout steps that `learner.profile.steps` names."""
        if self.rollout_step not in self.config.profile.steps:
            yield
            return
        self._traces.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as profiler:
            yield
        profiler.export_chrome_trace(str(self._traces / f"update-{self.rollout_step:06d}.json"))


def device_of(wanted: Device) -> torch.device:
    """Raises ValueError when CUDA is asked for and missing."""
    available = torch.cuda.is_available()
    if wanted is Device.cuda and not available:
        raise ValueError(
            "learner.device=cuda, but torch sees no CUDA device: set learner.device=cpu or auto."
        )
    return torch.device("cuda" if available and wanted is not Device.cpu else "cpu")


def _refuse_on_cpu(config: LearnerConfig, device: torch.device) -> None:
    if config.memory.offload_activations and device.type == "cpu":
        raise ValueError(
            "learner.memory.offload_activations=true moves activations from a GPU to the host's memory, "
            "where those of a learner on a CPU are already: set it to false."
        )


def _add_lora(
    config: LearnerConfig, model: PreTrainedModel, seed: int, adapter: Path | None
) -> LoraModel | None:
    if not config.lora.rank and adapter is None:
        return None
    from adapters import lora

    if adapter is not None:
        return lora.load(model, adapter)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lora.wrap(model, config.lora.rank, config.lora.alpha, config.lora.targets)


def _loss_inputs(batch: TokenBatch, output: PolicyOutput) -> LossInputs:
    old = batch.old_logprobs
    return LossInputs(
        logprobs=output.logprobs,
        entropy=output.entropy,
        old_logprobs=output.logprobs.detach() if old is None else old,
        rollout_logprobs=batch.rollout_logprobs,
        advantages=batch.advantages,
        token_weights=batch.token_weights,
        row_ids=batch.row_ids,
        rows=batch.rows,
        reference_logprobs=batch.reference_logprobs,
    )


def _first_odd(output: PolicyOutput) -> str:
    if not torch.isfinite(output.logprobs).all():
        return "the policy's log-probs are not finite"
    return "log-probs are finite, so advantages, old log-probs or the loss itself are not"


def _vanish(output: PolicyOutput) -> None:
    """A backward pass whose gradient is zero."""
    (output.logprobs.sum() * 0.0).backward()


def _idle_batch() -> TokenBatch:
    """The smallest micro-batch there is, for a rank that has none left."""
    (batch,) = pack([_score_row(0, [0, 0])], token_budget=1, share_prompts=True)
    return batch


def _score_row(index: int, tokens: Sequence[int]) -> Row:
    response = list(tokens[1:])
    zeros = [0.0] * len(response)
    return Row(
        prompt_ids=list(tokens[:1]),
        response_ids=response,
        group=index,
        advantages=zeros,
        token_weights=zeros,
        rollout_logprobs=zeros,
    )
