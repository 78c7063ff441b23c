"""`Publisher`: sends the learner's weights to every engine and proves that they arrived, or stops the run.

What is checked, in this order:

1. the source: no tensor under another's name, none left from before the update (`rollout.weights.watch`);
2. the transfer: names, shapes, formats and a hash of every tensor, before the engine installs any (`shm`);
3. the installation: a part of every tensor read back out of the live model (`rollout.weights.proof`, `shm`);
4. the result: learner and engine score a fixed probe; the gap is within the tolerance of the coarser of their
   number formats, and an engine whose learner moved has moved too.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.engine import Engine
from rollout.restarts import RestartingEngine
from rollout.weights.config import Transport, WeightsConfig
from rollout.weights.delivery import Delivery, Sender, WeightSource, on_each
from rollout.weights.errors import ProbeError, WeightTransferError, listed
from rollout.weights.probe import Gap, Scores, gap, stood_still
from rollout.weights.proof import check_proofs
from rollout.weights.shm import SegmentSender, ShmSender
from rollout.weights.tcp import TcpSender
from rollout.weights.watch import Change, SourceWatch

Score = Callable[[Sequence[list[int]]], Scores]
"""The learner's scorer: log-probs of `tokens[1:]` of each sequence, as `Engine.score`."""


@dataclass(slots=True, kw_only=True)
class PublishReport:
    """One publish, proven."""

    version: int
    size: int
    """Bytes transferred."""
    unchanged: int
    """Tensors that did not change since the last version, as far as is remembered."""
    read_back: int
    """Places in the first engine's live model that were read back; 0 where the transport cannot."""
    gap_mean: float
    """Mean |learner - engine| log-prob on the probe, in nats; of the worst engine."""
    gap_max: float
    seconds: dict[str, float] = field(default_factory=dict)
    """`gather` (the source), `transfer` (copy and network), `install`; verification: `hash`, `readback`,
    `probe`."""

    def metrics(self) -> dict[str, float]:
        """By name, for the trackers."""
        values = {
            "weights/version": float(self.version),
            "weights/bytes": float(self.size),
            "weights/unchanged": float(self.unchanged),
            "weights/read_back": float(self.read_back),
            "weights/probe_gap_mean": self.gap_mean,
            "weights/probe_gap_max": self.gap_max,
        }
        return values | {f"weights/{phase}_seconds": seconds for phase, seconds in self.seconds.items()}


@dataclass(slots=True, kw_only=True)
class _Probed:
    """The probe's scores under one version."""

    learner: Scores
    engines: list[Scores]
    worst: Gap


