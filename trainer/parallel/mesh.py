"""`Team`: this process among the ranks of one learner: process groups, device mesh, collectives."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.errors import RankError, out_of_memory
from trainer.master_weights import MasterWeights
from trainer.parallel.channel import LEADER, GroupChannel
from trainer.parallel.config import Degrees, ParallelConfig
from trainer.parallel.meeting import agreed_name
from trainer.parallel.roll_call import RollCall
from trainer.parallel.sharding import (
    TENSOR,
    ShardedWeights,
    gathered_no_more,
    known,
    local,
    shard,
    slice_of,
    summed_over_copies,
    whole,
)
from trainer.parallel.world import World
from trainer.policy import Policy
from trainer.ranks import Like

PATIENCE = timedelta(days=7)
"""How long a rank waits for the others to start, and a follower for a command: rank 0 may download a model,
generate or evaluate meanwhile. A rank that ends is noticed at once, by its closed connections."""

MEETING = timedelta(minutes=10)
"""How long the store of torchrun, which is there before the ranks are, may take to answer."""

FAILURE_SECONDS = 5.0
"""How long rank 0 waits for the sentence of a rank whose connection broke."""

LOST_SECONDS = 15.0
"""The same where somebody watches the ranks: Ray takes some 3 s to notice that a node is gone."""

Path = tuple[Any, ...]
"""Keys that lead through nested dictionaries."""

_FAILURE = "whetstone/failure"
"""Where the ranks' store holds the sentence of a rank that failed."""


