"""What the tables of a message must hold to be run: every number points at something there is.

A plan that is read from a disk or a network passes here before anybody uses it. Nothing is
unrolled to tokens, so that checking takes as long as reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec
from dcp.compile import MaskTables
from dcp.ragged import starts
from dcp.slices import K0, K1, LO, Q0, Q1, slice_area
from dcp.tables import COLUMNS, Arrival, Columns, Item, Move, Reset, Tables
from dcp.transfers import DKV, KV, OUT, Q
from dcp.wire import WireError, exactly

MOST = 1 << 40  # tokens, rows, steps, ranks: sums and products of two stay in 64 bits
_ITEM_ROWS = (
    (Q, Item.Q_ROW, Item.Q_ROWS), (KV, Item.KV_ROW, Item.KV_ROWS),
    (OUT, Item.OUT_ROW, Item.Q_ROWS), (DKV, Item.DKV_ROW, Item.KV_ROWS),
)  # fmt: skip


def require(holds: bool | np.bool_, what: str) -> None:
    """``WireError`` that says what is wrong, unless it holds."""
    if not holds:
        raise WireError(what)


def check_columns(names: tuple[str, ...], *columns: np.ndarray) -> None:
    """Columns of one table: one number a line, none negative or beyond :data:`MOST`."""
    for name, column in zip(names, columns, strict=True):
        require(column.shape == (len(columns[0]),), f"{name} has shape {column.shape}")
        require(within(column, 0, MOST), f"{name} is out of range")


def within(values: np.ndarray, low: int, high: int | np.ndarray) -> bool:
    """Whether ``low <= values < high`` for all of them."""
    return bool(((values >= low) & (values < high)).all())


def check_cover(first: np.ndarray, length: np.ndarray, total: int, *, whole: bool) -> None:
    """Runs inside ``range(total)``, none over another; all of it, if ``whole``."""
    order = np.lexsort((length, first))
    end = first[order] + length[order]
    free = np.append(first[order], total) - np.insert(end, 0, 0)
    ok = (free == 0).all() if whole else (free >= 0).all()
    require(ok, f"data blocks do not {'cover' if whole else 'fit'} {total} tokens")


def check_tables(tables: Tables, own: np.ndarray, *, num_groups: int, num_ranks: int) -> None:
    """Tables of a mask: of all ranks, or of one alone.

    Args:
        own: see :func:`own_rows`.
        num_groups, num_ranks: head groups and ranks of the plan.
    """
    rows = tables.buffer_rows if isinstance(tables, MaskTables) else tables.buffer_rows[None]
    require(rows.shape == own.shape, f"buffer_rows has shape {tables.buffer_rows.shape}")
    require(within(rows, 0, MOST) and (rows >= own).all(), "buffers lack the own tokens")
    require(0 <= tables.num_steps < MOST, f"num_steps is {tables.num_steps}")
    of: dict[str, np.ndarray] = {}
    for name, columns in COLUMNS.items():
        table = getattr(tables, name)
        width = len(columns) if isinstance(tables, MaskTables) else columns.RANK
        require(table.ndim == 2 and table.shape[1] == width, f"{name} has shape {table.shape}")
        table = np.pad(table, ((0, 0), (0, len(columns) - width)))
        _check_lines(name, columns, table, len(rows), tables.num_steps)
        of[name] = table
    items, reduces, resets = of["items"], of["reduces"], of["resets"]
    for buffer, row, count in _ITEM_ROWS:
        _check_rows("items", items, items[:, Item.RANK], buffer, row, count, rows)
    require(within(items[:, Item.GROUP], 0, num_groups), "items name other head groups")
    for name in ("sends", "receives"):
        moves = of[name]
        require(within(moves[:, Move.PEER], 0, num_ranks), f"{name} name other ranks")
        _check_rows(name, moves, moves[:, Move.RANK], Move.BUFFER, Move.ROW, Move.ROWS, rows)
    for column in (Arrival.SOURCE, Arrival.TARGET):
        _check_rows(
            "reduces", reduces, reduces[:, Arrival.RANK], Arrival.BUFFER, column, Arrival.ROWS, rows
        )
    _check_rows("resets", resets, resets[:, Reset.RANK], Reset.BUFFER, Reset.ROW, Reset.ROWS, rows)
    _check_slices(tables, items)


def _check_lines(
    name: str, columns: Columns, table: np.ndarray, num_ranks: int, num_steps: int
) -> None:
    """Sign, rank, step and order of a table's lines."""
    require(within(table, 0, MOST), f"{name} has numbers out of range")
    rank, step = table[:, columns.RANK], table[:, columns.STEP]
    first = int(columns is Move)  # communication 0 does not exist, and one follows the last step
    require(within(rank, 0, num_ranks), f"{name} are of other ranks")
    require(within(step, first, num_steps + first), f"{name} are of other steps")
    later = (np.diff(rank) > 0) | ((np.diff(rank) == 0) & (np.diff(step) >= 0))
    require(later.all(), f"{name} are out of order")


def _check_rows(
    name: str,
    table: np.ndarray,
    rank: np.ndarray,
    buffer: int,
    row: int,
    count: int,
    rows: np.ndarray,
) -> None:
    """Rows of a table lie in the buffer; ``buffer`` is one, or for tables that have it a column."""
    of: np.ndarray = table[:, buffer] if name != "items" else np.full(len(table), buffer)
    require(within(of, 0, 4), f"{name} name other buffers")
    end = table[:, row] + table[:, count]
    require((end <= rows[rank, of]).all(), f"{name} have rows beyond their buffers")


