"""Sums over ranks, and what all of them have of the first."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_over_ranks(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each tensor by its sum over the group, in one all-reduce per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat, group=group)
        for tensor, total in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(total.view_as(tensor))


def spread_weights(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank the first one's parameters and buffers."""
    first = dist.get_global_rank(group, 0)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=first, group=group)
