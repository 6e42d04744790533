"""Slices of divisions -> tables of tiles for a GPU kernel, in numpy, all divisions at once.

An *outer tile* is a run of rows that one program keeps in registers: queries for outputs and query
gradients, keys for key and value gradients. Its *entries* say which inner tiles it visits: a run
of full ones, or one that is partly masked, with the band that is its mask. Where several bands meet
in a tile, which is rare, each has an entry: bands are disjoint. Inner tiles are counted from the
first row that the outer tile sees, and empty ones have no entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dcp.ragged import expand
from dcp.runtime.division import DKV_SHIFT, OUT_SHIFT
from dcp.slices import HI, K0, K1, LO, Q0, Q1

# Columns of the tables, int32. Entries of a tile: full runs from first_entry on, then from
# first_masked on the masked ones; ``row`` is the first of the inner tile or run.
TILE = ("row", "rows", "result_row", "first_entry", "first_masked", "end_entry", "", "")
FULL = ("row", "num_tiles", "", "", "", "", "", "shift")
MASKED = ("row", "outer0", "outer1", "inner0", "inner1", "lo", "hi", "shift")
WIDTH = 8  # every table row has this many numbers, so that all are aligned

FAR = 1 << 30  # beyond any row: bounds are clipped to it


@dataclass(frozen=True)
class TileTable:
    """Tables of several divisions, each ``[n, WIDTH]`` int32.

    Attributes:
        tiles: outer tiles, longest work first within each division.
        entries: inner tiles of each outer tile. In a masked one a pair counts when ``outer0 <= a <
            outer1``, ``inner0 <= b < inner1`` and ``lo <= b - a <= hi`` for rows a and b of both
            sides; inner0 and inner1 enclose just the rows that one of the tile's outer rows sees.
        tile_start: first tile of each division, and the end: int64 ``[num_divisions + 1]``.
        num_visits: inner tiles visited by each division's outer tiles, int64 ``[num_divisions]``.
    """

    tiles: np.ndarray
    entries: np.ndarray
    tile_start: np.ndarray
    num_visits: np.ndarray


def by_query(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slices ``[n, 8]`` with queries outside: bands ``[n, 6]`` and the inner side's row shift,
    which only atomic additions need."""
    return slices[:, :6], slices[:, DKV_SHIFT]