def _check_slices(tables: Tables, items: np.ndarray) -> None:
    """Slices lie in the items that use them."""
    slices, first, end = tables.slices, items[:, Item.FIRST_SLICE], items[:, Item.END_SLICE]
    require(slices.ndim == 2 and slices.shape[1:] == (6,), f"slices have shape {slices.shape}")
    require(within(slices[:, :LO], 0, MOST), "slices are out of range")
    require(within(slices[:, LO:], -MOST, MOST), "slices have bands out of range")
    require((slices[:, [Q0, K0]] <= slices[:, [Q1, K1]]).all(), "slices end before they begin")
    require((first <= end).all() and within(end, 0, len(slices) + 1), "items name other slices")
    if used := int((end > first).sum()):
        bounds = np.stack([first, end], axis=1)[end > first].ravel()
        for column, size in ((Q1, Item.Q_ROWS), (K1, Item.KV_ROWS)):
            padded = np.append(slices[:, column], 0)
            most = np.maximum.reduceat(padded, bounds)[::2][:used]
            fits = (most <= items[end > first, size]).all()
            require(fits, "slices reach beyond their items")


def check_mask(tables: MaskTables, block_length: np.ndarray) -> None:
    """What only the tables of all ranks can show: tiles, and both sides of each message."""
    names = ("tile_q", "tile_k", "tile_area")
    check_columns(names, tables.tile_q, tables.tile_k, tables.tile_area)
    start, count, blocks = tables.slice_start, len(tables.tile_q), len(block_length)
    fits = within(tables.tile_q, 0, blocks) and within(tables.tile_k, 0, blocks)
    require(fits, "tiles name other data blocks")
    require(start.shape == (count + 1,), f"slice_start has shape {start.shape}")
    in_order = start[0] == 0 and start[-1] == len(tables.slices) and (np.diff(start) >= 0).all()
    require(in_order, "slice_start is no list of starts")
    area = np.append(0, np.cumsum(slice_area(tables.slices)))[start]
    require((np.diff(area) == tables.tile_area).all(), "tile_area is not that of the slices")
    require(0 <= tables.num_divisions < MOST, f"num_divisions is {tables.num_divisions}")
    items, tile = tables.items, tables.items[:, Item.TILE]
    require(within(tile, 0, count), "items name other tiles")
    wanted = np.stack(
        [block_length[tables.tile_q[tile]], block_length[tables.tile_k[tile]],
         start[tile], start[tile + 1]], axis=1
    )  # fmt: skip
    found = items[:, [Item.Q_ROWS, Item.KV_ROWS, Item.FIRST_SLICE, Item.END_SLICE]]
    require((found == wanted).all(), "items are not those of their tiles")
    sent, received = tables.sends, tables.receives.copy()
    received[:, [Move.RANK, Move.PEER]] = received[:, [Move.PEER, Move.RANK]]
    received = received[np.lexsort(received[:, [Move.PEER, Move.STEP, Move.RANK]].T)]
    of_both = [Move.RANK, Move.STEP, Move.PEER, Move.BUFFER, Move.ROWS]
    same = np.array_equal(sent[:, of_both], received[:, of_both])
    require(same, "what is sent is not what is received")


def own_rows(
    tokens: np.ndarray, keys: np.ndarray, num_groups: int, spec: AttentionSpec
) -> np.ndarray:
    """Rows of ranks' own tokens and keys in the four buffers: int64 ``[ranks, 4]``."""
    ok = type(num_groups) is int and num_groups > 0 and spec.num_heads % num_groups == 0
    require(ok, f"num_head_groups={num_groups!r} does not divide num_heads={spec.num_heads}")
    kv_groups = min(num_groups, spec.num_kv_heads)
    return np.stack([tokens * num_groups, keys * kv_groups] * 2, axis=-1)


def check_weights(weights: Any, masks: Mapping[str, object]) -> None:
    """A weight for each mask, and for nothing else."""
    exactly("weights", weights, masks)
    ok = all(type(weight) in (int, float) and weight >= 0 for weight in weights.values())
    require(ok, f"weights are {weights}")


def check_layout(
    seqlens: np.ndarray,
    num_cached: np.ndarray,
    sequence: np.ndarray,
    offset: np.ndarray,
    length: np.ndarray,
    owner: np.ndarray,
    *,
    num_ranks: int,
) -> None:
    """The data blocks of a plan: every key of every sequence in one of them, of one rank."""
    check_columns(("seqlens", "num_cached"), seqlens, num_cached)
    require((num_cached <= seqlens).all(), "more tokens are cached than there are")
    names = ("block_sequence", "block_offset", "block_length", "owner")
    check_columns(names, sequence, offset, length, owner)
    require(within(owner, 0, num_ranks), f"owner names ranks beyond the {num_ranks} there are")
    require(within(sequence, 0, len(seqlens)), "block_sequence names other sequences")
    total = int(seqlens.sum())
    require(0 <= total < MOST, f"{total} tokens are too many")
    check_cover(offset, length, total, whole=True)
    position, count = offset - starts(seqlens)[sequence], seqlens[sequence]
    inside = (position >= 0) & (position + length <= count)
    cached = num_cached[sequence]
    one_kind = (position >= cached) | (position + length <= cached)
    require((inside & one_kind).all(), "data blocks reach beyond their sequences")
