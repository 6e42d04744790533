"""A plan: the placement and schedule of one batch, as programs for every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.compile import MaskTables, compile_mask
from dcp.placement import Placement
from dcp.program import RankPlan, rank_program, row_bytes
from dcp.ragged import offsets_in, runs, starts
from dcp.received import (
    check_layout,
    check_mask,
    check_tables,
    check_weights,
    own_rows,
)
from dcp.schedule import make_schedule
from dcp.simulate import Timeline, simulate
from dcp.stats import Stats, balance
from dcp.tables import Item, Move, freeze, from_parts, to_parts
from dcp.wire import exactly, pack, reading, record, unpack

_BLOCKS = (
    "seqlens", "num_cached", "block_sequence", "block_offset", "block_length", "owner",
)  # fmt: skip
_META = ("spec", "cluster", "num_head_groups", "masks", "weights", "stats")


@dataclass(frozen=True, eq=False)
class Plan:
    """All ranks' work for one batch, forward and backward. Made by :func:`dcp.plan`.

    Its arrays are read-only. Two are equal if all but their ``planning_seconds`` is.

    Attributes:
        seqlens: tokens of each sequence, int64 ``[num_sequences]``.
        num_cached: how many of them, the first ones, have keys and values only; the rest are the
            plan's *tokens*.
        spec, cluster: heads and machine it was made for.
        num_head_groups: head groups a compute block is one of.
        block_sequence, block_offset, block_length, owner: of each data block: its sequence, global
            index of its first key, tokens, owning rank; int64 ``[num_blocks]``.
        masks: compiled tables by mask name.
        weights: layers that use each mask.
        stats: figures of the plan.
    """

    seqlens: np.ndarray
    num_cached: np.ndarray
    spec: AttentionSpec
    cluster: Cluster
    num_head_groups: int
    block_sequence: np.ndarray
    block_offset: np.ndarray
    block_length: np.ndarray
    owner: np.ndarray
    masks: dict[str, MaskTables]
    weights: dict[str, float]
    stats: Stats

    def __post_init__(self) -> None:
        freeze(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._untimed() == other._untimed()

    def _untimed(self) -> bytes:
        return replace(self, stats=replace(self.stats, planning_seconds=0.0)).to_bytes()

    @classmethod
    def from_placement(
        cls,
        placement: Placement,
        cluster: Cluster,
        *,
        strategy: str,
        num_divisions: int = 4,
        tail: bool = False,
    ) -> Plan:
        """Schedule and compile a placement; ``stats.planning_seconds`` is left to the caller."""
        blocks, batch = placement.blocks, placement.blocks.batch
        masks = {}
        for name in batch.mask_names:
            schedule = make_schedule(
                placement, name, cluster, num_divisions=num_divisions, tail=tail
            )
            masks[name] = compile_mask(placement, name, schedule, cluster.num_ranks)
        plan = cls(
            seqlens=batch.seqlens,
            num_cached=batch.num_cached,
            spec=blocks.spec,
            cluster=cluster,
            num_head_groups=blocks.num_head_groups,
            block_sequence=blocks.sequence,
            block_offset=blocks.offset,
            block_length=blocks.length,
            owner=placement.owner,
            masks=masks,
            weights=batch.weights,
            stats=Stats(strategy=strategy, notes=dict(placement.notes)),
        )
        plan._measure()
        return plan

    # ------------------------------------------------------------------ the layout

    @property
    def num_ranks(self) -> int:
        return self.cluster.num_ranks

    @property
    def num_keys(self) -> int:
        return int(self.seqlens.sum())

    @property
    def num_tokens(self) -> int:
        return self.num_keys - int(self.num_cached.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.seqlens.max(initial=0))

    @property
    def num_blocks(self) -> int:
        return len(self.owner)

    @cached_property
    def rank_tokens(self) -> np.ndarray:
        """Tokens each rank owns, int64 ``[num_ranks]``."""
        return _sums(self.owner, np.where(self.is_cached, 0, self.block_length), self.num_ranks)

    def token_indices(self, rank: int) -> np.ndarray:
        """Global index of each local token of ``rank``, in local order: int64 ``[local]``."""
        mine = self._blocks_of(rank)
        return runs(self.block_token[mine], self.block_length[mine])

    def key_indices(self, rank: int) -> np.ndarray:
        """Global index of each local key of ``rank``, the cached ones too: int64 ``[local keys]``.

        The same as :meth:`token_indices` where nothing is cached.
        """
        mine = np.flatnonzero(self.owner == rank)
        return runs(self.block_offset[mine], self.block_length[mine])

    def positions(self, rank: int) -> np.ndarray:
        """Position of each local token inside its own sequence (for RoPE): int64 ``[local]``."""
        mine = self._blocks_of(rank)
        return runs(self.block_position[mine], self.block_length[mine])

    def shard(self, rank: int, tensor: Any, *, keys: bool = False) -> Any:
        """The rows of a global ``[num_tokens, …]`` tensor or array that ``rank`` owns; with
        ``keys``, of ``[num_keys, …]``."""
        size, indices = self._layout(keys)
        if len(tensor) != size:
            raise ValueError(f"tensor has {len(tensor)} rows, the plan {size} tokens")
        return tensor[indices(rank)]

    def unshard(self, shards: Sequence[Any], *, keys: bool = False) -> Any:
        """The global tensor of all ranks' local ones, in rank order; inverse of :meth:`shard`."""
        size, indices = self._layout(keys)
        every = [indices(rank) for rank in range(self.num_ranks)]
        lengths, wanted = [len(shard) for shard in shards], [len(of) for of in every]
        if lengths != wanted:
            raise ValueError(f"shards of {lengths} rows, the plan has {wanted}")
        first, shape = shards[0], (size, *shards[0].shape[1:])
        whole = (
            first.new_empty(shape) if hasattr(first, "new_empty") else np.empty(shape, first.dtype)
        )
        for of, shard in zip(every, shards, strict=True):
            whole[of] = shard
        return whole

    def _layout(self, keys: bool) -> tuple[int, Callable[[int], np.ndarray]]:
        return (self.num_keys, self.key_indices) if keys else (self.num_tokens, self.token_indices)

    @cached_property
    def block_position(self) -> np.ndarray:
        """Position of each data block's first token in its sequence."""
        position: np.ndarray = self.block_offset - starts(self.seqlens)[self.block_sequence]
        return position

    @cached_property
    def is_cached(self) -> np.ndarray:
        """Data blocks that have keys and values only, bool ``[num_blocks]``."""
        cached: np.ndarray = self.block_position < self.num_cached[self.block_sequence]
        return cached

    @cached_property
    def block_token(self) -> np.ndarray:
        """Global index of each data block's first token; of no meaning for a cached block."""
        before = np.cumsum(self.num_cached)
        token: np.ndarray = self.block_offset - before[self.block_sequence]
        return token

    @cached_property
    def local_offset(self) -> np.ndarray:
        """Index of each data block's first key among its owner's keys."""
        return offsets_in(self.owner, self.block_length, self.num_ranks)

    def _blocks_of(self, rank: int) -> np.ndarray:
        """Data blocks with tokens that ``rank`` owns."""
        if isinstance(rank, bool) or rank not in range(self.num_ranks):
            raise ValueError(f"rank {rank!r} is not one of the plan's {self.num_ranks} ranks")
        return np.flatnonzero((self.owner == rank) & ~self.is_cached)

    # ------------------------------------------------------------------ programs

    def rank_plan(self, rank: int) -> RankPlan:
        """What ``rank`` needs to run its share; the only thing that has to reach it."""
        mine = self._blocks_of(rank)
        return RankPlan(
            rank=rank,
            num_ranks=self.num_ranks,
            num_tokens=self.num_tokens,
            longest=self.longest,
            spec=self.spec,
            num_local_keys=len(self.key_indices(rank)),
            num_head_groups=self.num_head_groups,
            block_sequence=self.block_sequence[mine],
            block_offset=self.block_token[mine],
            block_position=self.block_position[mine],
            block_length=self.block_length[mine],
            masks={name: rank_program(tables, rank) for name, tables in self.masks.items()},
            stats=self.stats,
            fingerprint=self.fingerprint,
        )

    @cached_property
    def fingerprint(self) -> int:
        """63 bits of all that the ranks do: equal for equal work, whoever planned it and when."""
        masks, arrays = to_parts(self.masks)
        found = blake2b(repr((asdict(self.spec), self.num_head_groups, masks)).encode())
        for array in (*(getattr(self, name) for name in _BLOCKS), *arrays.values()):
            found.update(repr((array.shape, array.dtype.str)).encode())
            found.update(np.ascontiguousarray(array).data)
        return int.from_bytes(found.digest()[:8], "little") >> 1

    def simulate(self) -> Timeline:
        """When every division and transfer of this plan would run on its cluster."""
        return simulate(self, self.cluster)

    # ------------------------------------------------------------------ on disk

    def to_bytes(self) -> bytes:
        """The whole plan as one checked message (:mod:`dcp.wire`)."""
        masks, arrays = to_parts(self.masks)
        meta = {
            "spec": asdict(self.spec),
            "cluster": self.cluster.to_json(),
            "num_head_groups": self.num_head_groups,
            "masks": masks,
            "weights": self.weights,
            "stats": self.stats.to_json(),
        }
        return pack("plan", meta, {name: getattr(self, name) for name in _BLOCKS} | arrays)

    @classmethod
    def from_bytes(cls, message: bytes) -> Plan:
        """Read what :meth:`to_bytes` wrote; :class:`dcp.wire.WireError` for anything else."""
        meta, arrays = unpack("plan", message)
        with reading("plan"):
            return cls._from_parts(meta, arrays)

    @classmethod
    def _from_parts(cls, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Plan:
        exactly("the plan", meta, _META)
        masks = from_parts(MaskTables, meta["masks"], arrays, others=_BLOCKS)
        made = cls(
            **{name: arrays[name] for name in _BLOCKS},
            spec=record(AttentionSpec, meta["spec"]),
            cluster=record(Cluster, meta["cluster"]),
            num_head_groups=meta["num_head_groups"],
            masks=masks,
            weights=meta["weights"],
            stats=record(Stats, meta["stats"]),
        )
        check_layout(*(arrays[name] for name in _BLOCKS), num_ranks=made.num_ranks)
        check_weights(made.weights, masks)
        keys = _sums(made.owner, made.block_length, made.num_ranks)
        own = own_rows(made.rank_tokens, keys, made.num_head_groups, made.spec)
        for tables in masks.values():
            check_tables(tables, own, num_groups=made.num_head_groups, num_ranks=made.num_ranks)
            check_mask(tables, made.block_length)
        return made

    def save(self, path: str | Path) -> None:
        """Write the plan to a file that :meth:`load` reads."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file; a damaged or foreign one raises :class:`dcp.wire.WireError`."""
        return cls.from_bytes(Path(path).read_bytes())

    # ------------------------------------------------------------------ figures

    def rank_areas(self, mask: str) -> np.ndarray:
        """(query, key) pairs, all heads, that each rank computes under a mask: ``[num_ranks]``."""
        tables = self.masks[mask]
        area = tables.tile_area[tables.items[:, Item.TILE]] / self.num_head_groups
        return _sums(tables.items[:, Item.RANK], area, self.num_ranks)

    def moved_bytes(self, mask: str, *, backward: bool = False) -> np.ndarray:
        """Bytes of each line of ``masks[mask].sends``: int64, 0 where the pass does not send it."""
        sends, row_bytes = self.masks[mask].sends, self.row_bytes(mask, backward=backward)
        moved: np.ndarray = sends[:, Move.ROWS] * row_bytes[sends[:, Move.BUFFER]]
        return moved

    def received_bytes(self, mask: str) -> np.ndarray:
        """Bytes that each rank receives in a forward pass of a mask: from its own node, and from
        others, float ``[2, num_ranks]``."""
        source, target = self.masks[mask].sends[:, [Move.RANK, Move.PEER]].T
        crosses = self.cluster.node_of_rank[source] != self.cluster.node_of_rank[target]
        received = np.zeros((2, self.num_ranks))
        np.add.at(received, (crosses.astype(np.int64), target), self.moved_bytes(mask))
        return received

    def row_bytes(self, mask: str, *, backward: bool = False) -> np.ndarray:
        """Bytes that one row of each buffer takes on a link: int64 ``[4]``."""
        hop = self.masks[mask].gradients_hop
        return row_bytes(self.spec, self.num_head_groups, gradients_hop=hop, backward=backward)

    def _measure(self) -> None:
        """Fill in every figure of ``stats`` that follows from the tables."""
        stats, ranks = self.stats, self.num_ranks
        (compute, sent), received = np.zeros((2, ranks)), np.zeros((2, ranks))
        for name, tables in self.masks.items():
            weight = self.weights[name]
            compute += weight * self.rank_areas(name)
            sent += _sums(tables.sends[:, Move.RANK], weight * self.moved_bytes(name), ranks)
            received += weight * self.received_bytes(name)
        intra, inter = received.sum(axis=1)
        stats.num_tokens = self.num_tokens
        stats.block_size = int(self.block_length.max(initial=0))
        stats.num_compute_blocks = sum(len(tables.items) for tables in self.masks.values())
        stats.compute_balance, stats.token_balance = balance(compute), balance(self.rank_tokens)
        stats.inter_node_bytes, stats.intra_node_bytes = round(inter), round(intra)
        stats.max_rank_recv_bytes = round(received.sum(axis=0).max())
        stats.max_rank_send_bytes = round(sent.max())
        held = [tables.buffer_rows @ self.row_bytes(name) for name, tables in self.masks.items()]
        stats.max_rank_buffer_bytes = int(np.max(held))
        stats.num_divisions = max(tables.num_divisions for tables in self.masks.values())

    def __repr__(self) -> str:
        s = self.stats
        return (
            f"Plan({s.strategy}, {self.num_tokens} tokens on {self.num_ranks} ranks, "
            f"{s.num_compute_blocks} compute blocks, balance {s.compute_balance:.3f} compute "
            f"{s.token_balance:.3f} tokens, {s.inter_node_bytes / 1e6:.1f} MB between nodes, "
            f"{s.intra_node_bytes / 1e6:.1f} MB inside)"
        )

    def _repr_html_(self) -> str:
        from dcp.pictures.plan import plan_html

        pairs = np.zeros((self.num_ranks, self.num_blocks))
        received = np.zeros((2, self.num_ranks))
        for name, tables in self.masks.items():
            weight, tile = self.weights[name], tables.items[:, Item.TILE]
            area = weight * tables.tile_area[tile] / self.num_head_groups
            np.add.at(pairs, (tables.items[:, Item.RANK], tables.tile_q[tile]), area)
            received += weight * self.received_bytes(name)
        with_queries = ~self.is_cached
        return plan_html(
            self.stats.to_json(),
            num_sequences=len(self.seqlens),
            token=self.block_token[with_queries],
            length=self.block_length[with_queries],
            owner=self.owner[with_queries],
            pairs=pairs[:, with_queries],
            rank_tokens=self.rank_tokens,
            received=received,
        )


def _sums(index: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(index, weights=values, minlength=size).astype(values.dtype)
