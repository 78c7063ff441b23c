"""Makes Whetstone's weight transfer and LayerCast known to vLLM: the entry point `vllm.general_plugins:
whetstone`.

vLLM calls `register` in every process that it starts. It must be cheap, so the receiver's module is named
here and imported only when an engine with that backend is built, as are LayerCast's layers.
"""

from __future__ import annotations

RECEIVERS = {"shm": "ShmReceiver", "tcp": "TcpReceiver"}
"""Transport -> its receiver in `rollout.weights.receiver`."""


def register() -> None:
    """Register LayerCast and the receivers of our transports with vLLM; calling it again changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from rollout import layercast

    layercast.register()

    for transport, receiver in RECEIVERS.items():
        if transport not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(transport, "rollout.weights.receiver", receiver)
