"""How a program's messages travel: between processes, or inside one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Messages = dict[int, Tensor]  # one flat uint8 tensor per peer


class Communicator(Protocol):
    """Starts a communication and completes it.

    ``launch`` returns a generator: exhausting it completes the communication and fills
    ``receives``; each ``yield`` says that it is not complete yet and other ranks must go on.
    """

    def open(self, device: torch.device) -> None:
        """Called before a program begins, by every rank, ranks without messages too."""

    def launch(self, sends: Messages, receives: Messages) -> Iterator[None]: ...


class GroupCommunicator:
    """Point-to-point messages over a ``torch.distributed`` process group (gloo or NCCL).

    NCCL runs them on a stream of its own, beside the compute stream: ``wait`` makes the latter wait
    and not the host. Messages on a GPU go over gloo by way of host memory.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.is_gloo = dist.get_backend(group) == "gloo"
        self._is_open = self.is_gloo

    def open(self, device: torch.device) -> None:
        """NCCL connects a group at its first operation, which all ranks must take part in: messages
        between some of them would hang."""
        if not self._is_open and device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
            self._is_open = True

    def launch(self, sends: Messages, receives: Messages) -> Iterator[None]:
        arriving = receives
        if self.is_gloo:  # a message that is on the host already stays as it is
            sends = {peer: message.cpu() for peer, message in sends.items()}
            arriving = {peer: _on_host(message) for peer, message in receives.items()}
        operations = [self._operation(dist.irecv, arriving[peer], peer) for peer in arriving]
        operations += [self._operation(dist.isend, sends[peer], peer) for peer in sends]
        works = dist.batch_isend_irecv(operations) if operations else []
        return self._complete(works, sends, arriving, receives)

    def _operation(self, kind: Callable[..., Any], message: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, message, group=self.group, group_peer=peer)

    @staticmethod
    def _complete(
        works: list[dist.Work], sends: Messages, arriving: Messages, receives: Messages
    ) -> Iterator[None]:
        for work in works:
            work.wait()
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

    def open(self, device: torch.device) -> None:
        """Nothing to connect."""

    def launch(self, sends: Messages, receives: Messages) -> Iterator[None]:
        for peer, message in sends.items():
            self.post.boxes[self.rank, peer].append(message)
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
