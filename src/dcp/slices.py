"""Slices as integer arrays.

A slice is a rectangle of (query, key) pairs cut by a band of diagonals: the pair counts when
``q0 <= q < q1``, ``k0 <= k < k1`` and ``lo <= k - q <= hi``. The four kinds of the public
interface are the bands that touch the rectangle's corners:

=============  ===========================================  ============================
kind           which pairs of the rectangle                 band
=============  ===========================================  ============================
``full``       all                                          none
``causal``     at or below the diagonal that ends in the    ``hi = k1 - q1``
               bottom-right corner
``inv_causal`` at or above the diagonal that starts in the  ``lo = k0 - q0``
               top-left corner
``bi_causal``  between the two                              both
=============  ===========================================  ============================

Cutting a slice to a smaller rectangle keeps its band, so that blocks of a mask need no case
analysis: see :func:`restrict_slices`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dcp.checks import one_of, shown, whole
from dcp.ragged import expand

KINDS = ("full", "causal", "inv_causal", "bi_causal")
Q0, Q1, K0, K1, LO, HI = range(6)
KindSlice = tuple[int, int, int, int, str]  # q0, q1, k0, k1, kind
SliceRow = tuple[int, int, int, int, int | None, int | None]  # …, lo, hi; None: no bound
_PAIRS = 1 << 18  # that are compared at a time


def slice_area(slices: np.ndarray) -> np.ndarray:
    """Number of pairs in each slice. ``slices`` is int64 ``[n, 6]`` (q0, q1, k0, k1, lo, hi)."""
    q0, q1, k0, k1, lo, hi = slices.T
    height, width = np.maximum(q1 - q0, 0), np.maximum(k1 - k0, 0)

    def up_to(bound: np.ndarray) -> np.ndarray:
        """Pairs of the rectangle with k - q <= bound: a sum of row widths clipped to [0, width]."""
        first = q0 + bound + 1 - k0  # width of the first row before clipping
        pairs: np.ndarray = _clipped_sum(first + height, width) - _clipped_sum(first, width)
        return pairs

    area: np.ndarray = np.maximum(up_to(hi) - up_to(lo - 1), 0)
    return area


def _clipped_sum(stop: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Sum of ``clip(t, 0, width)`` over all integers ``t < stop``."""
    inside = np.clip(stop, 0, width)
    total: np.ndarray = inside * (inside - 1) // 2 + np.maximum(stop - width, 0) * width
    return total


def tighten(slices: np.ndarray) -> np.ndarray:
    """Drop empty slices and clip each band and rectangle to what the other leaves.

    Columns behind the six stay with their slice.
    """
    s = slices.copy()
    for _ in range(2):  # the second round sees the first one's smaller rectangles
        s[:, Q0] = np.maximum(s[:, Q0], s[:, K0] - s[:, HI])
        s[:, Q1] = np.minimum(s[:, Q1], s[:, K1] - s[:, LO])
        s[:, K0] = np.maximum(s[:, K0], s[:, Q0] + s[:, LO])
        s[:, K1] = np.minimum(s[:, K1], s[:, Q1] + s[:, HI])
    s[:, LO] = np.maximum(s[:, LO], s[:, K0] - s[:, Q1] + 1)
    s[:, HI] = np.minimum(s[:, HI], s[:, K1] - 1 - s[:, Q0])
    return s[(s[:, Q0] < s[:, Q1]) & (s[:, K0] < s[:, K1]) & (s[:, LO] <= s[:, HI])]


def restrict_slices(slices: np.ndarray, q0: Any, q1: Any, k0: Any, k1: Any) -> np.ndarray:
    """Cut slices to rectangles (scalars or one per slice), coordinates unchanged, none dropped."""
    cut = slices.copy()
    np.maximum(cut[:, Q0], q0, out=cut[:, Q0])
    np.minimum(cut[:, Q1], q1, out=cut[:, Q1])
    np.maximum(cut[:, K0], k0, out=cut[:, K0])
    np.minimum(cut[:, K1], k1, out=cut[:, K1])
    return cut


def shift_slices(slices: np.ndarray, q: Any, k: Any) -> np.ndarray:
    """Move slices by ``q`` queries and ``k`` keys (scalars or one per slice)."""
    moved = slices.copy()
    for column, by in ((Q0, q), (Q1, q), (K0, k), (K1, k), (LO, k - q), (HI, k - q)):
        moved[:, column] += by
    return moved


def make_slices(rows: Sequence[SliceRow]) -> np.ndarray:
    """Slices given as (q0, q1, k0, k1, lo, hi) where None means no bound.

    A bound of any size will do: it is moved to the rectangle's diagonals, ``k0 - q1 < k - q <
    k1 - q0``, so that all sums with it stay within 64 bits.
    """
    bands = []
    for q0, q1, k0, k1, lo, hi in rows:
        least, most = k0 - q1, k1 - q0
        lo = least if lo is None else min(max(lo, least), most)
        hi = most if hi is None else min(max(hi, least), most)
        bands.append((q0, q1, k0, k1, lo, hi))
    return np.array(bands, dtype=np.int64).reshape(-1, 6)


