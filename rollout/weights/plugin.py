"""Makes Whetstone's weight transfer known to vLLM: the entry point `vllm.general_plugins: whetstone`.

vLLM calls `register` in every process that it starts. It must be cheap, so the receiver's module is named
here and imported only when an engine with that backend is built.
"""

from __future__ import annotations

BACKEND = "shm"


def register() -> None:
    """Register the receiver of the `shm` transport with vLLM; calling it again changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "rollout.weights.receiver", "ShmReceiver")
