"""The attention of one division as slices in buffer rows, merged into few large ones.

Blocks exist for planning. Where neighbouring blocks run on one rank in one division and their rows
lie side by side, their slices are one slice again, and cost one launch, one loop, one merge.
"""

from __future__ import annotations

import numpy as np

from dcp.program import Attention, MaskProgram
from dcp.ragged import expand, runs
from dcp.slices import HI, K0, K1, LO, Q0, Q1, shift_slices
from dcp.tables import Item

# Columns after a slice's own six: what to add to a query row for its output row (backward: query
# gradient), and to a key row for its gradient row.
OUT_SHIFT, DKV_SHIFT = 6, 7


def attention_steps(program: MaskProgram) -> list[Attention]:
    """The divisions of a program in their order."""
    return [each for each in program.instructions() if isinstance(each, Attention)]


def row_slices(items: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """Slices of all items in absolute buffer rows, int64 ``[n, 8]``, not merged."""
    count = items[:, Item.END_SLICE] - items[:, Item.FIRST_SLICE]
    which, _ = expand(count)
    of = items[which]
    moved = shift_slices(
        slices[runs(items[:, Item.FIRST_SLICE], count)], of[:, Item.Q_ROW], of[:, Item.KV_ROW]
    )
    shifts = np.stack(
        [of[:, Item.OUT_ROW] - of[:, Item.Q_ROW], of[:, Item.DKV_ROW] - of[:, Item.KV_ROW]], axis=1
    )
    return np.concatenate([moved, shifts], axis=1)


def merged_slices(items: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """Slices of a division in buffer rows, neighbours merged: int64 ``[n, 8]``.

    The union of pairs is unchanged: two slices become one where they have one band and shift and
    the rectangle round both holds no further pair of that band.
    """
    s = row_slices(items, slices)
    same = [LO, HI, OUT_SHIFT, DKV_SHIFT]

    s = s[np.lexsort((s[:, K0], s[:, Q1], s[:, Q0], *s[:, same].T))]
    a, b = s[:-1], s[1:]
    joins = (a[:, [*same, Q0, Q1]] == b[:, [*same, Q0, Q1]]).all(axis=1) & (a[:, K1] == b[:, K0])
    s = _join(s, joins)

    s = s[np.lexsort((s[:, K0], s[:, Q0], *s[:, same].T))]
    a, b = s[:-1], s[1:]
    joins = (a[:, same] == b[:, same]).all(axis=1) & (a[:, Q1] == b[:, Q0])
    # keys that only the later queries reach must be beyond the band of the earlier, and vice versa
    joins &= (a[:, K0] == b[:, K0]) | (
        (a[:, K0] < b[:, K0]) & (b[:, K0] <= b[:, Q0] + b[:, LO]) & (b[:, K0] <= a[:, K1])
    )
    joins &= (a[:, K1] == b[:, K1]) | (
        (a[:, K1] < b[:, K1]) & (a[:, K1] >= a[:, Q1] + a[:, HI]) & (b[:, K0] <= a[:, K1])
    )
    return _join(s, joins)


def _join(s: np.ndarray, joins: np.ndarray) -> np.ndarray:
    """Runs of neighbours that join, as one slice each: from the first's start to the last's end."""
    first = np.flatnonzero(np.append(True, ~joins)[: len(s)])
    last = np.append(first[1:] - 1, len(s) - 1)[: len(first)]
    joined = s[first].copy()
    joined[:, Q1], joined[:, K1] = s[last, Q1], s[last, K1]
    return joined


def row_runs(
    row: np.ndarray, target: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces (first row, first target row, rows) as maximal runs, contiguous in both."""
    row, first = np.unique(row, return_index=True)
    target, rows = target[first], rows[first]
    joins = (row[:-1] + rows[:-1] == row[1:]) & (target[:-1] + rows[:-1] == target[1:])
    start = np.flatnonzero(np.append(True, ~joins)[: len(row)])
    length = np.add.reduceat(rows, start) if len(start) else rows[:0]
    return row[start], target[start], length
