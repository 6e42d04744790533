"""How a planned batch reaches the ranks: each rank's share, through the job's own store."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dcp import wire
from dcp.data.planning import PlanningError
from dcp.program import RankPlan

_KIND = "batch-share"


@dataclass(frozen=True)
class Share:
    """What one rank gets of a planned batch.

    Attributes:
        pieces: (document, start, stop, the document's tokens) of every sequence, int64 ``[n, 4]``.
        num_loss_tokens: tokens with a label in the whole batch.
        last: the batch ends its epoch.
        plan: the rank's ``RankPlan`` as bytes.
    """

    pieces: np.ndarray
    num_loss_tokens: int
    last: bool
    plan: bytes

    def to_bytes(self) -> bytes:
        meta = {"num_loss_tokens": self.num_loss_tokens, "last": self.last}
        arrays = {"pieces": self.pieces, "plan": np.frombuffer(self.plan, np.uint8)}
        return wire.pack(_KIND, meta, arrays)

    @classmethod
    def from_bytes(cls, message: bytes) -> Share:
        """Read a share; :class:`PlanningError` where the planning rank sent its error instead."""
        meta, arrays = wire.unpack(_KIND, message)
        if "error" in meta:
            raise PlanningError(meta["error"])
        return cls(
            arrays["pieces"], meta["num_loss_tokens"], meta["last"], arrays["plan"].tobytes()
        )

    def rank_plan(self) -> RankPlan:
        return RankPlan.from_bytes(self.plan)


class SingleRank:
    """The exchange of a world of one rank: nobody to tell."""

    rank, num_ranks = 0, 1

    def publish(self, key: str, shares: Sequence[Share]) -> None:
        """Nothing to do."""

    def publish_error(self, key: str, error: str) -> None:
        """Nothing to do: the error is raised here."""

    def fetch(self, key: str, planning_rank: int) -> Share:
        raise AssertionError("a single rank plans everything itself")

    def close(self) -> None:
        """Nothing to do."""


class StoreExchange:
    """Shares in the store of a process group, under a key per batch and rank.

    Constructing it is collective over the group. A share is deleted when it is read.
    """

    def __init__(self, group: dist.ProcessGroup, *, timeout_seconds: float) -> None:
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._timeout, self._closed = timedelta(seconds=timeout_seconds), False
        store: Any = group.get_group_store()
        # A clone has its own connection: publishing threads never wait behind a blocking read.
        store = store.clone()
        self._store: Any = dist.PrefixStore(f"dcp-loader/{_common_number(group)}", store)

    def publish(self, key: str, shares: Sequence[Share]) -> None:
        """Leave every other rank its share."""
        self._set(key, [share.to_bytes() for share in shares])

    def publish_error(self, key: str, error: str) -> None:
        """Let every other rank raise what this one raises."""
        message = wire.pack(_KIND, {"error": f"rank {self.rank} could not plan: {error}"}, {})
        self._set(key, [message] * self.num_ranks)

    def fetch(self, key: str, planning_rank: int) -> Share:
        """Wait for this rank's share of a batch that another rank plans."""
        key = f"{key}/{self.rank}"
        try:
            self._store.wait([key], self._timeout)
            message = self._store.get(key)
        except RuntimeError as error:  # torch's kinds for a timeout and for a lost store
            reason = str(error).splitlines()[0]
            raise PlanningError(f"rank {planning_rank} sent no plan: {reason}") from None
        self._store.delete_key(key)
        return Share.from_bytes(message)

    def close(self) -> None:
        """Publish nothing more: the store may be gone before the last plan is finished."""
        self._closed = True

    def _set(self, key: str, messages: Sequence[bytes]) -> None:
        for rank, message in enumerate(messages):
            if rank != self.rank and not self._closed:
                self._store.set(f"{key}/{rank}", message)


Exchange = SingleRank | StoreExchange


class Planned:
    """A batch on its way: the other ranks get their shares as soon as its plan is finished."""

    def __init__(
        self, exchange: Exchange, key: str, share: Share, future: Future[list[bytes]]
    ) -> None:
        self.exchange, self.key, self.share, self.future = exchange, key, share, future
        self._published = threading.Event()
        future.add_done_callback(self._publish)

    def own_share(self, timeout: float) -> Share:
        """The planning rank's own share, once the others have theirs."""
        try:
            rank_plans = self.future.result(timeout)
        finally:
            if self.future.done():
                self._published.wait(timeout)
        return replace(self.share, plan=rank_plans[self.exchange.rank])

    def _publish(self, future: Future[list[bytes]]) -> None:
        """Runs in the pool's thread."""
        try:
            if future.cancelled():
                return
            if error := future.exception():
                self.exchange.publish_error(self.key, str(error))
            else:
                shares = [replace(self.share, plan=plan) for plan in future.result()]
                self.exchange.publish(self.key, shares)
        finally:
            self._published.set()


def make_exchange(group: Any, *, timeout_seconds: float) -> Exchange:
    """The exchange of a process group; None is a world of one rank."""
    if group is None:
        return SingleRank()
    return StoreExchange(group, timeout_seconds=timeout_seconds)


def _common_number(group: dist.ProcessGroup) -> int:
    """A random number that all ranks of the group share."""
    on_gpu = "nccl" in dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    seed = int(np.random.default_rng().integers(1 << 62))
    number = torch.tensor([seed], dtype=torch.int64, device=device)
    dist.broadcast(number, src=dist.get_global_rank(group, 0), group=group)
    return int(number)
