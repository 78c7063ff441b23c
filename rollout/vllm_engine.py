"""`VllmEngine`: vLLM in this process, token ids in, token ids and behaviour log-probs out.

vLLM is imported when an engine is built, never with this module. What an in-process engine does to the
process that holds it, and what is undone here:

- it reseeds the global random generators, at the start and while sampling: saved and put back around each
  call;
- it replaces `torch.set_num_threads` by a function that does nothing: put back, and `EngineSpec.threads`
  holds only while the engine works;
- it sets `LD_PRELOAD` and `LOCAL_WORLD_SIZE` for processes of its own: put back;
- it opens a one-member gloo process group, which stays for the engine's life. A learner with several ranks
  must therefore use `rollout.child_engine.ChildEngine`; building an engine where a process group exists is
  refused.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rollout.engine import Completion, Request, Sampling
from rollout.engine_spec import (
    CPU_BLOCK,
    EngineSpec,
    kv_cache_bytes,
    max_positions,
    text_config,
    thread_count,
)
from rollout.errors import LOADING, EngineError, engine_failures
from rollout.peak import peak_bytes
from rollout.types import FinishReason, VersionSpan

CPU_STEP_TOKENS = 2048
"""Most tokens of one step on a CPU: vLLM warms a compiled model up with that many, and more gain nothing."""

PROCESS_VARIABLES = ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
"""Variables that vLLM sets for processes of its own; the process that holds it gets its own values back."""

NUMERICS_VARIABLES = {
    "layercast": {"VLLM_FLOAT32_MATMUL_PRECISION": "highest"},
    "batch_invariant": {"VLLM_BATCH_INVARIANT": "1"},
}
"""What vLLM reads from the environment, by `EngineSpec.numerics`; processes that it starts inherit it."""

_live_engines = 0


class VllmEngine:
    """One vLLM engine that lives and steps in this process. Implements `rollout.engine.Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model of `spec`.

        Raises ValueError when the process belongs to a distributed learner or the model's sizes are unknown,
        `EngineOutOfMemory` when memory does not do. What loading had opened is closed again.
        """
        global _live_engines
        self.spec = spec
        self._closed = False
        self._version = 0
        self._counter = 0
        self._aside: Any = None
        self._asleep = 0
        self._dropped = False
        self.between_steps: Callable[[], None] = _nothing
        """Called between two steps; it may `pause`, then score and receive weights, and `resume`."""
        text_config(spec.model)
        _refuse_distributed_process()
        try:
            with _undisturbed_process(spec.threads), engine_failures(LOADING):
                self._llm = _build_llm(spec)
        except BaseException:
            _forget_failed_load()
            raise
        _live_engines += 1
        self._engine = self._llm.llm_engine
        self._engine.set_weight_version("0")

    def wait(self) -> None:
        """Nothing to wait for: the constructor has loaded the model."""

    @property
    def weight_version(self) -> int:
        """The version of the installed weights; 0 are those loaded from disk."""
        return self._version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion a request, in the order of `requests`; all are enqueued before the first step.

        Cached prefixes of earlier rounds are dropped, which costs one prefill of what prompts share: a round
        depends on weights and requests alone, so a resumed run's is the same, whatever a kernel makes of a
        cached part. Raises ValueError when a prompt and `sampling.max_tokens` exceed `spec.max_model_len`, or
        when a request names an adapter.
        """
        self._check_requests(requests, sampling)
        parameters = [_sampling_params(sampling, request.seed) for request in requests]
        prompts = [request.prompt_ids for request in requests]
        self._engine.reset_prefix_cache()
        return [_completion(output) for output in self._run(prompts, parameters, "generating")]

    def score(self, sequences: Sequence[list[int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of `tokens[1:]` given what precedes: log-softmax of raw logits / temperature, in float32.

        Whole sequences are computed anew, without the prefix cache. vLLM's prompt log-probs know no
        temperature, so its sampler's log-softmax is scaled for the length of the call. Raises ValueError
        for a sequence of fewer than two or more than `spec.max_model_len` tokens.
        """
        for sequence in sequences:
            if not 2 <= len(sequence) <= self.spec.max_model_len:
                raise ValueError(
                    f"A sequence of {len(sequence)} tokens cannot be scored: it must have 2 to "
                    f"{self.spec.max_model_len} (the engine's max_model_len)."
                )
        parameters = [_score_params()] * len(sequences)
        self._llm.collective_rpc(_set_score_temperature, args=(temperature,))
        try:
            outputs = self._run(list(sequences), parameters, "scoring")
        finally:
            self._llm.collective_rpc(_set_score_temperature, args=(1.0,))
        return [
            _prompt_logprobs(output, sequence) for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def effective_sampling(self, sampling: Sampling) -> dict[str, Any]:
        """Every sampling parameter as vLLM gets it, defaults included; nothing of the model's own is
        added."""
        params = _sampling_params(sampling, seed=0)
        names = [name for name in params.__struct_fields__ if not name.startswith("_")]
        values = {name: getattr(params, name) for name in names if name not in ("seed", "output_kind")}
        return values | {"seed": "one a sample", "logprobs_mode": "processed_logprobs"}

    def init_transfer(self, info: dict[str, Any]) -> None:
        """Open the weight channel that `spec.transport` names."""
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def receive_weights(self, info: dict[str, Any], version: int) -> dict[str, Any]:
        """Run vLLM's update phases for one version and drop every cached prefix.

        The version is counted only after all phases succeeded. Returns the receiver's own report (timings and
        hashes), taken from `last_report` of its transfer engine.
        """
        with _undisturbed_process(self.spec.threads), engine_failures("installing weights"):
            self._wake()
            self._llm.collective_rpc("start_weight_update")
            self._llm.collective_rpc("update_weights", kwargs={"update_info": info})
            self._llm.collective_rpc("finish_weight_update")
            self._engine.set_weight_version(str(version))
            self._version = version
            self._dropped = False
            self._engine.reset_prefix_cache()
            return dict(self._llm.collective_rpc(_transfer_report)[0])

    def pause(self) -> None:
        """Set the requests of a round in progress, where there is one, aside until `resume`.

        They are kept with their tokens and generators; what is cached of them is dropped and computed anew
        under the weights that are there then, so every token's log-prob is that of one version.
        """
        with _undisturbed_process(self.spec.threads), engine_failures("pausing"):
            self._engine.sleep(level=0, mode="keep")  # waits for the device
            self._engine.reset_prefix_cache(reset_running_requests=True)
            scheduler = self._scheduler
            self._aside, scheduler.waiting = scheduler.waiting, type(scheduler.waiting)()
            self._engine.wake_up(["scheduling"])

    def resume(self) -> None:
        """Go on with what `pause` has set aside."""
        if self._aside is not None:
            self._scheduler.waiting, self._aside = self._aside, None

    def sleep(self, level: int) -> None:
        """Give GPU memory back until the next call that needs it, which wakes the engine.

        vLLM's `sleep`: `level` 1 keeps the weights in main memory, 2 drops them, after which
        `receive_weights` must come first. Takes a `spec.sleep_mode`; on a CPU nothing is freed.
        """
        with _undisturbed_process(self.spec.threads), engine_failures("going to sleep"):
            self._engine.sleep(level=level)
        self._asleep, self._dropped = level, level == 2

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = 0

    @property
    def _scheduler(self) -> Any:
        """vLLM's own, whose queue `pause` changes."""
        return self._engine.engine_core.engine_core.scheduler

    def memory(self) -> dict[str, float]:
        """See `Engine.memory`."""
        return {"peak": peak_bytes(), "kv_cache": float(self._llm.collective_rpc(_kv_bytes)[0])}

    def close(self) -> None:
        """Release the engine; the process group goes with the last one. Safe to call twice."""
        global _live_engines
        if self._closed:
            return
        self._closed = True
        _live_engines -= 1
        self._engine.engine_core.shutdown()
        del self._engine, self._llm
        gc.collect()
        if _live_engines == 0:
            _destroy_process_group()

    def _check_requests(self, requests: Sequence[Request], sampling: Sampling) -> None:
        limit = self.spec.max_model_len
        for request in requests:
            if request.adapter is not None:
                raise ValueError(f"Request for adapter '{request.adapter}': this engine serves none.")
            length = len(request.prompt_ids)
            if not 0 < length <= limit - sampling.max_tokens:
                raise ValueError(
                    f"A prompt of {length} tokens with max_tokens={sampling.max_tokens} does not fit "
                    f"max_model_len={limit}: shorten the prompt or raise max_model_len."
                )

    def _run(self, prompts: list[list[int]], parameters: list[Any], doing: str) -> list[Any]:
        """Enqueue all, then step until done; an interrupted round leaves nothing behind."""
        names: list[str] = []
        finished: dict[str, Any] = {}
        with _undisturbed_process(self.spec.threads), engine_failures(doing):
            if self._dropped:
                raise EngineError(f"the engine has dropped its weights: {doing} waits for the next ones.")
            self._wake()
            try:
                for prompt, params in zip(prompts, parameters, strict=True):
                    name = str(self._counter)
                    self._counter += 1
                    self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
                    names.append(name)
                while len(finished) < len(names) and self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        if output.finished:
                            finished[output.request_id] = output
                    self.between_steps()
            except BaseException:
                self._engine.abort_request(names)
                raise
        return [finished[name] for name in names]


def _nothing() -> None:
    """Between two steps, where nobody calls."""


def _refuse_distributed_process() -> None:
    """vLLM would join an existing process group as if it were its own, and hang."""
    import torch.distributed

    if _live_engines == 0 and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError(
            "An in-process engine cannot be built in a process that has a torch process group: "
            "set rollout.process=child."
        )


def _set_numerics(spec: EngineSpec, on_cpu: bool) -> None:
    """Tell vLLM, before it is imported, how to compute. Raises ValueError where it cannot."""
    if spec.numerics == "layercast" and spec.dtype != "bfloat16":
        raise ValueError(
            f"An engine with numerics=layercast keeps its weights in bfloat16, not in dtype={spec.dtype}."
        )
    if spec.numerics == "batch_invariant" and on_cpu:
        raise ValueError(
            "rollout.numerics=batch_invariant switches vLLM's GPU kernels, and this engine runs on a CPU: "
            "set rollout.numerics=layercast or standard."
        )
    os.environ |= NUMERICS_VARIABLES.get(spec.numerics, {})


def _build_llm(spec: EngineSpec) -> Any:
    """`vllm.LLM` with everything that the model or the environment could change fixed."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(thread_count(spec.threads))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and it would win over kv_cache_memory_bytes
    with _without_ray():
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        _set_numerics(spec, on_cpu)
        from vllm import LLM

        from rollout.weights.plugin import register

        register()
        with _compiled_model_reloads(), _lock_of_one_process():
            llm = LLM(**_llm_arguments(spec, on_cpu))
    if on_cpu:
        from rollout.vllm_sampler import install

        llm.collective_rpc(install)
    return llm


def _llm_arguments(spec: EngineSpec, on_cpu: bool) -> dict[str, Any]:
    length = _engine_length(spec)
    arguments: dict[str, Any] = {
        "model": spec.model,
        "tokenizer": spec.tokenizer or None,
        "dtype": spec.compute_dtype,
        "seed": spec.seed,
        "max_model_len": length,
        "max_num_seqs": spec.max_num_seqs,
        "enforce_eager": spec.eager,
        "enable_prefix_caching": spec.prefix_caching,
        "tensor_parallel_size": spec.tensor_parallel,
        "trust_remote_code": spec.trust_remote_code,
        "enable_sleep_mode": spec.sleep_mode,
        "generation_config": "vllm",  # the model's own sampling settings must not alter training's
        "logprobs_mode": "processed_logprobs",
        "kv_cache_memory_bytes": spec.kv_cache_bytes or None,
        "use_tqdm_on_load": False,
    }
    if spec.numerics == "layercast":
        from rollout.layercast import NAME

        arguments["quantization"] = NAME
    if spec.block_size:
        arguments["block_size"] = spec.block_size
    if spec.transport:
        from vllm.config import WeightTransferConfig

        arguments["weight_transfer_config"] = WeightTransferConfig(backend=spec.transport)
    if not on_cpu:
        return arguments | {"gpu_memory_utilization": spec.gpu_memory}
    # A prompt cut by chunked prefill rewinds its seeded generator, which CPU generators cannot do (vLLM 0.32:
    # "CPU Generator does not use offset").
    if spec.eager:  # vLLM's fused C++ operators, which compilation makes superfluous: 6 % faster
        arguments["compilation_config"] = {"custom_ops": ["all"]}
    return arguments | {
        "block_size": spec.block_size or CPU_BLOCK,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_STEP_TOKENS, length, spec.max_num_seqs),
        "kv_cache_memory_bytes": spec.kv_cache_bytes or kv_cache_bytes(spec),
    }


@contextlib.contextmanager
def _without_ray() -> Iterator[None]:
    """Hide Ray from vLLM, which imports it wherever it is installed and would spread one engine with it.

    Ours are spread by `rollout.ray_host`, which is outside of them; unused, Ray takes 11 MB of an engine.
    """
    modules: dict[str, Any] = sys.modules
    hidden = "ray" not in modules
    if hidden:
        modules["ray"] = None  # importing it fails as if it were not installed
    try:
        yield
    finally:
        if hidden:
            del modules["ray"]


@contextlib.contextmanager
def _compiled_model_reloads() -> Iterator[None]:
    """Let vLLM load the compiled model that it saved at an earlier start: 50 s of compilation saved.

    On a CPU vLLM 0.32 saves it and then fails to load it, because it calls `finalize_loading`, which only the
    compiled functions of its GPU back end have; it compiles anew at every start.
    """
    import torch

    load = torch.compiler.load_compiled_function

    def load_and_adapt(*arguments: Any, **options: Any) -> Any:
        loaded: Any = load(*arguments, **options)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda config: None
        return loaded

    torch.compiler.load_compiled_function = load_and_adapt
    try:
        yield
    finally:
        torch.compiler.load_compiled_function = load


@contextlib.contextmanager
def _lock_of_one_process() -> Iterator[None]:
    """Give vLLM's one-process executor a lock between threads.

    The one between processes that it makes is shared with nobody, and cannot be had where `/dev/shm` is full.
    """
    from vllm.v1.executor import uniproc_executor

    module: Any = uniproc_executor
    between_processes = module.Lock
    module.Lock = threading.Lock
    try:
        yield
    finally:
        module.Lock = between_processes


def _engine_length(spec: EngineSpec) -> int:
    """One token more than asked for, where the model allows: scoring generates one that nobody reads.

    Raises ValueError when the model takes fewer tokens than asked for.
    """
    limit = max_positions(spec.model)
    if limit is None:
        return spec.max_model_len + 1
    if limit < spec.max_model_len:
        raise ValueError(
            f"The engine is asked for max_model_len={spec.max_model_len} tokens, but {spec.model} takes at "
            f"most {limit} (max_position_embeddings in its config.json): lower data.max_prompt_tokens, "
            "rollout.max_new_tokens or rollout.max_model_len."
        )
    return min(spec.max_model_len + 1, limit)


def _sampling_params(sampling: Sampling, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed,
        stop=list(sampling.stop) or None,
        stop_token_ids=None if sampling.ignore_eos else list(sampling.stop_token_ids),
        ignore_eos=True,  # the ids above are the only end tokens; the tokenizer's own is among them or not
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        skip_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _score_params() -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
        skip_reading_prefix_cache=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion:
    result = output.outputs[0]
    token_ids = list(result.token_ids)
    logprobs = list(result.logprobs.logprobs)
    if len(logprobs) != len(token_ids):
        raise RuntimeError(f"vLLM gave {len(logprobs)} log-probs for {len(token_ids)} tokens.")
    reasons = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
    spans = [
        VersionSpan(start=span.start, end=span.end, version=int(span.version))
        for span in result.weight_versions or []
    ]
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=reasons.get(result.finish_reason, FinishReason.ABORT),
        version_spans=spans,
    )


def _prompt_logprobs(output: Any, sequence: list[int]) -> list[float]:
    """vLLM's entry for the first token is empty; each other position has the given token's value only."""
    flat = output.prompt_logprobs
    if flat.token_ids != sequence[1:]:
        raise RuntimeError("vLLM scored other tokens than it was given.")
    return list(flat.logprobs)


def _set_score_temperature(worker: Any, temperature: float) -> None:
    """Runs in the worker: scale the log-softmax that prompt log-probs go through.

    `compute_logprobs` is a static method of vLLM's Sampler; an attribute of the instance shadows it.
    """
    sampler = worker.model_runner.sampler
    vars(sampler).pop("compute_logprobs", None)
    if temperature == 1.0:
        return
    if not hasattr(sampler, "compute_logprobs"):
        raise ValueError(
            f"score(temperature={temperature}) needs vLLM's first model runner: use temperature 1."
        )
    sampler.compute_logprobs = lambda logits: (logits.float() / temperature).log_softmax(dim=-1)


def _transfer_report(worker: Any) -> dict[str, Any]:
    """Runs in the worker: what its transfer engine measured while receiving."""
    return getattr(worker.weight_transfer_engine, "last_report", None) or {}


def _kv_bytes(worker: Any) -> int:
    """Runs in the worker."""
    return sum(cache.numel() * cache.element_size() for cache in worker.model_runner.kv_caches)


@contextlib.contextmanager
def _undisturbed_process(threads: int) -> Iterator[None]:
    """Give back what vLLM changes in the process: random states, thread count, variables."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    set_threads, old_threads = torch.set_num_threads, torch.get_num_threads()
    variables = {name: os.environ.get(name) for name in PROCESS_VARIABLES}
    set_threads(thread_count(threads))
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_threads
        set_threads(old_threads)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _forget_failed_load() -> None:
    """Close the process group that a failed load has opened, or the next engine would be refused."""
    import torch.distributed

    gc.collect()
    if _live_engines == 0 and torch.distributed.is_available() and torch.distributed.is_initialized():
        _destroy_process_group()


def _destroy_process_group() -> None:
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()
