"""A plan as one HTML page: who owns and who computes which block, what travels for it, and when.

The page carries its data, style and code itself and needs no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dcp.compile import MaskTables
from dcp.cost import item_seconds
from dcp.plans import Plan
from dcp.report.pages import write_page
from dcp.simulate import PassTimeline
from dcp.tables import Item, Move
from dcp.transfers import DKV, KV, OUT, Q

MAX_SLICES = 40_000  # beyond that a tile is drawn as a rectangle, paler where the mask is sparser
_SCRIPTS = ("plan_page.js", "plan_times.js", "plan_blocks.js")


def write_plan_page(plan: Plan, path: str | Path, *, title: str = "Plan") -> Path:
    """Write the page of ``plan`` to ``path`` and return the path.

    Args:
        title: first words of the heading, such as the batch's name.
    """
    return write_page(path, "plan_page.html", _SCRIPTS, plan_page_data(plan, title=title))


def plan_page_data(plan: Plan, *, title: str = "Plan") -> dict[str, Any]:
    """All that the page shows, as plain lists: tokens, bytes, and seconds."""
    spec, cluster = plan.spec, plan.cluster
    timeline = plan.simulate()
    passes = {"forward": timeline.forward, "backward": timeline.backward}
    return {
        "title": title,
        "stats": plan.stats.to_json(),
        "spec": vars(spec),
        "cluster": {"name": cluster.name, "node_of_rank": cluster.node_of_rank.tolist()},
        "seqlens": plan.seqlens.tolist(),
        "blocks": {
            "sequence": plan.block_sequence.tolist(),
            "position": plan.block_position.tolist(),
            "length": plan.block_length.tolist(),
            "owner": plan.owner.tolist(),
        },
        "rank_tokens": plan.rank_tokens.tolist(),
        "num_head_groups": plan.num_head_groups,
        "masks": {
            name: _mask_data(plan, name)
            | {"passes": {which: _pass_data(times[name]) for which, times in passes.items()}}
            for name in plan.masks
        },
    }


def _mask_data(plan: Plan, name: str) -> dict[str, Any]:
    tables = plan.masks[name]
    slices = tables.slices.tolist() if len(tables.slices) <= MAX_SLICES else None
    by_tile = {"rank": tables.items[:, Item.RANK], "division": tables.items[:, Item.STEP]}
    by_tile |= _carried(tables, plan.num_ranks)
    return {
        "weight": plan.weights[name],
        "num_divisions": tables.num_divisions,
        "q": tables.tile_q.tolist(),
        "k": tables.tile_k.tolist(),
        "area": tables.tile_area.tolist(),
        **{what: _by_tile(plan, tables, values).tolist() for what, values in by_tile.items()},
        "seconds": {
            which: _short(_by_tile(plan, tables, _item_seconds(plan, tables, backward)))
            for which, backward in (("forward", False), ("backward", True))
        },
        "moves": _moves(plan, name),
        "slice_start": tables.slice_start.tolist() if slices is not None else None,
        "slices": slices,
        "rank_area": plan.rank_areas(name).round().astype(np.int64).tolist(),
    }


def _by_tile(plan: Plan, tables: MaskTables, values: np.ndarray) -> np.ndarray:
    """Values of the items by head group and tile: ``[num_head_groups, num_tiles]``."""
    found = np.zeros((plan.num_head_groups, len(tables.tile_q)), dtype=values.dtype)
    group, tile = tables.items[:, [Item.GROUP, Item.TILE]].T
    found[group, tile] = values
    return found


def _item_seconds(plan: Plan, tables: MaskTables, backward: bool) -> np.ndarray:
    items = tables.items
    area = tables.tile_area[items[:, Item.TILE]]
    q_rows, kv_rows = items[:, [Item.Q_ROWS, Item.KV_ROWS]].T
    groups = plan.num_head_groups
    seconds = item_seconds(
        area, q_rows, kv_rows, plan.spec, plan.cluster, num_head_groups=groups, backward=backward
    )
    by_item: np.ndarray = seconds / plan.cluster.speed_of_rank[items[:, Item.RANK]]
    return by_item


# ------------------------------------------------------------------ what travels


def _in_order(lines: np.ndarray, source: int, target: int) -> np.ndarray:
    """Lines of :class:`Move` by step, sender and receiver: sends and receives in the same order."""
    return np.lexsort((lines[:, target], lines[:, source], lines[:, Move.STEP]))


def _moves(plan: Plan, name: str) -> dict[str, list[int]]:
    """Every message's parts: in which communication, from whom, to whom, and bytes by pass."""
    sends = plan.masks[name].sends
    order = _in_order(sends, Move.RANK, Move.PEER)
    columns = {"step": Move.STEP, "source": Move.RANK, "target": Move.PEER, "buffer": Move.BUFFER}
    moved = {
        which: plan.moved_bytes(name, backward=which == "backward")[order].tolist()
        for which in ("forward", "backward")
    }
    return {what: sends[order, column].tolist() for what, column in columns.items()} | moved


def _carried(tables: MaskTables, num_ranks: int) -> dict[str, np.ndarray]:
    """For each item, which of :func:`_moves` brought its queries and keys, and which takes its
    partial outputs and key gradients away; -1 where they are the rank's own."""
    came = tables.receives[_in_order(tables.receives, Move.PEER, Move.RANK)]
    gone = tables.sends[_in_order(tables.sends, Move.RANK, Move.PEER)]
    wanted = {
        "q_move": (came, Q, Item.Q_ROW),
        "kv_move": (came, KV, Item.KV_ROW),
        "out_move": (gone, OUT, Item.OUT_ROW),
        "dkv_move": (gone, DKV, Item.DKV_ROW),
    }
    found = {}
    for what, (moves, buffer, column) in wanted.items():
        found[what] = np.full(len(tables.items), -1)
        for rank in range(num_ranks):
            of_rank = np.flatnonzero(tables.items[:, Item.RANK] == rank)
            lines = np.flatnonzero(
                (moves[:, Move.RANK] == rank) & (moves[:, Move.BUFFER] == buffer)
            )
            if len(of_rank) and len(lines):
                row, step = tables.items[of_rank][:, [column, Item.STEP]].T
                chosen = _nearest(moves[lines], row, step, before=moves is came)
                found[what][of_rank] = np.where(chosen < 0, -1, lines[chosen])
    return found


def _nearest(moves: np.ndarray, row: np.ndarray, step: np.ndarray, *, before: bool) -> np.ndarray:
    """For each row in a step, the last move of it until then, or the first after; -1 for none."""
    first, rows, moved = moves[:, [Move.ROW, Move.ROWS, Move.STEP]].T
    covers = (first <= row[:, None]) & (row[:, None] < first + rows)
    fits = covers & ((moved <= step[:, None]) if before else (moved > step[:, None]))
    wait = np.where(fits, np.abs(step[:, None] - moved), np.iinfo(np.int64).max)
    return np.where(fits.any(axis=1), wait.argmin(axis=1), -1)


def _pass_data(times: PassTimeline) -> dict[str, Any]:
    parts = ("begin", "computed", "arrived")
    return {"seconds": times.seconds} | {part: _short(getattr(times, part)) for part in parts}


def _short(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{x:.4g}") for x in row] for row in values.tolist()]