class Publisher:
    """Owns the channel to every engine, the version, and the probe."""

    def __init__(
        self,
        engines: Sequence[Engine],
        config: WeightsConfig,
        probe: Sequence[Sequence[int]],
        *,
        on_gpu: bool = False,
        shares_gpu: bool = False,
        one_machine: bool = True,
        address: str = "127.0.0.1",
        tensor_parallel: int = 1,
        frozen: Collection[str] | None = None,
        folder: Path | None = None,
        learner_dtype: str = "",
        engine_dtype: str = "",
    ) -> None:
        """`engines` must have been built with the transport that `config.resolve` names.

        Args:
            engines: all engines of the run; every one gets every version.
            config: transport, tolerance and how much is read back.
            probe: token sequences of at least two tokens, see `rollout.weights.probe.probe_sequences`.
            on_gpu: whether the engines are on GPUs; `shares_gpu`: which the learner uses too.
            one_machine: whether every engine can open this process's memory.
            address: that of this machine at which the engines reach it.
            tensor_parallel: GPUs of one engine.
            frozen: Hugging Face names of tensors that training never changes; None when not known.
            folder: takes the transfer's file where memory is refused.
            learner_dtype: the number format in which the learner computes log-probs; empty for the engines'.
            engine_dtype: that in which the engines do; empty for that of the tensors sent.

        Raises ValueError when there is no engine, no probe, or a transport that does not fit.
        """
        self._probe = [list(sequence) for sequence in probe]
        if not engines or not self._probe or min(map(len, self._probe)) < 2:
            raise ValueError("A publisher needs an engine and a probe of sequences of at least two tokens.")
        self._engines = list(engines)
        self._config = config
        transport = config.resolve(on_gpu=on_gpu, shares_gpu=shares_gpu, one_machine=one_machine)
        restarting = [engine for engine in self._engines if isinstance(engine, RestartingEngine)]
        self._sender = _sender(
            self._engines, config, transport, tensor_parallel, folder, address, renews=bool(restarting)
        )
        for index, engine in enumerate(restarting):
            engine.renew = functools.partial(self._renew, index)
        self._watch = SourceWatch(frozen)
        self._learner_dtype = learner_dtype
        self._engine_dtype = engine_dtype
        self._last: _Probed | None = None
        self._staged: Delivery | None = None
        self.version = max(engine.weight_version for engine in engines)
        """The version in force."""

    def publish(self, source: WeightSource, score: Score) -> PublishReport:
        """Send the next version to every engine; on return it is installed everywhere and proven.

        The first one, before training, sends what the engines have already: it proves the channel while
        nothing has changed, and gives later ones something to compare with.

        Raises:
            WeightTransferError: refused; nothing was installed anywhere that refused it.
            ProbeError: an engine holds something else than what the learner has. Do not go on.
        """
        version = self.version + 1
        delivery = self._staged = self._sender.stage(source, version)
        seconds = {"gather": 0.0, "transfer": 0.0, "hash": 0.0} | delivery.seconds
        with _added(seconds, "hash"):
            change = self._inspect(delivery)
        with _added(seconds, "install"):
            reports = self._sender.install(delivery)
        _split_install(seconds, reports)
        with _added(seconds, "hash"):
            self._check_installed(delivery, reports)
        with _added(seconds, "probe"):
            probed = self._check_probe(delivery, change, score)
        self.version, self._last = version, probed
        self._watch.keep(change)
        return PublishReport(
            version=version,
            size=delivery.size,
            unchanged=change.unchanged,
            read_back=len(reports[0].get("proofs", ())),
            gap_mean=probed.worst.mean,
            gap_max=probed.worst.max,
            seconds=seconds,
        )

    def _renew(self, index: int, engine: Engine) -> None:
        """Bring the weights of now to engine `index`, which was started again, and prove it."""
        delivery = self._staged
        if delivery is None:  # nothing was published yet: it has loaded what the others have
            return
        assert isinstance(self._sender, SegmentSender)
        report = self._sender.renew(engine, delivery)
        if self._reads_back:
            check_proofs(delivery, [report], first=index)
        if (
            self._last is not None and delivery.version == self.version
        ):  # else `publish` probes it in a moment
            found = gap(engine.score(self._probe), self._last.learner)
            limit = self._config.limit(*self._dtypes(delivery))
            if not found.mean <= limit:
                raise ProbeError(self._beyond(index, found, limit, delivery, Change()))

    def close(self) -> None:
        """Release the channel; the engines stay."""
        self._sender.close()

    def _inspect(self, delivery: Delivery) -> Change:
        change = self._watch.look(delivery.sent)
        if change.problems:
            raise WeightTransferError(
                f"Version {delivery.version} was not sent, the learner's weights are not what they should "
                f"be: {listed(change.problems)}."
            )
        return change

    @property
    def _reads_back(self) -> bool:
        return self._sender.verifies and self._config.readback_columns >= 0

    def _check_installed(self, delivery: Delivery, reports: Sequence[dict[str, Any]]) -> None:
        for index, engine in enumerate(self._engines):
            if engine.weight_version != delivery.version:
                raise ProbeError(
                    f"Engine {index} is at version {engine.weight_version} after version {delivery.version} "
                    "was sent."
                )
        if self._reads_back:
            check_proofs(delivery, reports)

    def _check_probe(self, delivery: Delivery, change: Change, score: Score) -> _Probed:
        engines = on_each(self._engines, lambda engine: engine.score(self._probe))
        learner = score(self._probe)
        gaps = [gap(scores, learner) for scores in engines]
        limit = self._config.limit(*self._dtypes(delivery))
        worst = max(range(len(gaps)), key=lambda index: gaps[index].mean)
        if self._last is not None:
            for index, (before, now) in enumerate(zip(self._last.engines, engines)):
                if math.isfinite(gaps[index].mean) and stood_still(before, now, self._last.learner, learner):
                    raise ProbeError(self._unmoved(index, delivery))
        if not gaps[worst].mean <= limit:
            raise ProbeError(self._beyond(worst, gaps[worst], limit, delivery, change))
        return _Probed(learner=learner, engines=engines, worst=gaps[worst])

    def _dtypes(self, delivery: Delivery) -> list[str]:
        """The number formats in which engine and learner compute, the same one once."""
        engine = self._engine_dtype or delivery.dtype
        return list(dict.fromkeys([engine, self._learner_dtype or engine]))

    def _unmoved(self, index: int, delivery: Delivery) -> str:
        return (
            f"Version {delivery.version} was not installed in engine {index}, though it says so: the "
            "learner's log-probs on the probe changed, and not one of the engine's did."
        )

    def _beyond(self, index: int, found: Gap, limit: float, delivery: Delivery, change: Change) -> str:
        if self._reads_back:
            cause = (
                "Every tensor arrived intact and what was read back is what was sent, so the learner sends "
                "other weights than it scores with, or computes otherwise than the engine"
            )
            if change.moved:
                cause += f"; what moved most since the last version: {listed(change.most(5))}"
        elif self._sender.verifies:
            cause = (
                "Every tensor arrived intact, so it was installed wrongly or is not what the learner scores "
                "with; set weights.readback_columns=32 to learn which layer"
            )
        else:
            cause = "This transport neither hashes nor reads back, so the layer is not known"
        dtypes = self._dtypes(delivery)
        if len(dtypes) > 1:
            cause += (
                f". The learner computes in {dtypes[1]} and the engine in {dtypes[0]}, which "
                "round differently, and the gap may grow with training: give learner.dtype and rollout.dtype "
                "the same value, or raise weights.tolerance"
            )
        return (
            f"After version {delivery.version}, engine {index} and learner disagree on the probe by "
            f"{found.mean:.3g} nats on average (at most {limit:g} for {' and '.join(dtypes)}), most in "
            f"sequence {found.sequence} at token {found.token + 1} ({found.max:.3g}). {cause}."
        )


