"""Rows of a buffer reused by liveness: compiled first-fit over intervals of steps."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def first_fit(
    segment: np.ndarray, birth: np.ndarray, death: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """Lowest row at which each interval fits beside those alive with it in its segment.

    All arguments are int64 ``[n]``, sorted by (segment, birth). An interval is alive from step
    ``birth`` to step ``death``, both included; segments do not share rows. Returns int64 ``[n]``.

    What is free is a list of gaps, made afresh for each birth; of one birth and size, each interval
    looks on from the gap of the last, so that thousands of equal ones cost no more than a few.
    """
    n = len(segment)
    row = np.zeros(n, dtype=np.int64)
    active = np.empty(n, dtype=np.int64)  # intervals of this segment that may be alive
    gap_row, gap_end = np.empty(n + 1, dtype=np.int64), np.empty(n + 1, dtype=np.int64)
    count = num_gaps = gap = 0
    for i in range(n):
        if i == 0 or segment[i] != segment[i - 1]:
            count = 0
        if count == 0 or birth[i] != birth[i - 1]:
            count = _alive(active, count, death, birth[i])
            num_gaps = _gaps(active[:count], row, size, gap_row, gap_end)
            gap = 0
        elif size[i] != size[i - 1]:
            gap = 0
        if size[i] == 0:
            continue
        while gap_end[gap] - gap_row[gap] < size[i]:
            gap += 1
        assert gap < num_gaps
        row[i] = gap_row[gap]
        gap_row[gap] += size[i]
        active[count] = i
        count += 1
    return row


@njit(cache=True)
def _alive(active: np.ndarray, count: int, death: np.ndarray, birth: int) -> int:
    """Keep the first ``count`` that live on at ``birth``; how many they are."""
    kept = 0
    for j in range(count):
        if death[active[j]] >= birth:
            active[kept] = active[j]
            kept += 1
    return kept


@njit(cache=True)
def _gaps(
    alive: np.ndarray, row: np.ndarray, size: np.ndarray, gap_row: np.ndarray, gap_end: np.ndarray
) -> int:
    """Write the rows between those alive as gaps, ascending, the last one endless; their number."""
    free = found = 0
    for at in np.argsort(row[alive]):
        other = alive[at]
        if row[other] > free:
            gap_row[found], gap_end[found] = free, row[other]
            found += 1
        free = max(free, row[other] + size[other])
    gap_row[found], gap_end[found] = free, np.iinfo(np.int64).max
    return found + 1
