"""Draws docs/images/strategies/*.svg from real plans.

One batch on two nodes of two devices. Left: who computes which tile, for the first and the last
head, over a strip of who owns the tokens. Right: what every rank computes in every division.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dcp import AttentionSpec, Cluster, Plan, SequenceBatch
from dcp.placement import get_strategy
from dcp.tables import Item

SEQLENS = [22528, 8192, 7168, 6144, 5120]
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=128)
CLUSTER = Cluster(num_nodes=2, devices_per_node=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "usp": {"head_degree": 2},
    "double_ring": {"head_degree": 1, "window": 2, "order": "head-first"},
}
STRATEGIES = (
    "ring", "zigzag", "allgather", "ulysses", "usp", "double_ring", "a2a_p2p", "data_parallel",
    "bucketed", "groups", "flexible_groups", "data_centric", "magi", "hypergraph", "bisection",
)  # fmt: skip
COLOURS = ("#3f6fd8", "#d9912b", "#2f9e6e", "#b4519f")
SIDE, GAP, STRIP = 150, 26, 10
STYLE = """
  text { font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #6a6d74 }
  .empty { fill: #f0f0ec } .edge { stroke: #fff; stroke-width: .4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #9a9ea7 } .empty { fill: #23262b } .edge { stroke: #17181b }
  }
"""


def draw(docs: Path) -> None:
    folder = docs / "images" / "strategies"
    folder.mkdir(parents=True, exist_ok=True)
    for name in STRATEGIES:
        place, options = get_strategy(name), OPTIONS.get(name, {})
        placement = place(SequenceBatch(SEQLENS), SPEC, CLUSTER, **options)
        plan = Plan.from_placement(placement, CLUSTER, strategy=name, num_divisions=3)
        (folder / f"{name}.svg").write_text(drawing(plan))


def drawing(plan: Plan) -> str:
    second = SIDE + GAP
    parts = [
        *matrix(plan, 0, 0, "first head"),
        *matrix(plan, second, plan.num_head_groups - 1, "last head"),
        *divisions(plan, 2 * second + 20),
    ]
    label = f"{plan.stats.strategy}: tiles coloured by rank; work of each rank and division"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 0 680 {SIDE + 50}" role="img" '
        f'aria-label="{label}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def matrix(plan: Plan, x: float, group: int, title: str) -> list[str]:
    """Queries downwards, keys to the right, tiles of one head group, the owners' strip below."""
    scale, top = SIDE / plan.num_tokens, 20
    tables = plan.masks["default"]
    items = tables.items[tables.items[:, Item.GROUP] == group]
    parts = [f'<text x="{x}" y="13">{title}</text>', rect(x, top, SIDE, SIDE)]
    for rank, tile in items[:, [Item.RANK, Item.TILE]].tolist():
        q, k = tables.tile_q[tile], tables.tile_k[tile]
        left, above = x + plan.block_offset[k] * scale, top + plan.block_offset[q] * scale
        width, height = plan.block_length[k] * scale, plan.block_length[q] * scale
        if q == k:  # the diagonal of a causal mask
            corners = [(left, above), (left, above + height), (left + width, above + height)]
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
            parts.append(f'<polygon points="{points}" fill="{COLOURS[rank]}" class="edge"/>')
        else:
            parts.append(rect(left, above, width, height, COLOURS[rank]))
    for offset, length, owner in zip(plan.block_offset, plan.block_length, plan.owner, strict=True):
        left, width = x + offset * scale, length * scale
        parts.append(rect(left, top + SIDE + 5, width, STRIP, COLOURS[owner]))
    return parts


def divisions(plan: Plan, x: float) -> list[str]:
    """A row for every rank, a column for every division; a bar's height is its work."""
    tables, top = plan.masks["default"], 20
    work = np.zeros((plan.num_ranks, tables.num_divisions))
    area = tables.tile_area[tables.items[:, Item.TILE]]
    np.add.at(work, (tables.items[:, Item.RANK], tables.items[:, Item.STEP]), area)
    row, column = SIDE / plan.num_ranks, min(30.0, 210 / tables.num_divisions)
    parts = [f'<text x="{x}" y="13">work of rank (down) and division (across)</text>']
    for rank, of_rank in enumerate(work):
        base = top + (rank + 1) * row - 4
        for division, amount in enumerate(of_rank):
            left, height = x + division * column, (row - 6) * amount / max(work.max(), 1)
            parts.append(rect(left, base - row + 6, column - 4, row - 6))
            parts.append(rect(left, base - height, column - 4, height, COLOURS[rank]))
    s = plan.stats
    between, inside = s.inter_node_bytes / 1e6, s.intra_node_bytes / 1e6
    line = f"moved: {between:.1f} MB between nodes, {inside:.1f} MB inside"
    return [*parts, f'<text x="{x}" y="{top + SIDE + 14}">{line}</text>']


def rect(x: float, y: float, width: float, height: float, colour: str | None = None) -> str:
    look = f'fill="{colour}" class="edge"' if colour else 'class="empty"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {look}/>'
