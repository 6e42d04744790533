"""Slices of a division as sequences for a kernel of variable lengths with a window.

Such a kernel takes many sequences of queries and keys in one call, and one window for all of them:
query ``i`` of ``m`` sees key ``j`` of ``n`` where ``i + n - m - left <= j <= i + n - m + right``,
either side open where it is -1. Every tight slice is that: a rectangle, a causal square, a part of
a band. A *wave* is one call: slices of one window, none of which share a query or a key, so that
what they find can be put in place without a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dcp.program import MaskProgram
from dcp.runtime.cells import MANY_SLICES, divisions
from dcp.runtime.division import DKV_SHIFT, OUT_SHIFT, merged_slices
from dcp.slices import HI, K0, K1, LO, Q0, Q1, tighten
from dcp.tables import Item

Window = tuple[int, int]  # keys before and after the diagonal; -1: all


@dataclass(frozen=True, eq=False)
class Wave:
    """Slices of one call.

    Attributes:
        slices: tight, int64 ``[n, 8]`` as of :func:`dcp.runtime.division.merged_slices`.
        window: of all of them, seen from the last query and the last key.
        first: none of its queries has a result yet.
    """

    slices: np.ndarray
    window: Window
    first: bool


def program_waves(
    program: MaskProgram, *, many: int | None = MANY_SLICES
) -> dict[int, tuple[list[Wave], np.ndarray]]:
    """The waves of every division by step, in the order in which they run, and the items of more
    than ``many`` slices, which are left to another kernel; None leaves none."""
    waves = {}
    for division, touched in divisions(program):
        items = division.items
        count = items[:, Item.END_SLICE] - items[:, Item.FIRST_SLICE]
        rest = np.zeros(len(items), dtype=bool) if many is None else count > many
        found = []
        for window, slices in division_waves(merged_slices(items[~rest], program.slices)):
            runs = slices[:, [Q0, Q1]] + slices[:, [OUT_SHIFT]]
            first = not any(touched[start:stop].any() for start, stop in runs.tolist())
            for start, stop in runs.tolist():
                touched[start:stop] = True
            found.append(Wave(slices, window, first))
        for row, rows in items[rest][:, [Item.OUT_ROW, Item.Q_ROWS]].tolist():
            touched[row : row + rows] = True
        waves[division.step] = found, items[rest]
    return waves


def division_waves(slices: np.ndarray) -> Iterator[tuple[Window, np.ndarray]]:
    """Slices ``[n, 8]`` by window, and those of one window in waves: each in the first where its
    queries and keys are free."""
    tight = tighten(slices)
    left = np.where(
        tight[:, LO] <= tight[:, K0] - tight[:, Q1] + 1,
        -1,
        tight[:, K1] - tight[:, Q1] - tight[:, LO],
    )
    right = np.where(
        tight[:, HI] >= tight[:, K1] - 1 - tight[:, Q0],
        -1,
        tight[:, HI] + tight[:, Q1] - tight[:, K1],
    )
    waves: dict[tuple[Window, int], list[int]] = {}
    for index, window in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        number = 0
        while any(_meet(tight[index], tight[other]) for other in waves.get((window, number), ())):
            number += 1
        waves.setdefault((window, number), []).append(index)
    for (window, _), members in waves.items():
        yield window, tight[members]


def _meet(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two slices share a query's result row or a key's gradient row."""
    q, k = a[OUT_SHIFT] - b[OUT_SHIFT], a[DKV_SHIFT] - b[DKV_SHIFT]
    apart = a[Q1] + q <= b[Q0] or b[Q1] <= a[Q0] + q, a[K1] + k <= b[K0] or b[K1] <= a[K0] + k
    return not all(apart)
