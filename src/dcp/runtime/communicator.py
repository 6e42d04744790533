"""How a program's messages travel: between processes, or inside one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dcp.errors import DCPError
from dcp.runtime.agreement import Comparison, digest
from dcp.runtime.prepared import PreparedPlan

ADVICE = (
    "all ranks must prepare the same plan, and call attention in the same order with the same "
    "mask, dtype and options"
)

Messages = dict[int, Tensor]  # one flat uint8 tensor per peer


class CommunicationFailed(DCPError):
    """A message to or from another rank did not arrive."""


class Communicator(Protocol):
    """Starts a communication and completes it.

    ``launch`` returns a generator: exhausting it completes the communication and fills
    ``receives``; each ``yield`` says that it is not complete yet and other ranks must go on.
    """

    def open(self, device: torch.device, prepared: PreparedPlan, facts: Mapping[str, Any]) -> None:
        """Called before a program begins, by every rank, ranks without messages too.

        ``facts`` are what must be the same on all of them in this call.
        """

    def launch(self, sends: Messages, receives: Messages) -> Iterator[None]: ...


class GroupCommunicator:
    """Point-to-point messages over a ``torch.distributed`` process group (gloo or NCCL).

    NCCL runs them on a stream of its own, beside the compute stream: ``wait`` makes the latter wait
    and not the host. Messages on a GPU go over gloo by way of host memory.

    At the first call under a prepared plan the ranks compare what they are about to do, while they
    fill their buffers: a difference raises ``ValueError`` before any message leaves (over NCCL,
    from a group's second plan on, as soon as a later call sees it: the host does not wait). Over
    gloo a message also carries the call as its tag, so that none is ever taken for another.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.is_gloo = dist.get_backend(group) == "gloo"
        self._is_alone = dist.get_world_size(group) == 1
        self._is_open, self._tag = self.is_gloo, 0
        self._comparison: tuple[PreparedPlan, Comparison] | None = None

    def connect(self, device: torch.device) -> bool:
        """NCCL connects a group at its first operation, which all ranks must take part in: messages
        between some of them would hang. Returns whether this was the first."""
        first = not self._is_open and device.type == "cuda"
        if first:
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
            self._is_open = True
        return first

    def open(self, device: torch.device, prepared: PreparedPlan, facts: Mapping[str, Any]) -> None:
        """Connect, and begin to compare what the ranks are about to do."""
        first = self.connect(device)
        if self._is_alone or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        if self.is_gloo:
            self._tag = digest(facts) & 0x7FFFFFFF
        self._settle(wait=self.is_gloo or not prepared.is_compared)
        if not prepared.is_compared:
            self._comparison = prepared, Comparison(self.group, facts, advice=ADVICE)
            prepared.is_compared = True
            self._settle(wait=first)

    def _settle(self, *, wait: bool) -> None:
        """Hear how the comparison came out."""
        if self._comparison is None or not (wait or self._comparison[1].is_done):
            return
        (prepared, comparison), self._comparison = self._comparison, None
        try:
            comparison.finish()
        except ValueError:
            prepared.is_compared = False
            raise
        except RuntimeError as error:
            raise self._failed("not all ranks began the call of attention", error) from None

    def _failed(self, what: str, error: RuntimeError) -> CommunicationFailed:
        reason = (str(error).strip().splitlines() or [""])[0]
        return CommunicationFailed(
            f"rank {self.rank}: {what}: one of them died, or does something else ({ADVICE}): "
            f"{reason}"
        )

    def launch(self, sends: Messages, receives: Messages) -> Iterator[None]:
        arriving = receives
        if self.is_gloo:  # a message that is on the host already stays as it is
            sends = {peer: message.cpu() for peer, message in sends.items()}
            arriving = {peer: _on_host(message) for peer, message in receives.items()}
            self._settle(wait=True)
        operations = [self._operation(dist.irecv, arriving[peer], peer) for peer in arriving]
        operations += [self._operation(dist.isend, sends[peer], peer) for peer in sends]
        works = dist.batch_isend_irecv(operations) if operations else []
        return self._complete(works, sends, arriving, receives)

    def _operation(self, kind: Callable[..., Any], message: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, message, group=self.group, group_peer=peer, tag=self._tag)

    def _complete(
        self, works: list[dist.Work], sends: Messages, arriving: Messages, receives: Messages
    ) -> Iterator[None]:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            peers = ", ".join(map(str, sorted({*sends, *arriving})))
            raise self._failed(f"messages with ranks {peers} did not arrive", error) from None
        sends.clear()  # the messages had to live until here
        for peer, message in arriving.items():
            if message is not receives[peer]:
                receives[peer].copy_(message)
        yield from ()


class LocalPost:
    """Letter boxes between ranks that live in one process."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        self.num_handled = 0  # messages posted and fetched so far

    def rank(self, rank: int) -> LocalCommunicator:
        """The communicator of one of the ranks."""
        return LocalCommunicator(rank, self)

    def run(self, programs: Sequence[Iterator[None]]) -> None:
        """Drive all ranks' programs, turn by turn, until every one has ended."""
        waiting = list(programs)
        while waiting:
            before = self.num_handled
            still = [program for program in waiting if next(program, _ENDED) is not _ENDED]
            stuck = len(still) == len(waiting) and self.num_handled == before
            assert not stuck, f"deadlock: {len(still)} ranks wait for each other"
            waiting = still
        assert not any(self.boxes.values()), "a message was sent that nobody received"


class LocalCommunicator:
    """One rank's end of a :class:`LocalPost`."""

    def __init__(self, rank: int, post: LocalPost) -> None:
        self.rank, self.post = rank, post

    def open(self, *_: Any) -> None:
        """Nothing to connect, and one plan for all."""

    def launch(self, sends: Messages, receives: Messages) -> Iterator[None]:
        for peer, message in sends.items():
            is_lent = message.untyped_storage().nbytes() > message.nbytes  # rows of a buffer
            self.post.boxes[self.rank, peer].append(message.clone() if is_lent else message)
            self.post.num_handled += 1
        return self._complete(receives)

    def _complete(self, receives: Messages) -> Iterator[None]:
        for peer, message in receives.items():
            box = self.post.boxes[peer, self.rank]
            while not box:
                yield
            arrived = box.pop(0)
            self.post.num_handled += 1
            assert arrived.shape == message.shape, f"rank {self.rank} got a message of another size"
            message.copy_(arrived)


def _on_host(message: Tensor) -> Tensor:
    return message if message.device.type == "cpu" else torch.empty_like(message, device="cpu")


_ENDED = object()
