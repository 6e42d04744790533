"""Programs whose keys and values lie in the pages of a pool instead of one after the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dcp.program import MaskProgram, RankPlan
from dcp.ragged import expand, runs, starts
from dcp.slices import K0, K1, shift_slices
from dcp.tables import Item, Move
from dcp.transfers import KV


def keys_stay(program: MaskProgram) -> bool:
    """True where the rank neither sends nor receives keys: then it may read them where they lie."""
    return not any(
        (moves[:, Move.BUFFER] == KV).any() for moves in (program.sends, program.receives)
    )


def in_pages(plan: RankPlan, start: np.ndarray, length: np.ndarray, num_rows: int) -> RankPlan:
    """The plan over a pool of ``num_rows`` rows, the rank's keys being runs of them.

    The plan numbers its keys 0, 1, …; run ``i`` holds the next ``length[i]`` of them, from row
    ``start[i]`` on. An item whose keys lie in several runs becomes several items. Only for plans
    whose keys stay where they are and are not cut by heads.
    """
    masks = {name: _paged(of, start, length, num_rows) for name, of in plan.masks.items()}
    return replace(plan, masks=masks, num_local_keys=num_rows)


def _paged(
    program: MaskProgram, start: np.ndarray, length: np.ndarray, num_rows: int
) -> MaskProgram:
    assert keys_stay(program), "keys that travel must lie one after the other"
    start, length = _joined(start, length)
    begin = starts(length)
    end = begin + length
    items = program.items
    first = np.searchsorted(end, items[:, Item.KV_ROW], side="right")
    last = np.searchsorted(begin, items[:, Item.KV_ROW] + items[:, Item.KV_ROWS], side="left")
    item, index = expand(last - first)
    run = first[item] + index
    cut = items[item]
    low = np.maximum(begin[run], cut[:, Item.KV_ROW])
    high = np.minimum(end[run], cut[:, Item.KV_ROW] + cut[:, Item.KV_ROWS])
    skipped = low - cut[:, Item.KV_ROW]  # keys of the item before this run's

    count = cut[:, Item.END_SLICE] - cut[:, Item.FIRST_SLICE]
    of, _ = expand(count)
    slices = program.slices[runs(cut[:, Item.FIRST_SLICE], count)]
    slices[:, K0] = np.maximum(slices[:, K0], skipped[of])
    slices[:, K1] = np.minimum(slices[:, K1], (skipped + high - low)[of])
    seen = slices[:, K0] < slices[:, K1]
    slices = shift_slices(slices, 0, -skipped[of])[seen]
    count = np.bincount(of[seen], minlength=len(cut))

    cut[:, Item.KV_ROW] = cut[:, Item.DKV_ROW] = start[run] + low - begin[run]
    cut[:, Item.KV_ROWS] = high - low
    cut[:, Item.END_SLICE] = np.cumsum(count)
    cut[:, Item.FIRST_SLICE] = cut[:, Item.END_SLICE] - count
    rows = program.buffer_rows.copy()
    rows[KV] = num_rows
    return replace(program, items=cut[count > 0], slices=slices, buffer_rows=rows)


def _joined(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring runs as one."""
    opens = np.flatnonzero(np.append(True, start[1:] != start[:-1] + length[:-1])[: len(start)])
    return start[opens], np.add.reduceat(length, opens) if len(opens) else length
