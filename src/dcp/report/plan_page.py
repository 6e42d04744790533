"""A plan as one HTML page: who owns and who computes which block, how much, and when.

The page carries its data, style and code itself and needs no network.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dcp.compile import MaskTables
from dcp.plans import Plan
from dcp.simulate import PassTimeline
from dcp.tables import Item, Move

MAX_SLICES = 40_000  # beyond that a tile is drawn as a rectangle, paler where the mask is sparser


def write_plan_page(plan: Plan, path: str | Path, *, title: str = "Plan") -> Path:
    """Write the page of ``plan`` to ``path`` and return the path.

    Args:
        title: first words of the heading, such as the batch's name.
    """
    # "</" must not end the script element that holds the data
    data = json.dumps(plan_page_data(plan, title=title), separators=(",", ":"))
    template = files("dcp.report").joinpath("plan_page.html").read_text(encoding="utf-8")
    page = template.replace("__DATA__", data.replace("</", "<\\/"))
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


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
    rank, division = _tile_maps(tables, plan.num_head_groups)
    slices = tables.slices.tolist() if len(tables.slices) <= MAX_SLICES else None
    return {
        "weight": plan.weights[name],
        "num_divisions": tables.num_divisions,
        "q": tables.tile_q.tolist(),
        "k": tables.tile_k.tolist(),
        "area": tables.tile_area.tolist(),
        "rank": rank.tolist(),
        "division": division.tolist(),
        "slice_start": tables.slice_start.tolist() if slices is not None else None,
        "slices": slices,
        "rank_area": plan.rank_areas(name).round().astype(np.int64).tolist(),
        "received": _received_bytes(plan, name).tolist(),
    }


def _tile_maps(tables: MaskTables, num_head_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Rank and division of every tile, by head group: int64 ``[num_head_groups, num_tiles]``."""
    maps = np.zeros((2, num_head_groups, len(tables.tile_q)), dtype=np.int64)
    group, tile = tables.items[:, [Item.GROUP, Item.TILE]].T
    maps[0, group, tile] = tables.items[:, Item.RANK]
    maps[1, group, tile] = tables.items[:, Item.STEP]
    return maps[0], maps[1]


def _received_bytes(plan: Plan, name: str) -> np.ndarray:
    """Forward bytes each rank receives from its own node and from others: ``[2, num_ranks]``."""
    sends, node = plan.masks[name].sends, plan.cluster.node_of_rank
    source, target = sends[:, [Move.RANK, Move.PEER]].T
    crosses = (node[source] != node[target]).astype(np.int64)
    received = np.zeros((2, plan.num_ranks), dtype=np.int64)
    np.add.at(received, (crosses, target), plan.moved_bytes(name))
    return received


def _pass_data(times: PassTimeline) -> dict[str, Any]:
    return {"seconds": times.seconds} | {
        part: [[float(f"{x:.4g}") for x in step] for step in getattr(times, part).tolist()]
        for part in ("begin", "computed", "arrived")
    }
