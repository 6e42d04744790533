"""Schedule -> tables: buffer rows for every block and one line for every launch, move and sum.

A row is one token of one head group. The first rows of each buffer are the rank's own tokens,
head group by head group; what comes from elsewhere, and partial results for elsewhere, live in
the rows behind them, reused as soon as they are dead. All ranks are compiled together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dcp.buffers import first_fit
from dcp.placement import Placement
from dcp.schedule import DKV, KV, OUT, MaskSchedule, Q, Transfers, Uses
from dcp.slices import shift_slices

# Columns of the tables; the first two are always the rank and the step.
ITEM = (
    "rank",
    "step",
    "q_row",
    "kv_row",
    "out_row",
    "dkv_row",
    "q_rows",
    "kv_rows",
    "group",
    "tile",
)
MOVE = ("rank", "step", "peer", "buffer", "row", "rows")
REDUCE = ("rank", "step", "buffer", "source", "target", "rows")
RESET = ("rank", "step", "buffer", "row", "rows")


@dataclass(frozen=True)
class MaskTables:
    """The compiled work of one mask, all ranks: int64 tables sorted by (rank, step).

    Attributes:
        num_divisions, num_steps: divisions of the schedule; steps, more where results travel on.
        items: attention of one query piece on one KV piece, columns :data:`ITEM`.
        sends, receives: rows to or from a peer, columns :data:`MOVE`; both sides list a step's
            moves in the same order. ``step`` is the communication's number.
        reduces: arrived partial rows merged into own rows, columns :data:`REDUCE`.
        resets: partial result rows to clear before their first division, columns :data:`RESET`.
        buffer_rows: rows of each rank's buffers, ``[num_ranks, 4]``.
        tile_q, tile_k, tile_area: data blocks and pairs of each tile.
        slice_start: CSR offsets of each tile's slices, ``[num_tiles + 1]``.
        slices: mask slices in coordinates of their tile, ``[n, 6]``.
    """

    num_divisions: int
    num_steps: int
    items: np.ndarray
    sends: np.ndarray
    receives: np.ndarray
    reduces: np.ndarray
    resets: np.ndarray
    buffer_rows: np.ndarray
    tile_q: np.ndarray
    tile_k: np.ndarray
    tile_area: np.ndarray
    slice_start: np.ndarray
    slices: np.ndarray


def compile_mask(
    placement: Placement, mask: str, schedule: MaskSchedule, num_ranks: int
) -> MaskTables:
    """Assign rows by liveness and write every rank's tables for one mask."""
    layout = _Layout(placement, schedule, num_ranks)
    s, t = schedule, schedule.transfers
    blocks, tiles = placement.blocks, placement.blocks.masks[mask]

    compute = np.arange(len(s.rank))
    items = np.stack(
        [
            s.rank,
            s.division,
            layout.row(Q, s.rank, s.q_piece),
            layout.row(KV, s.rank, s.kv_piece),
            layout.row(OUT, s.rank, s.q_piece),
            layout.row(DKV, s.rank, s.kv_piece),
            layout.rows(Q, s.q_piece),
            layout.rows(KV, s.kv_piece),
            compute % blocks.num_head_groups,
            compute // blocks.num_head_groups,
        ],
        axis=1,
    )
    items = items[np.lexsort((s.kv_piece, s.q_piece, s.division, s.rank))]

    rows = layout.rows(t.buffer, t.piece)
    source_row, target_row = layout.transfer_rows()
    order = np.lexsort((t.piece, t.buffer, t.target, t.step, t.source))
    sends = np.stack([t.source, t.step, t.target, t.buffer, source_row, rows], axis=1)[order]
    order = np.lexsort((t.piece, t.buffer, t.source, t.step, t.target))
    receives = np.stack([t.target, t.step, t.source, t.buffer, target_row, rows], axis=1)[order]

    home = np.flatnonzero(t.buffer >= OUT)
    own = layout.result_rows()
    reduces = np.stack(
        [t.target[home], t.step[home] - 1, t.buffer[home], target_row[home], own, rows[home]],
        axis=1,
    )
    reduces = reduces[
        np.lexsort((t.source[home], own, t.buffer[home], t.step[home], t.target[home]))
    ]

    offset = blocks.offset
    slices = shift_slices(
        tiles.slices, -offset[tiles.q[tiles.slice_tile]], -offset[tiles.k[tiles.slice_tile]]
    )
    return MaskTables(
        num_divisions=s.num_divisions,
        num_steps=s.num_steps,
        items=items,
        sends=sends,
        receives=receives,
        reduces=reduces,
        resets=layout.resets(),
        buffer_rows=layout.buffer_rows,
        tile_q=tiles.q,
        tile_k=tiles.k,
        tile_area=tiles.area,
        slice_start=np.searchsorted(tiles.slice_tile, np.arange(tiles.num_tiles + 1)),
        slices=slices,
    )


