"""Attention of new tokens over the caches of N ranks, turn by turn and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dcp.inference.cache import KVCache, SequenceId
from dcp.inference.paging import in_pages, keys_stay
from dcp.plans import Plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, LocalWorld
from dcp.runtime.prepared import PreparedPlan
from dcp.runtime.session import Call


@dataclass(frozen=True)
class _Share:
    """One rank's part of a turn: its program, the rows of its new tokens, and of all its keys.

    ``all_rows`` is None where the program reads the pool itself.
    """

    plan: PreparedPlan
    new_rows: Tensor
    all_rows: Tensor | None


class CachedAttention:
    """What a model's attention layers call during inference.

    Args:
        caches: the cache of this process's rank of ``group``; or those of all ranks, in order:
            then all ranks run in this process, and no group is used.
        group: as :class:`dcp.AttentionExecutor` takes it.
        kernel: ``"auto"`` or a name of :data:`dcp.runtime.kernels.KERNELS`.
    """

    def __init__(
        self,
        caches: Sequence[KVCache],
        *,
        group: dist.ProcessGroup | None = None,
        kernel: str = "auto",
    ) -> None:
        self.caches, self.kernel = list(caches), kernel
        num_ranks = self.caches[0].num_ranks
        self.is_local = group is None and len(self.caches) == num_ranks
        self._executor = None if self.is_local else AttentionExecutor(group, kernel=kernel)
        ranks = [cache.rank for cache in self.caches]
        wanted = list(range(num_ranks)) if self._executor is None else [self._executor.rank]
        if ranks != wanted:
            raise ValueError(f"the caches are of ranks {ranks}, this process needs {wanted}")
        self.plan: Plan | None = None
        self._shares: list[_Share] = []
        self._world: LocalWorld | None = None

    @property
    def rank_plan(self) -> RankPlan | None:
        """This rank's plan of the turn; None where all ranks run in this process."""
        return None if self.is_local or not self._shares else self._shares[0].plan.plan

    def begin(self, plan: Plan, sequences: Sequence[SequenceId]) -> None:
        """Start a turn: make room for its new tokens, and run ``plan`` until the next one.

        Args:
            plan: of :func:`dcp.inference.plan_turn`, for what the caches hold of ``sequences``.

        Where it fails, the caches are as they were, and no turn has begun.
        """
        new = new_tokens(plan)
        cached = plan.num_cached.tolist()
        held = self.caches[0].held(sequences).sum(axis=1).tolist()
        if held != cached:
            raise ValueError(f"the plan is for {cached} cached tokens, the cache holds {held}")
        self.plan, self._shares = plan, []
        before = [cache.extent() for cache in self.caches]
        try:
            for cache in self.caches:
                rows = cache.extend(sequences, new)
                self._shares.append(_share(plan, cache, sequences, rows))
        except BaseException:
            self.plan = None
            for cache, extent in zip(self.caches, before, strict=True):
                cache.undo(extent)
            raise
        if self._executor is None:
            self._world = LocalWorld(plan, kernel=self.kernel)
        else:
            self._executor.prepare(self._shares[0].plan)

    def attention(
        self,
        layer: int,
        q: Tensor,
        kv: Tensor,
        *,
        sink: Tensor | None = None,
        call: Call | None = None,
    ) -> Tensor:
        """Cache the new tokens' keys and values and attend to all that their sequences have.

        Args:
            layer: counted from 0.
            q: ``[tokens, heads, head_dim]`` of the rank's new tokens in the plan's order; of all
                new tokens in the global order where all ranks run in this process.
            kv: ``[tokens, 2, kv_heads, head_dim]``, keys first, of the same tokens.
            sink: ``[heads]``, see :meth:`dcp.DCPAttention.apply`.
            call: scale and soft-cap; the defaults of :class:`Call` without it.

        Returns the outputs, like ``q``.
        """
        if self.plan is None:
            raise ValueError("no turn has begun: call begin(plan, sequences) first")
        queries, new = self._split(q), self._split(kv)
        keys = []
        for share, cache, each in zip(self._shares, self.caches, new, strict=True):
            pool = cache.pools[layer]
            pool.index_copy_(0, share.new_rows, each.to(pool.dtype))
            keys.append(pool if share.all_rows is None else pool[share.all_rows])
        host = self._executor or self._world
        assert host is not None
        session = host.session(call or Call())
        session = replace(session, plans=[share.plan for share in self._shares])
        out, _ = session.forward_shards(queries, keys, sink, needs_grad=False)
        return self.plan.unshard(out) if self.is_local else out[0]

    def _split(self, tensor: Tensor) -> list[Tensor]:
        assert self.plan is not None
        ranks = [cache.rank for cache in self.caches]
        return [self.plan.shard(r, tensor) for r in ranks] if self.is_local else [tensor]


def new_tokens(plan: Plan) -> np.ndarray:
    """New tokens of each sequence on each rank, int64 ``[num_sequences, num_ranks]``."""
    counts = np.zeros((len(plan.seqlens), plan.num_ranks), dtype=np.int64)
    length = np.where(plan.is_cached, 0, plan.block_length)
    np.add.at(counts, (plan.block_sequence, plan.owner), length)
    return counts


def _share(plan: Plan, cache: KVCache, sequences: Sequence[SequenceId], rows: np.ndarray) -> _Share:
    """A rank's program: over the pool's own rows where no key travels, else over a copy."""
    rank_plan, device = plan.rank_plan(cache.rank), cache.pools[0].device
    every = None
    if keys_stay(rank_plan.mask_program()):
        rank_plan = in_pages(rank_plan, *cache.row_runs(sequences), len(cache.pools[0]))
    else:
        every = torch.from_numpy(cache.rows(sequences)).to(device)
    return _Share(PreparedPlan(rank_plan), torch.from_numpy(rows).to(device), every)
