"""Rank 0 of a distributed learner, and the loop that the other ranks run.

`LeadingLearner` is a `Learner` to whatever uses it. Before each call that takes all ranks it tells the
followers which one, with their rows; then every rank, rank 0 too, makes the same call on its own `Learner`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.batch import Row
from trainer.errors import NonFiniteError
from trainer.learner import Learner
from trainer.model import WeightStream
from trainer.parallel.balance import Costs, deal
from trainer.parallel.channel import Channel
from trainer.parallel.mesh import Team
from trainer.parallel.messages import Message, rows_from_arrays, rows_to_arrays
from trainer.parallel.roll_call import WAITING, Activity

logger = logging.getLogger(__name__)

BUILD, END = "build", "end"
"""Commands beside the calls: the first and the last."""


class LeadingLearner(Learner):
    """The learner that the loop talks to, on rank 0. Close it, and the others end."""

    ranks: Team

    def __init__(self, *arguments: Any, ranks: Team, **options: Any) -> None:
        """As `Learner`; the other ranks build a plain `Learner` with the same arguments meanwhile."""
        super().__init__(*arguments, ranks=ranks, **options)
        self._channel: Channel = ranks.channel
        self._costs = Costs.of(self.policy)
        self._broken = False

    def update(self, minibatches: Sequence[Sequence[Row]]) -> list[dict[str, float]]:
        """See `Learner.update`; metrics are those of all ranks together."""
        distinct = {id(rows): rows for rows in minibatches}
        places = {key: place for place, key in enumerate(distinct)}
        order = [places[id(rows)] for rows in minibatches]
        shares = self._shares(list(distinct.values()))
        with self._together("update", shares, order=order):
            return super().update([shares[0][place] for place in order])

    def end_rollout(self) -> None:
        """See `Learner.end_rollout`."""
        with self._together("end_rollout"):
            super().end_rollout()

    def offload(self) -> None:
        """See `Learner.offload`; every rank frees its part. Nothing is told when nothing would move."""
        if self._state_offload.on:
            with self._together("offload"):
                super().offload()

    def score_rows(self, rows: Sequence[Row], temperature: float) -> list[list[float]]:
        """See `Learner.score_rows`."""
        own = super().score_rows
        return self._scored("score_rows", rows, lambda mine: own(mine, temperature), temperature=temperature)

    def reference_logprobs(self, rows: Sequence[Row]) -> list[list[float]]:
        """See `Learner.reference_logprobs`."""
        return self._scored("reference_logprobs", rows, super().reference_logprobs)

    def weights(self, dtype: torch.dtype | None = None) -> WeightStream:
        """See `Learner.weights`; each tensor is gathered when its turn comes. A pass must go to its end."""
        return WeightStream(lambda: self._gathering(dtype or self.dtype))

    def merge_gap(self, dtype: torch.dtype | None = None) -> float:
        """See `Learner.merge_gap`."""
        if not self.has_adapter:
            return 0.0
        with self._together("merge_gap", dtype=_name(dtype or self.dtype)):
            return super().merge_gap(dtype)

    def adapter_weights(self) -> dict[str, Tensor]:
        """See `Learner.adapter_weights`."""
        with self._together("adapter_weights"):
            return super().adapter_weights()

    def state_dict(self) -> dict[str, Any]:
        """See `Learner.state_dict`: whole tensors, as one process has them, so that any number can go on."""
        with self._together("state_dict"):
            return super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Learner.load_state_dict`; `state` may come from any number of ranks."""
        with self._together("load_state_dict"):
            super().load_state_dict(state)

    def close(self) -> None:
        """Let the followers end; safe to call twice, and after a failure, when their connections end them."""
        super().close()
        if not self._broken:
            self._broken = True
            self._tell(END)

    # ------------------------------------------------------------ telling the others

    def _shares(self, batches: Sequence[Sequence[Row]]) -> list[list[list[Row]]]:
        """By rank, its rows of each batch."""
        dealt = [deal(rows, self.ranks.size, self._costs) for rows in batches]
        return [
            [[rows[index] for index in share[rank]] for rows, share in zip(batches, dealt)]
            for rank in range(self.ranks.size)
        ]

    def _scored(
        self,
        command: str,
        rows: Sequence[Row],
        own: Callable[[Sequence[Row]], list[list[float]]],
        **options: Any,
    ) -> list[list[float]]:
        """Log-probs of `rows`, each computed by the rank that has it."""
        indices = deal(rows, self.ranks.size, self._costs)
        shares = [[[rows[index] for index in mine]] for mine in indices]
        scores: list[list[float]] = [[] for _ in rows]
        with self._together(command, shares, **options):
            answers = [own(shares[0][0]), *map(_scores, self._channel.answers())]
            found = answers[:: self.ranks.tensor]
        for mine, values in zip(indices, found, strict=True):
            for index, row in zip(mine, values, strict=True):
                scores[index] = row
        return scores

    def _gathering(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The weights, one gathered after another; the followers gather along."""
        with self._together("weights", dtype=_name(dtype)):
            yield from super().weights(dtype)

    @contextmanager
    def _together(
        self, command: str, shares: Sequence[Sequence[Sequence[Row]]] = (), **options: Any
    ) -> Iterator[None]:
        """Have the followers make a call that this block makes on rank 0.

        Raises RankError when another rank failed in it. After anything but a loss or gradient that is not
        finite, which all ranks agree on, the ranks are out of step and the learner is of no more use.
        """
        try:
            self._tell(command, shares, **options)
            yield
        except NonFiniteError:
            raise
        except BaseException as error:
            self._broken = True
            explained = self.ranks.explain(error)
            if explained is error:
                raise
            raise explained from error

    def _tell(self, command: str, shares: Sequence[Sequence[Sequence[Row]]] = (), **options: Any) -> None:
        if shares:
            content = [Message(command, options, rows_to_arrays(share)).encode() for share in shares]
            self._channel.send([content[self.ranks.share(rank)] for rank in range(1, self.ranks.world_size)])
        else:
            self._channel.tell_all(Message(command, options).encode())


def call_to_build(channel: Channel) -> None:
    """Let the followers build their learner; rank 0 builds its own now."""
    channel.tell_all(Message(BUILD).encode())


def wait_to_build(channel: Channel) -> None:
    """Wait until rank 0 builds its learner. Raises RuntimeError when it is gone."""
    message = Message.decode(channel.receive())
    assert message.command == BUILD, message.command


def follow(learner: Learner, channel: Channel, activity: Activity) -> None:
    """Make the calls that rank 0 tells of, until it says `end`; `activity` is told which.

    Raises RuntimeError when rank 0 is gone, and whatever a call raises, but for a loss or gradient that is
    not finite: rank 0 raises that too and decides what comes of it.
    """
    while True:
        message = Message.decode(channel.receive())
        if message.command == END:
            return
        activity.begin(message.command)
        try:
            answer = _CALLS[message.command](learner, message)
        except NonFiniteError:
            answer = None
        if answer is not None:
            channel.answer(answer.encode())
        activity.begin(WAITING)


def _update(learner: Learner, message: Message) -> None:
    batches = rows_from_arrays(message.arrays)
    learner.update([batches[place] for place in message.arguments["order"]])


def _reference_logprobs(learner: Learner, message: Message) -> Message:
    (rows,) = rows_from_arrays(message.arrays)
    return _answer(learner.reference_logprobs(rows))


def _score_rows(learner: Learner, message: Message) -> Message:
    (rows,) = rows_from_arrays(message.arrays)
    return _answer(learner.score_rows(rows, message.arguments["temperature"]))


def _weights(learner: Learner, message: Message) -> None:
    for _ in learner.weights(getattr(torch, message.arguments["dtype"])):
        pass


def _answer(scores: list[list[float]]) -> Message:
    lengths = torch.tensor([len(row) for row in scores], dtype=torch.int64)
    values = torch.tensor([value for row in scores for value in row], dtype=torch.float32)
    return Message("scores", arrays={"lengths": lengths, "values": values})


def _scores(answer: bytes) -> list[list[float]]:
    arrays = Message.decode(answer).arrays
    return [part.tolist() for part in arrays["values"].split(arrays["lengths"].tolist())]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _merge_gap(learner: Learner, message: Message) -> None:
    learner.merge_gap(getattr(torch, message.arguments["dtype"]))


def _discard(_: Any) -> None:
    """A result that only rank 0 wants; every rank helped to gather it."""


_CALLS: dict[str, Callable[[Learner, Message], Message | None]] = {
    "update": _update,
    "end_rollout": lambda learner, _: learner.end_rollout(),
    "offload": lambda learner, _: learner.offload(),
    "reference_logprobs": _reference_logprobs,
    "score_rows": _score_rows,
    "weights": _weights,
    "merge_gap": _merge_gap,
    "adapter_weights": lambda learner, _: _discard(learner.adapter_weights()),
    "state_dict": lambda learner, _: _discard(learner.state_dict()),
    "load_state_dict": lambda learner, _: learner.load_state_dict({}),
}
"""What each command does on a follower."""
