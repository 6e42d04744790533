"""Messages between ranks: rows of a buffer's fields, as flat bytes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from dcp.runtime.rows import Rows


class Part(NamedTuple):
    """Some rows of a field of a buffer, in a message."""

    buffer: int
    field: int
    tensor: Tensor
    dtype: torch.dtype
    rows: Rows

    @property
    def num_bytes(self) -> int:
        return self.rows.num_rows * prod(self.tensor.shape[1:]) * self.dtype.itemsize


def in_place(parts: list[Part]) -> Tensor | None:
    """The rows of a message where they lie, flat bytes, if it can be sent from and received there:
    one run of one field, in the dtype in which it travels."""
    if len(parts) > 1:
        return None
    [part] = parts
    if part.rows.run is None or part.tensor.dtype != part.dtype:
        return None
    return part.tensor[part.rows.run].view(-1).view(torch.uint8)


def packed(parts: list[Part]) -> Tensor:
    """A message of its own. Where dtypes change, runs are converted straight into it."""
    if all(part.tensor.dtype == part.dtype for part in parts):
        runs = [run for part in parts for run in part.rows.parts(part.tensor)]
        flat = [run.reshape(-1).view(torch.uint8) for run in runs]
        return flat[0] if len(flat) == 1 else torch.cat(flat)
    sizes = [part.num_bytes for part in parts]
    message = torch.empty(sum(sizes), dtype=torch.uint8, device=parts[0].tensor.device)
    for place, part in zip(message.split_with_sizes(sizes), parts, strict=True):
        runs = part.rows.parts(part.tensor)
        for to, run in zip(part.rows.split(place.view(part.dtype)), runs, strict=True):
            to.copy_(run.reshape(-1))
    return message


def unpacked(message: Tensor, parts: list[Part]) -> Iterator[tuple[Part, Tensor]]:
    """The values ``[rows, …]`` of each part: views of the message."""
    pieces = message.split_with_sizes([part.num_bytes for part in parts])
    for part, piece in zip(parts, pieces, strict=True):
        yield part, piece.view(part.dtype).view(-1, *part.tensor.shape[1:])
