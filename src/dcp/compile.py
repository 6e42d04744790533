"""Schedule -> tables: buffer rows for every block and one line for every launch, move and sum.

A row is one token of one head group. The first rows of each buffer are the rank's own tokens,
head group by head group; what comes from elsewhere, and partial results for elsewhere, live in
the rows behind them, reused as soon as they are dead. All ranks are compiled together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dcp.blocks import BlockTable, ComputeBlocks
from dcp.buffers import first_fit
from dcp.placement import Placement
from dcp.ragged import offsets_in
from dcp.schedule import MaskSchedule
from dcp.slices import shift_slices
from dcp.tables import Arrival, Item, Move, Reset, Tables, table
from dcp.transfers import DKV, KV, OUT, Q, Transfers, Uses


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskTables(Tables):
    """The compiled work of one mask, all ranks; ``buffer_rows`` is ``[num_ranks, 4]``.

    Attributes:
        num_divisions: divisions of the schedule.
        tile_q, tile_k, tile_area: data blocks and pairs of each tile.
        slice_start: CSR offsets of each tile's slices, ``[num_tiles + 1]``.
    """

    num_divisions: int
    tile_q: np.ndarray
    tile_k: np.ndarray
    tile_area: np.ndarray
    slice_start: np.ndarray


def compile_mask(
    placement: Placement, mask: str, schedule: MaskSchedule, num_ranks: int
) -> MaskTables:
    """Assign rows by liveness and write every rank's tables for one mask."""
    layout = _Layout(placement, schedule, num_ranks)
    blocks, tiles = placement.blocks, placement.blocks.masks[mask]
    slice_start = np.searchsorted(tiles.slice_tile, np.arange(tiles.num_tiles + 1))
    t = schedule.transfers
    source_row, target_row = layout.transfer_rows()
    rows = layout.rows(t.buffer, t.piece)
    first_key, last_key, is_band = blocks.batch.band(mask)
    return MaskTables(
        first_key=first_key,
        last_key=last_key,
        is_band=is_band,
        num_divisions=schedule.num_divisions,
        num_steps=schedule.num_steps,
        gradients_hop=placement.gradients_travel and layout.sums_on_the_way(DKV),
        items=_items(layout, blocks.num_head_groups, slice_start),
        sends=_moves(t, t.source, t.target, source_row, rows),
        receives=_moves(t, t.target, t.source, target_row, rows),
        reduces=_reduces(layout, target_row, rows),
        resets=_resets(layout),
        buffer_rows=layout.buffer_rows,
        tile_q=tiles.q,
        tile_k=tiles.k,
        tile_area=tiles.area,
        slice_start=slice_start,
        slices=_slices_in_tiles(blocks, tiles),
    )


def _items(layout: _Layout, num_head_groups: int, slice_start: np.ndarray) -> np.ndarray:
    s = layout.schedule
    tile, group = np.divmod(np.arange(len(s.rank)), num_head_groups)
    items = table(
        Item,
        q_row=layout.row(Q, s.rank, s.q_piece),
        kv_row=layout.row(KV, s.rank, s.kv_piece),
        out_row=layout.row(OUT, s.rank, s.q_piece),
        dkv_row=layout.row(DKV, s.rank, s.kv_piece),
        q_rows=layout.rows(Q, s.q_piece),
        kv_rows=layout.rows(KV, s.kv_piece),
        group=group,
        first_slice=slice_start[tile],
        end_slice=slice_start[tile + 1],
        step=s.division,
        rank=s.rank,
        tile=tile,
    )
    return items[np.lexsort((s.kv_piece, s.q_piece, s.division, s.rank))]