class _Layout:
    """Where every piece lies on every rank that touches it."""

    def __init__(self, placement: Placement, schedule: MaskSchedule, num_ranks: int) -> None:
        blocks, s = placement.blocks, schedule
        self.schedule, self.length, self.owner = s, blocks.length, placement.owner
        self.groups = (blocks.num_head_groups, blocks.num_kv_groups)
        self.num_pieces = [max(len(self.owner) * g, 1) for g in self.groups]
        # of Q and OUT rows, and of KV and DKV rows: cached blocks have only the latter
        own = np.stack([np.where(blocks.is_cached, 0, self.length), self.length])
        self.tokens = np.stack(
            [np.bincount(self.owner, weights=of, minlength=num_ranks).astype(int) for of in own]
        )
        self.local_offset = np.stack([local_offsets(self.owner, of, num_ranks) for of in own])
        t = s.transfers
        parts = {
            Q: self._arrivals(Q, s.q_uses),
            KV: self._arrivals(KV, s.kv_uses),
            OUT: self._partials(OUT, s.q_uses),
            DKV: self._partials(DKV, s.kv_uses),
        }
        self.home = np.flatnonzero(t.buffer >= OUT)  # partial results on their way to the owner
        landing = (t.target[self.home], t.piece[self.home], t.step[self.home] - 1)
        rank = np.concatenate([p[0] for p in parts.values()] + [landing[0]])
        piece = np.concatenate([p[1] for p in parts.values()] + [landing[1]])
        birth = np.concatenate([p[2] for p in parts.values()] + [landing[2]])
        death = np.concatenate([p[3] for p in parts.values()] + [landing[2]])
        counts = [len(p[0]) for p in parts.values()]
        buffer = np.concatenate([np.repeat(np.arange(4), counts), t.buffer[self.home]])
        size = self.length[piece // np.array(self.groups)[buffer % 2]]

        segment = rank * 4 + buffer
        order = np.lexsort((-size, birth, segment))
        row = np.empty(len(segment), dtype=np.int64)
        row[order] = first_fit(segment[order], birth[order], death[order], size[order])
        own = self.tokens[[0, 1, 0, 1]].T * np.array(self.groups)[[0, 1, 0, 1]]  # [num_ranks, 4]
        row += own.reshape(-1)[segment]
        top = own.reshape(-1).copy()
        np.maximum.at(top, segment, row + size)
        self.buffer_rows = top.reshape(-1, 4)

        ends = np.cumsum([0, *counts])
        self.held = {}
        for b in range(4):
            part = slice(ends[b], ends[b + 1])
            key = rank[part] * self.num_pieces[b % 2] + piece[part]
            by_key = np.argsort(key)
            self.held[b] = (key[by_key], row[part][by_key])
        self.landing_row = row[ends[4] :]

    def rows(self, buffer: np.ndarray | int, piece: np.ndarray) -> np.ndarray:
        """Rows of each piece: the tokens of its block."""
        return self.length[piece // np.array(self.groups)[np.asarray(buffer) % 2]]

    def own_row(self, buffer: np.ndarray | int, piece: np.ndarray) -> np.ndarray:
        """First row of each piece on its owner."""
        side = np.asarray(buffer) % 2
        groups = np.array(self.groups)[side]
        block, group = piece // groups, piece % groups
        return group * self.tokens[side, self.owner[block]] + self.local_offset[side, block]

    def row(self, buffer: int, rank: np.ndarray, piece: np.ndarray) -> np.ndarray:
        """First row of each piece on ``rank``, which owns or holds it."""
        local = self.owner[piece // self.groups[buffer % 2]] == rank
        key, row = self.held[buffer]
        result = self.own_row(buffer, piece)
        wanted = (rank * self.num_pieces[buffer % 2] + piece)[~local]
        at = np.searchsorted(key, wanted)
        assert (key[at] == wanted).all(), "a rank uses a piece it never receives"
        result[~local] = row[at]
        return result

    def transfer_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of every transfer at its source and at its target."""
        t = self.schedule.transfers
        source, target = np.empty(len(t), dtype=np.int64), np.empty(len(t), dtype=np.int64)
        for buffer in range(4):
            of = np.flatnonzero(t.buffer == buffer)
            source[of] = self.row(buffer, t.source[of], t.piece[of])
            if buffer < OUT:
                target[of] = self.row(buffer, t.target[of], t.piece[of])
        target[self.home] = self.landing_row
        return source, target

    def result_rows(self) -> np.ndarray:
        """First row of what each arriving partial result is added to."""
        t = self.schedule.transfers[self.home]
        rows = np.empty(len(t), dtype=np.int64)
        for buffer in (OUT, DKV):
            of = np.flatnonzero(t.buffer == buffer)
            rows[of] = self.row(buffer, t.target[of], t.piece[of])
        return rows

    def resets(self) -> np.ndarray:
        """Partial result rows to clear, before the division that first adds to them."""
        tables = []
        for buffer, uses in ((OUT, self.schedule.q_uses), (DKV, self.schedule.kv_uses)):
            of = np.flatnonzero(uses.remote)
            rank, piece, step = uses.rank[of], uses.piece[of], uses.first[of]
            row, rows = self.row(buffer, rank, piece), self.rows(buffer, piece)
            tables.append(np.stack([rank, step, np.full(len(of), buffer), row, rows], axis=1))
        resets = np.concatenate(tables)
        return resets[np.lexsort((resets[:, 3], resets[:, 2], resets[:, 1], resets[:, 0]))]

    def _arrivals(self, buffer: int, uses: Uses) -> tuple[np.ndarray, ...]:
        """(rank, piece, birth, death) of received inputs: alive until last used or passed on."""
        every: Transfers = self.schedule.transfers
        t = every[every.buffer == buffer]
        num_pieces = self.num_pieces[buffer % 2]
        held = t.target * num_pieces + t.piece
        order = np.argsort(held)
        t, held = t[order], held[order]
        birth, death = t.step - 1, t.step - 1
        death = death.copy()
        use = np.flatnonzero(uses.remote)
        at = np.searchsorted(held, uses.rank[use] * num_pieces + uses.piece[use])
        assert (t.step[at] <= uses.first[use]).all(), "a block is used before it arrives"
        death[at] = np.maximum(death[at], uses.last[use])
        passed = np.flatnonzero(t.source != self.owner[t.piece // self.groups[buffer % 2]])
        at = np.searchsorted(held, t.source[passed] * num_pieces + t.piece[passed])
        assert (t.step[at] < t.step[passed]).all(), "a block is passed on before it arrives"
        np.maximum.at(death, at, t.step[passed] - 1)
        return t.target, t.piece, birth, death

    def _partials(self, buffer: int, uses: Uses) -> tuple[np.ndarray, ...]:
        """(rank, piece, birth, death) of partial results: from first division until sent."""
        of = np.flatnonzero(uses.remote)  # sorted by (rank, piece)
        every = self.schedule.transfers
        t = every[every.buffer == buffer]
        t = t[np.lexsort((t.piece, t.source))]
        assert (t.source == uses.rank[of]).all()
        assert (t.piece == uses.piece[of]).all()
        return t.source, t.piece, uses.first[of], t.step - 1


def local_offsets(owner: np.ndarray, length: np.ndarray, num_ranks: int) -> np.ndarray:
    """Index of each data block's first token among its owner's tokens."""
    order = np.argsort(owner, kind="stable")
    before = np.cumsum(length[order]) - length[order]
    tokens = np.bincount(owner, weights=length, minlength=num_ranks).astype(np.int64)
    offsets = np.empty(len(owner), dtype=np.int64)
    offsets[order] = before - (np.cumsum(tokens) - tokens)[owner[order]]
    return offsets