def _sender(
    engines: Sequence[Engine],
    config: WeightsConfig,
    transport: Transport,
    tensor_parallel: int,
    folder: Path | None,
    address: str,
    renews: bool,
) -> Sender:
    if transport in (Transport.shm, Transport.tcp):
        make = ShmSender if transport is Transport.shm else functools.partial(TcpSender, address=address)
        return make(
            engines,
            columns=config.readback_columns,
            skip_unchanged=config.skip_unchanged,
            folder=folder,
            renews=renews,
        )
    if renews:
        raise ValueError(
            f"rollout.restarts above 0 with weights.transport={transport}: an engine that was started again "
            "cannot join its channel; set rollout.restarts=0."
        )
    from rollout.weights.gpu import GpuSender

    return GpuSender(engines, transport, tensor_parallel=tensor_parallel, address=address)


@contextlib.contextmanager
def _added(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


def _split_install(seconds: dict[str, float], reports: Sequence[dict[str, Any]]) -> None:
    """Take the engines' verification out of `install`; they work side by side, so the slowest counts."""
    for phase in ("transfer", "hash", "readback"):
        slowest = max(report.get(f"{phase}_seconds", 0.0) for report in reports)
        seconds[phase] = seconds.get(phase, 0.0) + slowest
        seconds["install"] -= slowest
