"""Ranks that share samples for one iteration: all-to-all exchanges without a communicator of their
own.

Messages go point to point over the process group of all ranks, so that a group of any ranks exists
the moment it is named, and costs nothing to switch to.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def switch(
        self,
        x: Tensor,
        *,
        gather: int,
        split: int,
        total: int | Sequence[int],
        parted: Sequence[int] | None = None,
    ) -> Tensor:
        """Exchange so that dimension ``gather`` is whole here, and ``split`` shared out instead.

        Args:
            x: this rank's part along ``gather``, everything along ``split``.
            total: size of ``gather`` over all ranks; or of each of several runs of it, where every
                rank has its part of each, one after the other. They are whole in the same order.
            parted: of ``split`` likewise, where it has several runs.

        Every rank of the group must call it. Differentiable: the gradient goes the way back.
        """
        if self.size == 1:
            return x
        return _Switch.apply(x, self, gather, split, _runs(total), parted or (x.shape[split],))

    def gather(self, x: Tensor, *, dim: int, total: int | Sequence[int]) -> Tensor:
        """Every rank's part along ``dim``, whole on every rank; ``total`` as in :meth:`switch`.

        Differentiable: the gradients that all ranks have of a part are added up where it came from.
        """
        if self.size == 1:
            return x
        return _Gather.apply(x, self, dim, _runs(total))

    def exchange(
        self, x: Tensor, gather: int, split: int, total: Sequence[int], parted: Sequence[int]
    ) -> Tensor:
        """:meth:`switch` of values alone, ``split`` consisting of runs of the sizes ``parted``."""
        sends = self._cut(x, split, parted)
        shape = list(sends[self.index].shape)
        return self._joined(self._swapped(sends, self._shapes(shape, gather, total)), gather, total)

    def collect(self, x: Tensor, dim: int, total: Sequence[int]) -> Tensor:
        """:meth:`gather` of values alone."""
        shapes = self._shapes(list(x.shape), dim, total)
        return self._joined(self._swapped([x.contiguous()] * self.size, shapes), dim, total)

    def sum_parts(self, x: Tensor, dim: int, total: Sequence[int]) -> Tensor:
        """This rank's part along ``dim`` of the sum of all ranks' ``x``."""
        sends = self._cut(x, dim, total)
        shapes = [list(sends[self.index].shape)] * self.size
        return torch.stack(self._swapped(sends, shapes)).sum(0)

    def _cut(self, x: Tensor, dim: int, total: Sequence[int]) -> list[Tensor]:
        """Every rank's part of ``x``."""
        runs = [
            run.split(split_evenly(run.shape[dim], self.size), dim)
            for run in x.split(list(total), dim)
        ]
        return [torch.cat(parts, dim) for parts in zip(*runs, strict=True)]

    def _joined(self, parts: list[Tensor], dim: int, total: Sequence[int]) -> Tensor:
        """The whole of which :meth:`_cut` makes these parts."""
        sizes = zip(*(split_evenly(size, self.size) for size in total), strict=True)
        cut = [part.split(list(own), dim) for part, own in zip(parts, sizes, strict=True)]
        return torch.cat([part for run in zip(*cut, strict=True) for part in run], dim)

    def _shapes(self, shape: list[int], dim: int, total: Sequence[int]) -> list[list[int]]:
        """``shape`` with every rank's size along ``dim``."""
        sizes = zip(*(split_evenly(size, self.size) for size in total), strict=True)
        return [[*shape[:dim], sum(own), *shape[dim + 1 :]] for own in sizes]

    def _swapped(self, sends: list[Tensor], shapes: list[list[int]]) -> list[Tensor]:
        """What every rank sent to this one, in these shapes."""
        receives = [sends[self.index].new_empty(shape) for shape in shapes]
        receives[self.index] = sends[self.index]
        self.before_messages(sends[self.index].device)
        self._deliver(sends, receives)
        return receives

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


def _runs(total: int | Sequence[int]) -> tuple[int, ...]:
    return (total,) if isinstance(total, int) else tuple(total)


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, *way: Any) -> Tensor:
        gather, split, total, parted = way
        ctx.back = (group, split, gather, parted, total)
        return group.exchange(x, *way)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, *way = ctx.back
        return group.exchange(gradients[0], *way), None, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, *way: Any) -> Tensor:
        ctx.back = (group, *way)
        return group.collect(x, *way)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, *way = ctx.back
        return group.sum_parts(gradients[0], *way), None, None, None