def kinds_of_slice(q0: int, q1: int, k0: int, k1: int, lo: int, hi: int) -> list[KindSlice]:
    """One slice cut at the rows where an edge of its band meets an edge of its rectangle."""
    cuts = sorted({q0, q1, *(c for c in (k0 - lo, k1 - hi - 1) if q0 < c < q1)})
    pieces = []
    for a, b in pairwise(cuts):
        start, end = max(k0, a + lo), min(k1, b + hi)
        left, right = start == a + lo and b - a > 1, end == b + hi and b - a > 1
        # a row further down must really move the edge, else the piece is straight on that side
        left, right = left and start + (b - a - 1) > k0, right and end - (b - a - 1) < k1
        kind = KINDS[2 * left + right]
        pieces.append((a, b, start, end, kind))
    return pieces


def picture(bands: np.ndarray, q_len: int, k_len: int, width: int) -> str:
    """What :meth:`dcp.AttnMask.draw` returns."""
    rows = max(1, min(width, q_len) // 2)
    q = np.linspace(0, q_len, rows + 1).astype(np.int64)
    k = np.linspace(0, k_len, max(1, min(width, k_len)) + 1).astype(np.int64)
    area = cell_areas(bands, q, k)
    size = np.diff(q)[:, None] * np.diff(k)[None, :]
    cells = np.where(area == 0, "·", np.where(area == size, "█", "░"))
    return "\n".join("".join(row) for row in cells)


def cell_areas(bands: np.ndarray, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Pairs in every cell of a grid, int64 ``[len(q) - 1, len(k) - 1]``.

    ``q`` and ``k`` are the ascending edges of its cells; all slices lie between the outermost.
    """
    area = np.zeros((len(q) - 1, len(k) - 1), dtype=np.int64)
    first_q, first_k = (
        np.searchsorted(edges, bands[:, begin], side="right") - 1
        for edges, begin in ((q, Q0), (k, K0))
    )
    num_q = np.searchsorted(q, bands[:, Q1], side="left") - first_q
    num_k = np.searchsorted(k, bands[:, K1], side="left") - first_k
    ends = np.cumsum(num_q * num_k)
    begin = 0
    while begin < len(bands):  # some slices at a time, with the cells that each reaches into
        room = (ends[begin - 1] if begin else 0) + _PAIRS
        stop = max(int(np.searchsorted(ends, room, side="right")), begin + 1)
        part, cell = expand((num_q * num_k)[begin:stop])
        one = part + begin
        row, column = first_q[one] + cell // num_k[one], first_k[one] + cell % num_k[one]
        inside = restrict_slices(bands[one], q[row], q[row + 1], k[column], k[column + 1])
        np.add.at(area, (row, column), slice_area(inside))
        begin = stop
    return area


def check_disjoint(bands: np.ndarray) -> None:
    """Raise for the first pair of slices that share a (query, key) pair."""
    bands = bands[np.argsort(bands[:, Q0], kind="stable")]
    number = np.arange(len(bands))
    # pairs of each slice with those behind it that begin before it ends
    count = np.searchsorted(bands[:, Q0], bands[:, Q1]) - number - 1
    ends = np.cumsum(count)
    for start in range(0, int(count.sum()), _PAIRS):
        pair = np.arange(start, min(start + _PAIRS, ends[-1]))
        one = np.searchsorted(ends, pair, side="right")
        two = pair - (ends - count)[one] + one + 1
        near = (bands[one, K0] < bands[two, K1]) & (bands[two, K0] < bands[one, K1])
        one, two = one[near], two[near]
        shared = restrict_slices(bands[two], *bands[one, :4].T)
        shared[:, LO] = np.maximum(shared[:, LO], bands[one, LO])
        shared[:, HI] = np.minimum(shared[:, HI], bands[one, HI])
        if bad := first_true(slice_area(shared) * (shared[:, LO] <= shared[:, HI]) > 0):
            first, second = (bands[of[bad[0]], :4].tolist() for of in (one, two))
            raise ValueError(
                f"slices overlap: {tuple(first)} and {tuple(second)}; make them disjoint"
            )


def slices_of_kinds(
    q_len: int, k_len: int, given: Iterable[tuple[int, int, int, int, str]]
) -> np.ndarray:
    """Slices given as (q0, q1, k0, k1, kind), checked but for being disjoint."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(f"slices must be a list of (q0, q1, k0, k1, kind), got {shown(given)}")
    rows: list[SliceRow] = []
    for row in given:
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 5:
            raise ValueError(f"a slice is (q0, q1, k0, k1, kind), got {shown(row)}")
        *edges, kind = row
        one_of("slice kind", kind, KINDS)
        if any(type(edge) is not int for edge in edges):
            edges = [
                whole(f"an edge of slice {shown(row)}", edge, least=-(2**63)) for edge in edges
            ]
        q0, q1, k0, k1 = edges
        if not (0 <= q0 <= q1 <= q_len and 0 <= k0 <= k1 <= k_len):
            raise ValueError(
                f"slice ({q0}, {q1}, {k0}, {k1}) lies outside {q_len} queries x {k_len} keys"
            )
        lo = k0 - q0 if kind in ("inv_causal", "bi_causal") else None
        hi = k1 - q1 if kind in ("causal", "bi_causal") else None
        rows.append((q0, q1, k0, k1, lo, hi))
    return make_slices(rows)


# --------------------------------------------------------------------------- ranges per query


def read_ranges(ranges: Any) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends, int64 ``[q_len, R]``, of what :meth:`dcp.AttnMask.from_ranges` takes."""
    try:
        array = np.asarray(ranges)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged; on another device
        raise ValueError(
            f"ranges must be integers of shape [q_len, R, 2], got {shown(ranges)} ({error})"
        ) from None
    if array.ndim == 2:
        array = array[:, None, :]
    if array.ndim != 3 or array.shape[2] != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            f"ranges must be integers of shape [q_len, R, 2], got {array.dtype} {array.shape}"
        )
    if array.dtype.kind == "u":  # the largest of them would turn negative
        array = np.minimum(array, np.uint64(2**62))
    array = array.astype(np.int64)
    return array[..., 0], array[..., 1]


def merge_ranges(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's ranges ``[q_len, R]`` as a sorted union of disjoint ones, empties last."""
    far = np.int64(1) << 60
    empty = end <= start
    if not empty[:, :-1].any() and (start[:, 1:] > end[:, :-1])[~empty[:, 1:]].all():
        return np.where(empty, 0, start), np.where(empty, 0, end)  # it is one already
    start, end = np.where(empty, far, start), np.where(empty, far, end)
    order = np.argsort(start, axis=1, kind="stable")
    start, end = np.take_along_axis(start, order, 1), np.take_along_axis(end, order, 1)
    reach = np.maximum.accumulate(end, axis=1)
    opens = np.ones_like(start, dtype=bool)
    opens[:, 1:] = start[:, 1:] > reach[:, :-1]  # touching ranges become one
    closes = np.ones_like(opens)
    closes[:, :-1] = opens[:, 1:]
    slot = np.cumsum(opens, axis=1) - 1
    merged_start, merged_end = np.zeros_like(start), np.zeros_like(end)
    merged_start[np.nonzero(opens)[0], slot[opens]] = start[opens]
    merged_end[np.nonzero(closes)[0], slot[closes]] = reach[closes]  # reach never falls
    nothing = merged_start >= far
    return np.where(nothing, 0, merged_start), np.where(nothing, 0, merged_end)


def ranges_to_slices(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Slices of per-query ranges ``[q_len, R]``: rows whose edges both stand or step join."""
    bands = []
    for s, e in zip(np.ascontiguousarray(start.T), np.ascontiguousarray(end.T), strict=True):
        live = e > s
        step = np.stack([np.diff(s), np.diff(e)], axis=1)
        joins = live[:-1] & live[1:] & ((step == 0) | (step == 1)).all(axis=1)
        same = np.ones_like(joins)
        same[1:] = ~joins[:-1] | (step[1:] == step[:-1]).all(axis=1)
        first = np.concatenate([live[:1], live[1:] & ~(joins & same)])
        q0 = np.flatnonzero(first)
        if not len(q0):
            continue
        q1 = np.append(q0[1:], len(s))
        dead = np.append(np.flatnonzero(~live), len(s))
        q1 = np.minimum(q1, dead[np.searchsorted(dead, q0)])
        k0, k1 = s[q0], e[q1 - 1]
        lo = np.where(s[q1 - 1] > k0, k0 - q0, k0 - q1)
        hi = np.where(e[q0] < k1, k1 - q1, k1 - q0)
        bands.append(np.stack([q0, q1, k0, k1, lo, hi], axis=1))
    return np.concatenate(bands) if bands else make_slices([])


def dense_to_ranges(dense: np.ndarray) -> np.ndarray:
    """Boolean ``[rows, k_len]`` as half-open runs ``[rows, most runs of a row, 2]``."""
    edges = np.diff(np.pad(dense.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    row, start = np.nonzero(edges == 1)
    end = np.nonzero(edges == -1)[1]
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    ranges = np.zeros((len(dense), int(slot.max(initial=-1)) + 1, 2), dtype=np.int64)
    ranges[row, slot, 0], ranges[row, slot, 1] = start, end
    return ranges


def first_true(flags: np.ndarray | np.bool_) -> list[int]:
    return [int(index) for index in np.flatnonzero(flags)[:1]]