class Team:
    """A `trainer.ranks.Ranks` over torch's process groups: NCCL between GPUs, gloo between CPUs.

    What is small or decides (commands, counts, metrics) goes over gloo on the CPU in either case.
    """

    def __init__(
        self,
        world: World,
        config: ParallelConfig,
        device: torch.device,
        lost: Callable[[], str] | None = None,
    ) -> None:
        """Meet the other ranks where torchrun's `MASTER_ADDR` and `MASTER_PORT` say.

        `lost`: says what became of a rank that is gone, empty while that is not known; None: nobody watches.
        Raises ValueError when the degrees do not multiply to the number of ranks.
        """
        degrees = config.degrees(world.size)
        if device.type == "cuda":
            torch.cuda.set_device(world.local_rank)
        self.rank, self.world_size = world.rank, world.size
        self.size = degrees.replicate * degrees.shard
        self.tensor = degrees.tensor
        self._lost = lost
        self._store = _meet(world, device)
        self._mesh = _mesh(device, degrees)
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.channel = GroupChannel(self._control)
        self.roll_call = RollCall(dist.PrefixStore("roll call", self._store), self.rank, self.world_size)
        """Where each rank is."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == LEADER

    @property
    def notices(self) -> bool:
        """Whether a collective fails as soon as another rank has ended: gloo's do, NCCL's need not."""
        return self._mesh.device_type == "cpu"

    def share(self, rank: int) -> int:
        """Which share of the rows a rank learns from, `0..size-1`."""
        return rank // self.tensor

    def place(self, policy: Policy, dtype: torch.dtype) -> MasterWeights:
        """Shard a policy in place; see `trainer.parallel.sharding`."""
        shard(policy, self._mesh, dtype)
        return ShardedWeights(policy)

    def most(self, count: int) -> int:
        """The largest `count` of any rank."""
        largest = torch.tensor([count])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._control)
        return int(largest)

    def defer(self, policy: Policy, more: bool) -> None:
        """Gradients are summed over copies by the last backward pass before a step."""
        summed_over_copies(policy, not more)

    def rest(self, policy: Policy) -> None:
        """Free the weights that a pass without a backward gathered."""
        gathered_no_more(policy)

    def exchange(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """The report of every share of the rows, in order."""
        content = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)
        length = self.most(len(content))
        padded = torch.full((length,), ord(" "), dtype=torch.uint8)
        padded[: len(content)] = content
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(self._control))]
        dist.all_gather(parts, padded, group=self._control)
        return [json.loads(part.numpy().tobytes()) for part in parts[:: self.tensor]]

    def whole(self, tensor: Tensor) -> Tensor:
        """A sliced tensor, gathered on every rank."""
        return whole(tensor)

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's slice."""
        return local(tensor)

    def collect(self, state: dict[str, Any], like: Like) -> dict[str, Any]:
        """Nested state, each tensor gathered in turn: one whole tensor at a time on ranks above 0."""
        gathered = self._gathered(state, like, ())
        return gathered if self.leads else {}

    def _gathered(self, value: Any, like: Like, path: Path) -> Any:
        if isinstance(value, Tensor):
            model = _found(like, path)
            full = whole(value if model is None else known(value, model))
            return full.cpu() if self.leads else None
        if isinstance(value, dict):
            return {key: self._gathered(item, like, (*path, key)) for key, item in value.items()}
        return value

    def spread(self, state: dict[str, Any], like: Like) -> dict[str, Any]:
        """Rank 0's nested state on every rank, each tensor sent in turn."""
        skeleton: list[Any] = [_skeleton(state) if self.leads else None]
        dist.broadcast_object_list(skeleton, LEADER, group=self._control)
        return self._filled(skeleton[0], state if self.leads else None, like, ())

    def _filled(self, skeleton: Any, value: Any, like: Like, path: Path) -> Any:
        if isinstance(skeleton, _Outline):
            tensor = value.contiguous() if self.leads else torch.empty(skeleton.shape, dtype=skeleton.dtype)
            dist.broadcast(tensor, LEADER, group=self._control)
            model = _found(like, path)
            return tensor if model is None or model.shape != tensor.shape else slice_of(tensor, model)
        if isinstance(skeleton, dict):
            return {
                key: self._filled(item, value[key] if self.leads else None, like, (*path, key))
                for key, item in skeleton.items()
            }
        return skeleton

    def report_failure(self, sentence: str) -> None:
        """Leave a sentence for rank 0, which finds it when it next fails to reach this rank."""
        with contextlib.suppress(RuntimeError):
            self._store.set(_FAILURE, sentence)

    def explain(self, error: BaseException) -> BaseException:
        """What to raise for an exception of rank 0: the failure of another rank where that was the cause."""
        if not isinstance(error, RuntimeError) or out_of_memory(error) or not is_broken(error):
            return error
        return RankError(self._failure() or "a rank of the learner has ended: look at what it printed.")

    def _failure(self) -> str:
        """What a failed rank has left in the store, or what is known of one that is gone."""
        lost = self._lost or (lambda: "")
        limit = time.monotonic() + (LOST_SECONDS if self._lost else FAILURE_SECONDS)
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < limit and not lost():
                if self._store.check([_FAILURE]):
                    return str(self._store.get(_FAILURE).decode())
                time.sleep(0.1)
        return lost()

    def leave(self) -> None:
        """Close all connections; whoever waits for this rank then fails at once."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _found(like: Like, path: Path) -> Tensor | None:
    """The tensor for what lies at `path`, or for what holds it."""
    return like.get(path, like.get(path[:-1]))


class _Outline:
    """Shape and dtype of a tensor that is sent by itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


def _skeleton(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Outline(value)
    return {key: _skeleton(item) for key, item in value.items()} if isinstance(value, dict) else value


def is_broken(error: BaseException) -> bool:
    """Whether a connection between ranks has ended."""
    said = str(error)
    return isinstance(error, dist.DistError) or any(
        word in said for word in ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL")
    )


def _meet(world: World, device: torch.device) -> dist.Store:
    patience = MEETING if world.launched else PATIENCE
    found, _, _ = next(iter(dist.rendezvous("env://", world.rank, world.size, timeout=patience)))
    found.set_timeout(PATIENCE)
    store = dist.PrefixStore(agreed_name(found, world.rank, world.size), found)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("whetstone", store),
        rank=world.rank,
        world_size=world.size,
        timeout=PATIENCE,
        device_id=torch.device("cuda", world.local_rank) if device.type == "cuda" else None,
    )
    return store


def _mesh(device: torch.device, degrees: Degrees) -> DeviceMesh:
    """`shard`, with `replicate` before it and `tensor` behind where these are above 1."""
    sizes = {"replicate": degrees.replicate, "shard": degrees.shard, TENSOR: degrees.tensor}
    names = [name for name, size in sizes.items() if size > 1 or name == "shard"]
    return init_device_mesh(device.type, tuple(sizes[name] for name in names), mesh_dim_names=tuple(names))
