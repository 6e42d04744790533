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
    """
    n = len(segment)
    row = np.zeros(n, dtype=np.int64)
    active = np.zeros(n, dtype=np.int64)  # intervals alive in this segment, by ascending row
    count = first = free = 0
    for i in range(n):
        if i and segment[i] != segment[i - 1]:
            count = first = free = 0
        elif i and birth[i] == birth[i - 1] and size[i] == size[i - 1]:
            first, free = first + 1, row[i - 1] + size[i - 1]  # what had no room for the last
        else:
            kept = 0
            for j in range(count):
                if death[active[j]] >= birth[i]:
                    active[kept] = active[j]
                    kept += 1
            count, first, free = kept, 0, 0
        place = count
        for j in range(first, count):
            other = active[j]
            if row[other] - free >= size[i]:
                place = j
                break
            free = max(free, row[other] + size[other])
        row[i] = free
        for j in range(count, place, -1):
            active[j] = active[j - 1]
        active[place] = i
        first = place
        count += 1
    return row
