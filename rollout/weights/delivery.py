"""One version on its way, and the call to several engines that all transports share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from rollout.engine import Engine
from rollout.weights.manifest import Manifest

WeightSource = Iterable[tuple[str, Tensor]]
"""`(Hugging Face name, tensor)` in the engine's dtype; a tied head is not yielded a second time. Iterated
once a publish, twice at the first unless it is a plain iterator."""


@dataclass(slots=True, kw_only=True)
class Delivery:
    """One version, ready to be installed."""

    manifest: Manifest
    """What is sent. `entries` carry digests only where the transport verifies."""
    sent: dict[str, Tensor] = field(default_factory=dict)
    """The tensors as engines will read them, valid until the next version; empty where they stay on a GPU."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase, learner's side."""

    @property
    def version(self) -> int:
        """The version that it brings."""
        return self.manifest.version

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entry in self.manifest.entries)

    @property
    def dtype(self) -> str:
        """Number format of most bytes."""
        sizes: dict[str, int] = {}
        for entry in self.manifest.entries:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size
        return max(sizes, key=lambda dtype: sizes[dtype])


class Sender(Protocol):
    """The learner's end of a transport."""

    @property
    def verifies(self) -> bool:
        """Whether engines hash what they receive and read back what they installed."""
        ...

    def stage(self, source: WeightSource, version: int) -> Delivery:
        """Make one version ready; no engine is touched."""
        ...

    def install(self, delivery: Delivery) -> list[dict[str, Any]]:
        """Have every engine install it; their reports. Raises WeightTransferError when one refuses."""
        ...

    def close(self) -> None:
        """Release what the transport holds."""
        ...


def on_each(engines: Sequence[Engine], call: Callable[[Engine], Any]) -> list[Any]:
    """`call` on every engine, at the same time when there are several; raises the first failure in order."""
    if len(engines) == 1:
        return [call(engines[0])]
    with ThreadPoolExecutor(max_workers=len(engines)) as pool:
        futures = [pool.submit(call, engine) for engine in engines]
    return [future.result() for future in futures]
