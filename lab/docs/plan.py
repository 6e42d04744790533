"""Draw docs/images/planner.png: who computes each tile of a real plan, who owns each token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dcp import AttentionSpec, Cluster, Plan, SequenceBatch, plan
from dcp.tables import Item

SEQLENS = [38252, 17516, 14645, 14012, 11398, 9954, 9678, 7178, 6654, 1785]
NODE_COLORS = ("#2b6cb0", "#2f855a", "#c05621", "#6b46c1")


def rank_color(made: Plan, rank: int) -> tuple[float, ...]:
    """The node gives the hue, the device inside it the shade."""
    from matplotlib.colors import to_rgb

    node = made.cluster.node_of_rank[rank]
    device = rank - int(np.flatnonzero(made.cluster.node_of_rank == node)[0])
    shade = 0.55 * device / max(int(made.cluster.node_sizes[node]) - 1, 1)
    return tuple(c + (1 - c) * shade for c in to_rgb(NODE_COLORS[node % len(NODE_COLORS)]))


def draw_matrix(axes: Axes, made: Plan, title: str) -> None:
    """Tiles of the whole batch, sequences along the diagonal, an ownership strip on the left."""
    tables, start, length = made.masks["default"], made.block_offset, made.block_length
    strip = made.num_tokens * 0.03
    for rank, tile in tables.items[:, [Item.RANK, Item.TILE]].tolist():
        q, k = tables.tile_q[tile], tables.tile_k[tile]
        color = rank_color(made, rank)
        axes.add_patch(Rectangle((start[k], start[q]), length[k], length[q], color=color, lw=0))
    for block, owner in enumerate(made.owner.tolist()):
        color = rank_color(made, owner)
        axes.add_patch(Rectangle((-1.5 * strip, start[block]), strip, length[block], color=color))
    axes.set(
        xlim=(-1.6 * strip, made.num_tokens),
        ylim=(made.num_tokens, 0),
        aspect="equal",
        xlabel="keys (tokens)",
        ylabel="queries (tokens)",
    )
    stats = made.stats
    axes.set_title(
        f"{title}\ncompute balance {stats.compute_balance:.3f}, tokens {stats.token_balance:.3f}, "
        f"{stats.inter_node_bytes / 1e6:.0f} MB between nodes",
        fontsize=9,
    )
    axes.ticklabel_format(style="plain")
    axes.tick_params(labelsize=7)


def draw(docs: Path) -> None:
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    cluster = Cluster(num_nodes=4, devices_per_node=8)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axes, mask in zip(figure.subplots(1, 2), ("causal", "streaming"), strict=True):
        draw_matrix(axes, plan(SequenceBatch(SEQLENS, mask), spec, cluster), mask)
    figure.suptitle(
        "One batch of 131,072 tokens on 4 nodes x 8 devices: hue = node, shade = device; "
        "left strip = owner of the tokens",
        fontsize=10,
    )
    figure.savefig(docs / "images" / "planner.png", dpi=130)
