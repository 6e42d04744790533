"""Attention of new tokens over the caches of N ranks, turn by turn and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dcp.cluster import Cluster
from dcp.inference.cache import KVCache, SequenceId
from dcp.inference.paging import in_pages, keys_stay
from dcp.inference.reach import Reach
from dcp.inference.turn import plan_turn
from dcp.plans import Plan
from dcp.ragged import split
from dcp.runtime import AttentionExecutor, LocalWorld
from dcp.runtime.executor import BoundPlan
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


@dataclass(frozen=True)
class _Kind:
    """A turn in the layers of one kind: their plan, who runs it, and the shares of ranks here."""

    plan: Plan
    host: LocalWorld | BoundPlan
    shares: list[_Share]


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
        self._kinds: list[_Kind] = []
        self.num_cached = np.zeros(0, dtype=np.int64)  # of each sequence of the turn
        self.longest = 0  # tokens of the longest of them, the new ones counted in
        self.compared: set[Any] = set()  # what layers ask for and what they get, in this turn

    @property
    def plan(self) -> Plan | None:
        """The turn's plan for the first layer; the new tokens are shared out alike in all plans.
        None where no turn has begun."""
        return self._kinds[self.caches[0].layers[0]].plan if self._kinds else None

    def reach_of(self, layer: int) -> Reach:
        """How far back a layer sees."""
        cache = self.caches[0]
        return cache.kinds[cache.layers[layer]]

    def plans(
        self,
        sequences: Sequence[SequenceId],
        new: Sequence[int],
        cluster: Cluster,
        **options: Any,
    ) -> list[Plan]:
        """Plan a turn for each kind of layers, after what the caches hold now.

        Args:
            new: new tokens of each sequence.
            options: strategy and shifts, as :func:`dcp.inference.plan_turn` takes them.
        """
        cache = self.caches[0]
        return [
            plan_turn(
                new,
                cache.seen(sequences, kind),
                cache.spec,
                cluster,
                masks=cache.masks(sequences, new, kind),
                **options,
            )
            for kind in range(len(cache.kinds))
        ]

    def begin(self, plans: Plan | Sequence[Plan], sequences: Sequence[SequenceId]) -> None:
        """Start a turn: make room for its new tokens, and run ``plans`` until the next one.

        Args:
            plans: one for each kind of layers, as :meth:`plans` makes them; where all layers are
                alike, a plan of :func:`dcp.inference.plan_turn` will do.

        Where it fails, the caches hold what they held, and no turn has begun.
        """
        plans = [plans] if isinstance(plans, Plan) else list(plans)
        caches, self._kinds = self.caches, []
        self._check(plans, sequences)
        owners = new_owners(plans[0])
        before = [cache.now() for cache in caches]
        self.num_cached = caches[0].held(sequences).sum(axis=1)
        self.longest = int((self.num_cached + [len(of) for of in owners]).max(initial=0))
        self.compared = set()
        try:
            rows = [cache.extend(sequences, owners) for cache in caches]
            self._kinds = [
                self._kind(plan, kind, sequences, [of[kind] for of in rows])
                for kind, plan in enumerate(plans)
            ]
        except BaseException:
            for cache, extent in zip(caches, before, strict=True):
                cache.undo(extent)
            raise

    def _kind(
        self, plan: Plan, kind: int, sequences: Sequence[SequenceId], rows: list[np.ndarray]
    ) -> _Kind:
        shares = [
            _share(plan, cache, kind, sequences, new)
            for cache, new in zip(self.caches, rows, strict=True)
        ]
        if self._executor is None:
            return _Kind(plan, LocalWorld(plan, kernel=self.kernel), shares)
        return _Kind(plan, self._executor.bind(shares[0].plan), shares)

    def _check(self, plans: list[Plan], sequences: Sequence[SequenceId]) -> None:
        """Raise ``ValueError`` unless plans are for what is cached, and agree on what is new."""
        cache = self.caches[0]
        if len(plans) != len(cache.kinds):
            raise ValueError(
                f"{len(plans)} plans for {len(cache.kinds)} kinds of layers: give one for each"
            )
        for kind, plan in enumerate(plans):
            cached = plan.num_cached.tolist()
            held = cache.seen(sequences, kind).sum(axis=1).tolist()
            if held != cached:
                raise ValueError(f"the plan is for {cached} cached tokens, the cache holds {held}")
            if not all(map(np.array_equal, new_owners(plan), new_owners(plans[0]))):
                raise ValueError(
                    "the plans share out new tokens differently: make them in one plan_turn"
                )

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
        if not self._kinds:
            raise ValueError("no turn has begun: call begin(plan, sequences) first")
        spec = self.caches[0].spec
        for name, given, wanted in (
            ("q", q, (spec.num_heads, spec.head_dim)),
            ("kv", kv, spec.kv_shape()),
        ):
            if tuple(given.shape[1:]) != wanted:
                raise ValueError(f"{name} is {list(given.shape)}, a token's is {list(wanted)}")
        turn = self._kinds[self.caches[0].layers[layer]]
        queries, new = self._split(q), self._split(kv)
        keys = []
        for share, cache, each in zip(turn.shares, self.caches, new, strict=True):
            pool = cache.pools[layer]
            pool.index_copy_(0, share.new_rows, each.to(pool.dtype))
            keys.append(pool if share.all_rows is None else pool[share.all_rows])
        session = turn.host.session(call or Call())
        session = replace(session, plans=[share.plan for share in turn.shares])
        out, _ = session.forward_shards(queries, keys, sink, needs_grad=False)
        return turn.plan.unshard(out) if self.is_local else out[0]

    def _split(self, tensor: Tensor) -> list[Tensor]:
        plan, ranks = self._kinds[0].plan, [cache.rank for cache in self.caches]
        return [plan.shard(rank, tensor) for rank in ranks] if self.is_local else [tensor]


def new_tokens(plan: Plan) -> np.ndarray:
    """New tokens of each sequence on each rank, int64 ``[num_sequences, num_ranks]``."""
    counts = np.zeros((len(plan.seqlens), plan.num_ranks), dtype=np.int64)
    length = np.where(plan.is_cached, 0, plan.block_length)
    np.add.at(counts, (plan.block_sequence, plan.owner), length)
    return counts


def new_owners(plan: Plan) -> list[np.ndarray]:
    """The rank of each new token, of each sequence: int64."""
    new = ~plan.is_cached
    owner = np.repeat(plan.owner[new], plan.block_length[new])
    return split(owner, plan.seqlens - plan.num_cached)


def _share(
    plan: Plan, cache: KVCache, kind: int, sequences: Sequence[SequenceId], rows: np.ndarray
) -> _Share:
    """A rank's program: over the pools' own rows where no key travels, else over a copy."""
    rank_plan, device = plan.rank_plan(cache.rank), cache.pools[0].device
    every = None
    if keys_stay(rank_plan.mask_program()):
        num_rows = cache.num_pages_of(kind) * cache.page_size
        rank_plan = in_pages(rank_plan, *cache.row_runs(sequences, kind), num_rows)
    else:
        every = torch.from_numpy(cache.rows(sequences, kind)).to(device)
    return _Share(PreparedPlan(rank_plan), torch.from_numpy(rows).to(device), every)
