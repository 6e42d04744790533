"""Rows of a buffer that travel together: how they are gathered into a message and put in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import RLock

import numpy as np
import torch
from torch import Tensor

Runs = tuple[np.ndarray, np.ndarray]  # first row, rows
# With more runs than this, one gather by row numbers costs less than a copy per run.
MANY_RUNS = 4
# Held while memory is pinned, and while a CUDA graph is captured: pinning in another thread, by
# `ready`, would spoil the capture.
PINNING = RLock()


@dataclass(frozen=True)
class Rows:
    """Some rows of a buffer: few runs as slices, many runs as row numbers on its device."""

    num_rows: int
    where: list[slice] | Tensor

    @cached_property
    def run(self) -> slice | None:
        """The rows as a slice, where they are one run."""
        return self.where[0] if isinstance(self.where, list) and len(self.where) == 1 else None

    @cached_property
    def keys(self) -> Sequence[slice | Tensor]:
        """What the rows are addressed by: one key for all of them, or a slice a run."""
        return [self.where] if isinstance(self.where, Tensor) else self.where

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """The rows of ``tensor``, as views, or as one gathered copy."""
        if isinstance(self.where, Tensor):
            return [tensor.index_select(0, self.where)]
        return [tensor[run] for run in self.where]

    def take(self, tensor: Tensor) -> Tensor:
        """The rows of ``tensor`` ``[num_rows, …]``: a view where they are one run."""
        parts = self.parts(tensor)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add ``values`` ``[num_rows, …]`` to the rows of ``tensor``, of which none is twice."""
        if isinstance(self.where, Tensor):
            tensor.index_add_(0, self.where, values.to(tensor.dtype))
            return
        for part, value in zip(self.parts(tensor), self.split(values), strict=True):
            part += value

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Overwrite the rows of ``tensor`` by ``values`` ``[num_rows, …]``."""
        if isinstance(self.where, Tensor):
            tensor.index_copy_(0, self.where, values.to(tensor.dtype))
            return
        if len(self.where) == 1:
            tensor[self.where[0]] = values
            return
        for run, part in zip(self.where, self.split(values), strict=True):
            tensor[run] = part

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """``values`` ``[num_rows, …]``, or ``[bytes of them]``, by :attr:`keys`."""
        if len(self.keys) == 1:
            return [values]
        assert not isinstance(self.where, Tensor)
        size = len(values) // self.num_rows
        return values.split_with_sizes([size * (run.stop - run.start) for run in self.where])


def place_rows(runs: Sequence[Runs], device: torch.device) -> list[Rows]:
    """Runs of rows, in the order given, for a device; one copy to it in all.

    Neighbours are joined: it changes how many copies fill a message, not the order of its bytes,
    so that either side may join what the other cannot.
    """
    joined = [_joined(row, rows) for row, rows in runs]
    numbers = [
        np.concatenate([np.arange(run.start, run.stop) for run in each])
        for each in joined
        if len(each) > MANY_RUNS
    ]
    on_device = iter(())
    if numbers:
        flat = copy_to_device(np.concatenate(numbers), device)
        on_device = iter(flat.split([len(each) for each in numbers]))
    return [
        Rows(int(rows.sum()), next(on_device) if len(each) > MANY_RUNS else each)
        for (_, rows), each in zip(runs, joined, strict=True)
    ]


def copy_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` on the device: from pinned memory, so that the host need not wait for the copy."""
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host
    with PINNING:
        return host.pin_memory().to(device, non_blocking=True)


def _joined(row: np.ndarray, rows: np.ndarray) -> list[slice]:
    start = np.flatnonzero(np.append(True, row[1:] != row[:-1] + rows[:-1]))
    length = np.add.reduceat(rows, start)
    return [slice(a, a + n) for a, n in zip(row[start].tolist(), length.tolist(), strict=True)]