def by_key(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same with keys outside: the band of differences changes its sign."""
    bands = np.stack(
        [
            slices[:, K0],
            slices[:, K1],
            slices[:, Q0],
            slices[:, Q1],
            -slices[:, HI],
            -slices[:, LO],
        ],
        axis=1,
    )
    return bands, slices[:, OUT_SHIFT]


def build_table(
    division: np.ndarray,
    bands: np.ndarray,
    shift: np.ndarray,
    runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    outer: int,
    inner: int,
) -> TileTable:
    """Cut bands into tiles of ``outer`` x ``inner`` rows.

    Args:
        division: of each band, ascending, int64 ``[n]``.
        bands: ``[n, 6]`` (outer0, outer1, inner0, inner1, lo, hi) in buffer rows.
        shift: of each band: result row minus row on the inner side, int64 ``[n]``.
        runs: of each division, the outer rows: (first row, first result row, number of rows).
    """
    tile_division, row, rows, result_row = _cut_runs(runs, outer)
    tile, band = _overlaps(division, bands, tile_division, row, rows)
    tile, band, *ranges = _inner_rows(tile, bands, band, row, rows)
    origin = np.full(len(row), FAR)
    np.minimum.at(origin, tile, ranges[0])
    first, end, full_first, full_end = _inner_tiles(origin[tile], *ranges, inner=inner)

    seen = np.concatenate([bands, shift[:, None]], axis=1)[band]
    seen[:, 2:4] = np.stack(ranges[:2], axis=1)
    is_full = np.flatnonzero(full_first < full_end)
    full = np.zeros((len(is_full), WIDTH - 1), dtype=np.int64)
    full[:, 0], full[:, -1] = (full_end - full_first)[is_full], seen[is_full, -1]
    # partly masked: before the full ones and behind them
    partial, index = expand(np.maximum([full_first - first, end - full_end], 0).reshape(-1))
    index += np.concatenate([first, full_end])[partial]
    partial %= max(len(tile), 1)
    return _order(
        np.concatenate([tile[is_full], tile[partial]]),
        np.repeat([False, True], [len(is_full), len(partial)]),
        np.concatenate([full_first[is_full], index]),
        np.concatenate([full, seen[partial]]),
        tile_division,
        np.stack([row, rows, result_row], axis=1),
        origin,
        inner,
        len(runs),
    )


def _inner_rows(
    tile: np.ndarray, bands: np.ndarray, band: np.ndarray, row: np.ndarray, rows: np.ndarray
) -> list[np.ndarray]:
    """Where a band has inner rows in a tile: (tile, band, their range, the range that all of the
    tile's rows see, whether there is one)."""
    a0, a1, b0, b1, lo, hi = bands[band].T
    top, bottom = np.maximum(a0, row[tile]), np.minimum(a1, row[tile] + rows[tile])
    b0, b1 = np.maximum(b0, top + lo), np.minimum(b1, bottom + hi)
    full0, full1 = np.maximum(b0, bottom - 1 + lo), np.minimum(b1, top + hi + 1)
    keep = b0 < b1
    whole = (bottom - top == rows[tile]) & (full0 < full1)
    return [x[keep] for x in (tile, band, b0, b1, full0, full1, whole)]


def _inner_tiles(
    origin: np.ndarray,
    b0: np.ndarray,
    b1: np.ndarray,
    full0: np.ndarray,
    full1: np.ndarray,
    whole: np.ndarray,
    *,
    inner: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inner tiles, counted from ``origin``, that rows meet and that they fill: (first, end) of
    both; no full ones are an empty range at the end."""
    first, end = (b0 - origin) // inner, -((origin - b1) // inner)
    full_first = np.where(whole, -((origin - full0) // inner), end)
    full_end = np.where(whole, (full1 - origin) // inner, end)
    none = full_first >= full_end
    return first, end, np.where(none, end, full_first), np.where(none, end, full_end)


def _cut_runs(runs: list, outer: int) -> tuple[np.ndarray, ...]:
    """Runs of rows cut into tiles: (division, row, rows, result row) of each, ascending."""
    division = np.repeat(np.arange(len(runs)), [len(run[0]) for run in runs])
    start, target, length = (
        np.concatenate([np.zeros(0, np.int64), *(run[column] for run in runs)])
        for column in range(3)
    )
    run, index = expand(-(-length // outer))
    row = start[run] + index * outer
    rows = np.minimum(outer, start[run] + length[run] - row)
    return division[run], row, rows, target[run] + index * outer


def _overlaps(
    division: np.ndarray,
    bands: np.ndarray,
    tile_division: np.ndarray,
    row: np.ndarray,
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(tile, band) wherever a band's outer rows meet a tile."""
    key = tile_division * FAR
    first = np.searchsorted(key + row + rows, division * FAR + bands[:, 0], side="right")
    end = np.searchsorted(key + row, division * FAR + bands[:, 1], side="left")
    band, index = expand(np.maximum(end - first, 0))
    return first[band] + index, band


def _order(
    tile: np.ndarray,
    masked: np.ndarray,
    index: np.ndarray,
    rest: np.ndarray,
    tile_division: np.ndarray,
    tiles: np.ndarray,
    origin: np.ndarray,
    inner: int,
    num_divisions: int,
) -> TileTable:
    """The tables in their final form: tiles of a division by falling work, unused ones left out.

    Entries come as (their tile, whether masked, index of the inner tile, numbers behind the row).
    """
    order = np.lexsort((index, masked, tile))
    tile, masked, index, rest = (x[order] for x in (tile, masked, index, rest))
    num_tiles = len(tiles)
    visits = np.bincount(tile, weights=np.where(masked, 1, rest[:, 0]), minlength=num_tiles)
    edges = np.searchsorted(2 * tile + masked, np.arange(2 * num_tiles + 1))
    tiles = np.concatenate([tiles, edges[:-1].reshape(-1, 2), edges[2::2, None]], axis=1)
    order = np.lexsort((tiles[:, 0], -visits, tile_division))
    order = order[visits[order] > 0]
    return TileTable(
        tiles=_padded(tiles[order]),
        entries=_padded(np.concatenate([(origin[tile] + index * inner)[:, None], rest], axis=1)),
        tile_start=np.searchsorted(tile_division[order], np.arange(num_divisions + 1)),
        num_visits=np.bincount(tile_division, weights=visits, minlength=num_divisions).astype(
            np.int64
        ),
    )


def _padded(table: np.ndarray) -> np.ndarray:
    padded = np.zeros((len(table), WIDTH), dtype=np.int32)
    padded[:, : table.shape[1]] = np.clip(table, -FAR, FAR)
    return padded
