"""Ranks that share samples for one iteration: all-to-all exchanges without a communicator of their
own.

Messages go point to point over the process group of all ranks, so that a group of any ranks exists
the moment it is named, and costs nothing to switch to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcp.datacentric.draw import split_evenly
from dcp.runtime.communicator import Communicator


class SequenceGroup:
    """Ranks ``first`` to ``first + size - 1``; this process is number ``index`` among them.

    Args:
        communicator: carries messages between all ranks; not used by a group of one.
    """

    def __init__(
        self, first: int, size: int, rank: int, communicator: Communicator | None = None
    ) -> None:
        assert first <= rank < first + size, f"rank {rank} is not in {first}..{first + size - 1}"
        assert size == 1 or communicator is not None, "several ranks need a communicator"
        self.first, self.size, self.index = first, size, rank - first
        self._communicator = communicator

    def part(self, total: int) -> slice:
        """This rank's rows of ``total``: nearly equal parts, some of them perhaps empty."""
        sizes = split_evenly(total, self.size)
        start = sum(sizes[: self.index])
        return slice(start, start + sizes[self.index])

    def switch(self, x: Tensor, *, gather: int, split: int, total: int) -> Tensor:
        """Exchange so that dimension ``gather`` is whole here, and ``split`` shared out instead.

        Args:
            x: this rank's part along ``gather``, everything along ``split``.
            total: size of ``gather`` over all ranks.

        Every rank of the group must call it. Differentiable: the gradient goes the way back.
        """
        if self.size == 1:
            return x
        return _Switch.apply(x, self, gather, split, total)

    def exchange(self, x: Tensor, gather: int, split: int, total: int) -> Tensor:
        """:meth:`switch` of values alone."""
        sends = [
            part.contiguous() for part in x.split(split_evenly(x.shape[split], self.size), split)
        ]
        shape = list(x.shape)
        shape[split] = sends[self.index].shape[split]
        receives = []
        for size in split_evenly(total, self.size):
            shape[gather] = size
            receives.append(x.new_empty(shape))
        receives[self.index] = sends[self.index]
        self.before_messages(x.device)
        self._deliver(sends, receives)
        return torch.cat(receives, gather)

    def before_messages(self, device: torch.device) -> None:
        """Runs in every exchange when all that it needs is allocated."""

    def _deliver(self, sends: list[Tensor], receives: list[Tensor]) -> None:
        assert self._communicator is not None
        for _ in self._communicator.launch(self._messages(sends), self._messages(receives)):
            pass

    def _messages(self, parts: list[Tensor]) -> dict[int, Tensor]:
        """Bytes to or from every other rank that has any."""
        return {
            self.first + peer: part.view(-1).view(torch.uint8)
            for peer, part in enumerate(parts)
            if peer != self.index and part.numel()
        }


class PeerFailed(RuntimeError):
    """Another rank of the group failed; it has the reason."""


class CheckedGroup(SequenceGroup):
    """A group that loses a rank without waiting for it: before every exchange all tell all how they
    are. A rank that failed calls :meth:`meet` where its next exchange would have been, one that is
    done calls it once more."""

    def before_messages(self, device: torch.device) -> None:
        self.meet(device)

    def meet(self, device: torch.device, *, failed: bool = False) -> None:
        """Tell the others how this rank is; raises :class:`PeerFailed` where another one failed."""
        if self.size == 1:
            return
        said = [torch.full((1,), failed, dtype=torch.uint8, device=device)] * self.size
        heard = [torch.zeros_like(word) for word in said]
        self._deliver(said, heard)
        if torch.stack(heard).any():
            raise PeerFailed("another rank of the group failed")


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: SequenceGroup, gather: int, split: int, total: int
    ) -> Tensor:
        ctx.back = (group, split, gather, x.shape[split])
        return group.exchange(x, gather, split, total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, gather, split, total = ctx.back
        return group.exchange(gradients[0], gather, split, total), None, None, None, None
