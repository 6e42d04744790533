"""One rank's work: instructions, and the compact form in which they travel.

Five kinds of instruction: attention, reduce, copy, launch communication, wait. The forward and the
backward program of a mask come from the same tables; the backward one also clears, sends and sums
partial key and value gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec
from dcp.compile import MaskTables
from dcp.ragged import runs, starts
from dcp.received import check_columns, check_cover, check_tables, own_rows, require
from dcp.stats import Stats
from dcp.tables import (
    COLUMNS,
    Arrival,
    Item,
    Move,
    Reset,
    Tables,
    freeze,
    from_parts,
    to_parts,
)
from dcp.transfers import DKV, KV, OUT, Q
from dcp.wire import exactly, pack, reading, record, unpack


@dataclass(frozen=True, eq=False)
class Attention:
    """One fused launch, after its ``resets``; columns :class:`~dcp.tables.Item` and
    :class:`~dcp.tables.Reset`."""

    step: int
    items: np.ndarray
    resets: np.ndarray


@dataclass(frozen=True, eq=False)
class Reduce:
    """Merge or add arrived rows into own rows; columns :class:`~dcp.tables.Arrival`."""

    step: int
    rows: np.ndarray


@dataclass(frozen=True)
class Copy:
    """``load`` brings the rank's tensors into its buffers, ``store`` takes the result out."""

    direction: str


@dataclass(frozen=True, eq=False)
class Launch:
    """Start communication ``step``; columns :class:`~dcp.tables.Move`, a peer's rows in one
    message, in this order."""

    step: int
    sends: np.ndarray
    receives: np.ndarray


@dataclass(frozen=True)
class Wait:
    """Wait until communication ``step`` is complete."""

    step: int


Instruction = Attention | Reduce | Copy | Launch | Wait


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskProgram(Tables):
    """One rank's tables of one mask."""

    def instructions(self, *, backward: bool = False) -> list[Instruction]:
        """The program, in the order of execution (see :mod:`dcp.schedule`)."""
        return list(self._instructions(DKV if backward else DKV - 1))

    def _instructions(self, last_buffer: int) -> Iterator[Instruction]:
        def of_pass(table: np.ndarray, buffer: int) -> np.ndarray:
            return table[table[:, buffer] <= last_buffer]

        sends, receives = (of_pass(moves, Move.BUFFER) for moves in (self.sends, self.receives))
        reduces = of_pass(self.reduces, Arrival.BUFFER)
        resets = of_pass(self.resets, Reset.BUFFER)
        yield Copy("load")
        for step in range(self.num_steps):
            out, into = _at(sends, Move.STEP, step + 1), _at(receives, Move.STEP, step + 1)
            if len(out) or len(into):
                yield Launch(step + 1, out, into)
            items = _at(self.items, Item.STEP, step)
            if len(items):
                yield Attention(step, items, _at(resets, Reset.STEP, step))
            if len(out) or len(into):
                yield Wait(step + 1)
            arrived = _at(reduces, Arrival.STEP, step)
            if len(arrived):
                yield Reduce(step, arrived)
        yield Copy("store")


def _at(table: np.ndarray, column: int, step: int) -> np.ndarray:
    """The lines of a step, without it."""
    start, stop = np.searchsorted(table[:, column], [step, step + 1])
    return table[start:stop, :column]


def row_bytes(
    spec: AttentionSpec, num_head_groups: int, *, gradients_hop: bool, backward: bool = False
) -> np.ndarray:
    """Bytes that one row of each buffer takes on a link: int64 ``[4]``."""
    groups, bytes_ = num_head_groups, np.zeros(4, dtype=np.int64)
    q, out = spec.q_token_bytes // groups, spec.out_token_bytes // groups
    lse = spec.num_heads // groups * spec.exact_bytes
    kv = dkv = spec.kv_token_bytes // min(groups, spec.num_kv_heads)
    if gradients_hop:
        dkv = kv // spec.dtype_bytes * spec.exact_bytes
    # backward, queries travel with the outputs' gradients, log-sum-exps and deltas
    bytes_[[Q, KV, OUT, DKV]] = (q + out + lse, kv, q, dkv) if backward else (q, kv, out, 0)
    return bytes_


def rank_program(tables: MaskTables, rank: int) -> MaskProgram:
    """One rank's rows of the tables, with the slices of its tiles alone."""

    def mine(name: str) -> np.ndarray:
        of_all: np.ndarray = getattr(tables, name)
        column = COLUMNS[name].RANK
        start, stop = np.searchsorted(of_all[:, column], [rank, rank + 1])
        return of_all[start:stop]

    items = mine("items")
    tiles, local = np.unique(items[:, Item.TILE], return_inverse=True)
    start, count = tables.slice_start[tiles], np.diff(tables.slice_start)[tiles]
    first = starts(count)
    items = items[:, : Item.RANK].copy()
    items[:, Item.FIRST_SLICE], items[:, Item.END_SLICE] = first[local], (first + count)[local]
    moves = {name: mine(name)[:, : COLUMNS[name].RANK] for name in COLUMNS if name != "items"}
    return MaskProgram(
        num_steps=tables.num_steps,
        gradients_hop=tables.gradients_hop,
        first_key=tables.first_key,
        last_key=tables.last_key,
        is_band=tables.is_band,
        items=items,
        buffer_rows=tables.buffer_rows[rank],
        slices=tables.slices[runs(start, count)],
        **moves,
    )


