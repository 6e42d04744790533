"""What every rank of a server does: hear what changes, take a step, again and again."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from dcp.inference.batching import Batcher
from dcp.inference.requests import Orders, pack_orders, unpack_orders
from dcp.inference.server.inbox import Inbox


def take_steps(
    batcher: Batcher,
    inbox: Inbox | None,
    *,
    group: dist.ProcessGroup | None,
    device: torch.device | str = "cpu",
) -> None:
    """Serve until the first rank says that all is over.

    Args:
        inbox: of the first rank, where requests come in and pieces go out; None on the others.
        group: the ranks; None: there is one.
    """
    while True:
        orders = None if inbox is None else inbox.take(can_wait=batcher.is_idle)
        orders = spread(orders, group=group, device=device)
        if orders.ends:
            return
        for each in orders.leaves:
            batcher.leave(each)
        for request in orders.joins:
            batcher.join(request)
        pieces = batcher.step()
        if inbox is not None:
            inbox.deliver(pieces)


def spread(
    orders: Orders | None, *, group: dist.ProcessGroup | None, device: torch.device | str
) -> Orders:
    """The first rank's orders on every rank: of most steps a lone 0, for nothing changes."""
    message = pack_orders(orders) if orders else b""
    if group is not None and dist.get_world_size(group) > 1:
        size = torch.tensor([len(message)], device=device)
        dist.broadcast(size, group=group, group_src=0)
        found = torch.empty(int(size), dtype=torch.uint8, device=device)
        if message:
            found.copy_(torch.from_numpy(np.frombuffer(message, dtype=np.uint8).copy()))
        if len(found):
            dist.broadcast(found, group=group, group_src=0)
        message = found.cpu().numpy().tobytes()
    return unpack_orders(message) if message else Orders()
