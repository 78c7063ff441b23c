"""Checks what an engine read back out of its live model against what the learner sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.weights.delivery import Delivery
from rollout.weights.errors import ProbeError
from rollout.weights.manifest import Proof, canonical, proof_digest


def expected_digests(delivery: Delivery) -> dict[str, str]:
    """The proof digest of every tensor sent, by name."""
    manifest = delivery.manifest
    digests = {}
    for name, tensor in delivery.sent.items():
        values = tensor
        if tensor.dim() > 1:
            start, end = manifest.band(tensor.shape[-1])
            values = tensor[:, start:end]
        digests[name] = proof_digest(name, canonical(values), manifest.seed)
    return digests


def check_proofs(delivery: Delivery, reports: Sequence[dict[str, Any]], first: int = 0) -> None:
    """Every tensor sent must have been read back, wherever it was installed, and be what was sent.

    `first`: number of the first engine. Raises ProbeError, naming the worst module, when one holds something
    else or proves nothing.
    """
    expected = expected_digests(delivery)
    for index, report in enumerate(reports, first):
        proofs = [Proof(**proof) for proof in report.get("proofs", ())]
        silent = expected.keys() - {proof.name for proof in proofs}
        if silent:
            raise ProbeError(
                f"Engine {index} says that version {delivery.version} is installed but read back only "
                f"{len(expected) - len(silent)} of {len(expected)} tensors; nothing proves {min(silent)}."
            )
        wrong = [proof for proof in proofs if proof.digest != expected.get(proof.name)]
        if wrong:
            raise ProbeError(_installed_wrongly(index, delivery, proofs, wrong))


def _installed_wrongly(
    index: int, delivery: Delivery, proofs: Sequence[Proof], wrong: Sequence[Proof]
) -> str:
    worst = max(wrong, key=lambda proof: (proof.differing, proof.distance))
    return (
        f"Version {delivery.version} was installed wrongly in engine {index}, though every tensor arrived "
        f"intact: of {len(proofs)} places read back, {len(wrong)} hold other weights than were sent. The "
        f"worst is {worst.module} (from {worst.name}): {worst.differing:.2%} of its values differ, by up to "
        f"{worst.distance:.2g}."
    )
