"""Slices cut into the three shapes that a fused kernel with a causal flag runs well.

A *cell* is a rectangle of queries and keys that is full, or a square cut by its diagonal, or small
and masked. Large slices are mostly the first two, which need no mask in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dcp.program import Attention, MaskProgram, Reduce
from dcp.runtime.division import (
    DKV_SHIFT,
    OUT_SHIFT,
    merged_slices,
    row_slices,
)
from dcp.slices import HI, K0, K1, LO, Q0, Q1, shift_slices, slice_area, tighten
from dcp.tables import Item
from dcp.transfers import OUT

# Queries of a masked cell along the lower edge of a band: larger ones waste pairs, smaller ones
# cost more calls.
STRIP = 512
# An item of more slices than this is one masked cell, if that is less work than a call per slice,
MANY_SLICES = 4
CALL_PAIRS = 128 * 128  # which costs about as much as so many pairs before it computes any.


@dataclass(frozen=True)
class Cell:
    """Rows of a rectangle, and which of its pairs count.

    Attributes:
        q, k: rows of its queries and keys; out, dkv: rows of their results.
        causal: a square, of which query ``i`` sees keys ``0 … i``.
        mask: boolean ``[queries, keys]``; None where every pair counts or ``causal`` says which.
        first: none of its queries has a result yet.
    """

    q: slice
    k: slice
    out: slice
    dkv: slice
    causal: bool = False
    mask: Tensor | None = None
    first: bool = False

    def to(self, device: torch.device) -> Cell:
        """The cell with its mask on ``device``."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))

    def dense_mask(self, device: torch.device) -> Tensor | None:
        """Boolean ``[queries, keys]`` ; None where every pair counts."""
        if self.causal:
            side = self.q.stop - self.q.start
            return torch.ones(side, side, dtype=torch.bool, device=device).tril()
        return self.mask


def program_cells(program: MaskProgram) -> dict[int, list[Cell]]:
    """The cells of every division by step, in the order in which they run."""
    cells: dict[int, list[Cell]] = {}
    for division, touched in divisions(program):
        cells[division.step] = []
        for cell in division_cells(division.items, program.slices):
            cells[division.step].append(replace(cell, first=not touched[cell.out].any()))
            touched[cell.out] = True
    return cells


def divisions(program: MaskProgram) -> Iterator[tuple[Attention, np.ndarray]]:
    """Every division, with which output rows hold a result before it: boolean, in which the caller
    sets the rows that the division writes."""
    touched = np.zeros(int(program.buffer_rows[OUT]), dtype=bool)
    for instruction in program.instructions():
        match instruction:
            case Attention(_, _, resets):
                for buffer, row, rows in resets.tolist():
                    if buffer == OUT:
                        touched[row : row + rows] = False
                yield instruction, touched
            case Reduce(_, moves):
                for buffer, _, row, rows in moves.tolist():
                    if buffer == OUT:
                        touched[row : row + rows] = True


def division_cells(items: np.ndarray, slices: np.ndarray) -> Iterator[Cell]:
    """The cells of one division: of the merged slices, and of items with many slices."""
    area = np.append(0, np.cumsum(slice_area(slices)))
    calls = items[:, Item.END_SLICE] - items[:, Item.FIRST_SLICE]
    pairs = area[items[:, Item.END_SLICE]] - area[items[:, Item.FIRST_SLICE]] + calls * CALL_PAIRS
    one = (calls > MANY_SLICES) & (items[:, Item.Q_ROWS] * items[:, Item.KV_ROWS] <= pairs)
    for band in merged_slices(items[~one], slices):
        yield from _cut(band)
    for item in items[one]:
        yield _masked(row_slices(item[None], slices))


def _cut(band: np.ndarray) -> Iterator[Cell]:
    """One slice: strips along a lower edge, each a masked cell and what the upper edge cuts."""
    for q0, q1, k0, k1, lo, hi, *_ in tighten(band[None]).tolist():
        if lo <= k0 - q1 + 1:  # no lower edge
            yield from _cut_above(band, q0, q1, k0, k1, hi)
            continue
        for start in range(q0, q1, STRIP):
            stop = min(start + STRIP, q1)
            edge = min(stop - 1 + lo, k1)  # from here on the whole strip is above the lower edge
            if start + hi < edge:  # both edges in one small cell
                edge = min(stop + hi, k1)
            if edge > max(k0, start + lo):
                strip = band.copy()
                strip[[Q0, Q1, K0, K1]] = start, stop, max(k0, start + lo), edge
                yield _masked(strip[None])
            yield from _cut_above(band, start, stop, max(k0, edge), min(k1, stop + hi), hi)


def _cut_above(band: np.ndarray, q0: int, q1: int, k0: int, k1: int, hi: int) -> Iterator[Cell]:
    """Rectangle with pairs up to ``hi``: full left of the edge, a square on it, full below."""
    q0, k1 = max(q0, k0 - hi), min(k1, q1 + hi)
    if q0 >= q1 or k0 >= k1:
        return
    edge = min(q0 + hi, k1 - 1)  # the first query sees no key beyond it
    if edge == k1 - 1:
        yield _cell(band, q0, q1, k0, k1)
        return
    if edge > k0:
        yield _cell(band, q0, q1, k0, edge)
    side = min(q1 - q0, k1 - edge)
    yield _cell(band, q0, q0 + side, edge, edge + side, causal=True)
    if q0 + side < q1:
        yield _cell(band, q0 + side, q1, edge, k1)


def _cell(band: np.ndarray, q0: int, q1: int, k0: int, k1: int, *, causal: bool = False) -> Cell:
    out, dkv = int(band[OUT_SHIFT]), int(band[DKV_SHIFT])
    return Cell(
        slice(q0, q1), slice(k0, k1), slice(q0 + out, q1 + out), slice(k0 + dkv, k1 + dkv), causal
    )


def _masked(bands: np.ndarray) -> Cell:
    """The rectangle round the slices, masked unless they fill it."""
    tight = tighten(bands)
    q0, q1 = int(tight[:, Q0].min()), int(tight[:, Q1].max())
    k0, k1 = int(tight[:, K0].min()), int(tight[:, K1].max())
    cell = _cell(bands[0], q0, q1, k0, k1)
    one_full = len(tight) == 1 and tight[0, LO] <= k0 - q1 + 1 and tight[0, HI] >= k1 - 1 - q0
    if one_full:
        return cell
    relative = shift_slices(tight[:, :6], -q0, -k0)
    return replace(cell, mask=band_mask(tuple(map(tuple, relative.tolist())), q1 - q0, k1 - k0))


@lru_cache(maxsize=64)
def band_mask(slices: tuple[tuple[int, ...], ...], queries: int, keys: int) -> Tensor:
    """Boolean ``[queries, keys]``. Cached: the cells along a window's edge are often equal."""
    diagonal = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    mask = torch.zeros(diagonal.shape, dtype=torch.bool)
    for q0, q1, k0, k1, lo, hi in slices:
        part = (slice(q0, q1), slice(k0, k1))
        mask[part] |= (diagonal[part] >= lo) & (diagonal[part] <= hi)
    return mask