_COUNTS = (
    "rank", "num_ranks", "num_tokens", "longest", "num_local_keys", "num_head_groups",
    "fingerprint",
)  # fmt: skip
_BLOCKS = ("block_sequence", "block_offset", "block_position", "block_length")


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank needs of a plan: its tokens and its programs. Small, and all that is shipped.

    Its arrays are read-only. Two are equal if all but their ``planning_seconds`` is.

    Attributes:
        rank, num_ranks, num_tokens: whose plan it is; tokens of the whole batch.
        longest: tokens of its longest sequence.
        num_local_keys: rows of the rank's keys and values, its cached ones among them.
        spec, num_head_groups: heads, and how many head groups a row is one of.
        token_indices: global index of each local token, int64 ``[local]``.
        positions: position of each local token in its own sequence, int64 ``[local]``.
        sequence_ids: sequence of each local token, int64 ``[local]``.
        masks: programs by mask name.
        stats: figures of the whole plan.
        fingerprint: of the whole plan, see :attr:`dcp.plans.Plan.fingerprint`.
    """

    rank: int
    num_ranks: int
    num_tokens: int
    longest: int
    num_local_keys: int
    spec: AttentionSpec
    num_head_groups: int
    block_sequence: np.ndarray
    block_offset: np.ndarray
    block_position: np.ndarray
    block_length: np.ndarray
    masks: dict[str, MaskProgram]
    stats: Stats = field(default_factory=Stats)
    fingerprint: int = 0

    def __post_init__(self) -> None:
        freeze(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankPlan) and self._untimed() == other._untimed()

    def _untimed(self) -> bytes:
        return replace(self, stats=replace(self.stats, planning_seconds=0.0)).to_bytes()

    @property
    def num_local_tokens(self) -> int:
        return int(self.block_length.sum())

    @property
    def token_indices(self) -> np.ndarray:
        return runs(self.block_offset, self.block_length)

    @property
    def positions(self) -> np.ndarray:
        return runs(self.block_position, self.block_length)

    @property
    def sequence_ids(self) -> np.ndarray:
        return np.repeat(self.block_sequence, self.block_length)

    def mask_program(self, mask: str | None = None) -> MaskProgram:
        """The programs of ``mask``, by default the first; unknown names raise ``ValueError``."""
        name = next(iter(self.masks)) if mask is None else mask
        if name not in self.masks:
            raise ValueError(f"the plan has no mask {name!r}, it has {', '.join(self.masks)}")
        return self.masks[name]

    def to_bytes(self) -> bytes:
        """The rank's plan as one checked message (:mod:`dcp.wire`)."""
        masks, arrays = to_parts(self.masks)
        meta = {name: getattr(self, name) for name in _COUNTS}
        meta |= {"spec": asdict(self.spec), "masks": masks, "stats": self.stats.to_json()}
        return pack("rank-plan", meta, {name: getattr(self, name) for name in _BLOCKS} | arrays)

    @classmethod
    def from_bytes(cls, message: bytes) -> RankPlan:
        """Read what :meth:`to_bytes` wrote; :class:`dcp.wire.WireError` for anything else."""
        meta, arrays = unpack("rank-plan", message)
        with reading("rank-plan"):
            exactly("the rank's plan", meta, (*_COUNTS, "spec", "masks", "stats"))
            values: dict[str, Any] = {name: meta[name] for name in _COUNTS}
            values |= {name: arrays[name] for name in _BLOCKS}
            made = cls(
                **values,
                spec=record(AttentionSpec, meta["spec"]),
                masks=from_parts(MaskProgram, meta["masks"], arrays, others=_BLOCKS),
                stats=record(Stats, meta["stats"]),
            )
            made._check()
        return made

    def _check(self) -> None:
        """``WireError`` for what no plan's share is."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        whole = all(type(count) is int and count >= 0 for count in counts.values())
        require(whole and self.rank < self.num_ranks, f"the rank's plan counts {counts}")
        check_columns(_BLOCKS, *(getattr(self, name) for name in _BLOCKS))
        check_cover(self.block_offset, self.block_length, self.num_tokens, whole=False)
        tokens = np.array([self.num_local_tokens])
        require(tokens[0] <= self.num_local_keys, f"{tokens[0]} tokens have {counts}")
        own = own_rows(tokens, np.array([self.num_local_keys]), self.num_head_groups, self.spec)
        for program in self.masks.values():
            check_tables(program, own, num_groups=self.num_head_groups, num_ranks=self.num_ranks)