def _moves(
    t: Transfers, rank: np.ndarray, peer: np.ndarray, row: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """One side of all transfers."""
    order = np.lexsort((t.piece, t.buffer, peer, t.step, rank))
    moves = table(Move, peer=peer, buffer=t.buffer, row=row, rows=rows, step=t.step, rank=rank)
    return moves[order]


def _reduces(layout: _Layout, target_row: np.ndarray, rows: np.ndarray) -> np.ndarray:
    home = layout.home
    t, own = layout.schedule.transfers[home], layout.result_rows()
    order = np.lexsort((t.source, own, t.buffer, t.step, t.target))
    return table(
        Arrival,
        buffer=t.buffer,
        source=target_row[home],
        target=own,
        rows=rows[home],
        step=t.step - 1,
        rank=t.target,
    )[order]


def _resets(layout: _Layout) -> np.ndarray:
    """Partial result rows to clear, before the division that first adds to them."""
    tables = []
    for buffer, uses in ((OUT, layout.schedule.q_uses), (DKV, layout.schedule.kv_uses)):
        of = np.flatnonzero(uses.remote)
        rank, piece = uses.rank[of], uses.piece[of]
        tables.append(
            table(
                Reset,
                buffer=np.full(len(of), buffer),
                row=layout.row(buffer, rank, piece),
                rows=layout.rows(buffer, piece),
                step=uses.first[of],
                rank=rank,
            )
        )
    resets = np.concatenate(tables)
    keys = (Reset.ROW, Reset.BUFFER, Reset.STEP, Reset.RANK)
    return resets[np.lexsort(tuple(resets[:, key] for key in keys))]


def _slices_in_tiles(blocks: BlockTable, tiles: ComputeBlocks) -> np.ndarray:
    """The mask's slices, each in coordinates of its tile."""
    tile, offset = tiles.slice_tile, blocks.offset
    return shift_slices(tiles.slices, -offset[tiles.q[tile]], -offset[tiles.k[tile]])


class _Held(NamedTuple):
    """Pieces that ranks hold from step ``birth`` to step ``death``."""

    rank: np.ndarray
    piece: np.ndarray
    birth: np.ndarray
    death: np.ndarray


class _Layout:
    """Where every piece lies on every rank that touches it."""

    def __init__(self, placement: Placement, schedule: MaskSchedule, num_ranks: int) -> None:
        blocks, s = placement.blocks, schedule
        self.schedule, self.length, self.owner = s, blocks.length, placement.owner
        self.groups = np.array([blocks.num_head_groups, blocks.num_kv_groups])
        self.num_pieces = [max(len(self.owner) * g, 1) for g in self.groups.tolist()]
        # of Q and OUT rows, and of KV and DKV rows: cached blocks have only the latter
        own = np.stack([np.where(blocks.is_cached, 0, self.length), self.length])
        self.tokens = np.stack(
            [np.bincount(self.owner, weights=of, minlength=num_ranks).astype(int) for of in own]
        )
        self.local_offset = np.stack([offsets_in(self.owner, of, num_ranks) for of in own])
        self.home = np.flatnonzero(s.transfers.buffer >= OUT)  # results on their way to the owner
        held = [
            self._arrivals(Q, s.q_uses),
            self._arrivals(KV, s.kv_uses),
            self._partials(OUT, s.q_uses),
            self._partials(DKV, s.kv_uses),
        ]
        *rows, self.landing_row = self._fit([*held, self._landings()])
        self.held = [self._by_piece(buffer, held[buffer], rows[buffer]) for buffer in range(4)]

    def _fit(self, parts: list[_Held]) -> list[np.ndarray]:
        """First rows for what is held in each buffer and for what lands, behind the own rows."""
        rank, piece, birth, death = (np.concatenate(column) for column in zip(*parts, strict=True))
        counts = [len(part.rank) for part in parts]
        landing = self.schedule.transfers.buffer[self.home]
        buffer = np.concatenate([np.repeat(np.arange(4), counts[:4]), landing])
        segment, size = rank * 4 + buffer, self.rows(buffer, piece)
        order = np.lexsort((-size, birth, segment))
        row = np.empty(len(segment), dtype=np.int64)
        row[order] = first_fit(segment[order], birth[order], death[order], size[order])
        own = np.tile(self.tokens.T * self.groups, 2).reshape(-1)  # [num_ranks * 4]
        row += own[segment]
        top = own.copy()
        np.maximum.at(top, segment, row + size)
        self.buffer_rows = top.reshape(-1, 4)
        return np.split(row, np.cumsum(counts[:-1]))

    def _by_piece(self, buffer: int, held: _Held, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rank, piece) of what is held, as one ascending number, and its row."""
        key = held.rank * self.num_pieces[buffer % 2] + held.piece
        by_key = np.argsort(key)
        return key[by_key], row[by_key]

    def rows(self, buffer: np.ndarray | int, piece: np.ndarray) -> np.ndarray:
        """Rows of each piece: the tokens of its block."""
        rows: np.ndarray = self.length[piece // self.groups[np.asarray(buffer) % 2]]
        return rows

    def own_row(self, buffer: int, piece: np.ndarray) -> np.ndarray:
        """First row of each piece on its owner."""
        side = buffer % 2
        block, group = np.divmod(piece, self.groups[side])
        tokens = self.tokens[side, self.owner[block]]
        row: np.ndarray = group * tokens + self.local_offset[side, block]
        return row

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

    def sums_on_the_way(self, buffer: int) -> bool:
        """Whether partial results go anywhere but straight to their owner."""
        every = self.schedule.transfers
        t = every[every.buffer == buffer]
        return bool((t.target != self.owner[t.piece // self.groups[buffer % 2]]).any())

    def _arrivals(self, buffer: int, uses: Uses) -> _Held:
        """Received inputs: alive until last used or passed on."""
        every: Transfers = self.schedule.transfers
        t = every[every.buffer == buffer]
        num_pieces = self.num_pieces[buffer % 2]
        held = t.target * num_pieces + t.piece
        order = np.argsort(held)
        t, held = t[order], held[order]
        birth = t.step - 1
        death = birth.copy()
        use = np.flatnonzero(uses.remote)
        at = np.searchsorted(held, uses.rank[use] * num_pieces + uses.piece[use])
        assert (t.step[at] <= uses.first[use]).all(), "a block is used before it arrives"
        death[at] = np.maximum(death[at], uses.last[use])
        passed = np.flatnonzero(t.source != self.owner[t.piece // self.groups[buffer % 2]])
        at = np.searchsorted(held, t.source[passed] * num_pieces + t.piece[passed])
        assert (t.step[at] < t.step[passed]).all(), "a block is passed on before it arrives"
        np.maximum.at(death, at, t.step[passed] - 1)
        return _Held(t.target, t.piece, birth, death)

    def _partials(self, buffer: int, uses: Uses) -> _Held:
        """Partial results: from first division until sent."""
        of = np.flatnonzero(uses.remote)  # sorted by (rank, piece)
        every = self.schedule.transfers
        t = every[every.buffer == buffer]
        t = t[np.lexsort((t.piece, t.source))]
        assert (t.source == uses.rank[of]).all()
        assert (t.piece == uses.piece[of]).all()
        return _Held(t.source, t.piece, uses.first[of], t.step - 1)

    def _landings(self) -> _Held:
        """Partial results where they arrive: until they are reduced, in the same step."""
        t = self.schedule.transfers[self.home]
        return _Held(t.target, t.piece, t.step - 1, t.step - 1)
