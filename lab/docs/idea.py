"""Draws idea.svg, the picture of the README, from a real plan."""

from pathlib import Path

import numpy as np

from dcp import AttentionSpec, Cluster, Plan, SequenceBatch, plan
from dcp.tables import Item

SEQLENS = [6144, 3584, 2560, 1536]
COLOURS = ("#3f6fd8", "#d9912b", "#2f9e6e", "#b4519f")
STYLE = """
  text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #24262b }
  .title { font-weight: 600; font-size: 16px } .soft { fill: #6a6d74; font-size: 13px }
  .plain { fill: #c9ccd2 } .empty { fill: #f0f0ec } .wait { fill: #b9bcc4 } .edge { stroke: #fff }
  @media (prefers-color-scheme: dark) {
    text { fill: #ececec } .soft { fill: #9a9ea7 } .plain { fill: #565b64 }
    .empty { fill: #23262b } .wait { fill: #60656f } .edge { stroke: #17181b }
  }
"""


def draw(docs: Path) -> None:
    cluster = Cluster(devices_per_node=4, intra_node_bandwidth=160e9, launch_seconds=0)
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    made = plan(SequenceBatch(SEQLENS), spec, cluster, block_size=512)
    parts = [
        panel(0, "1  A batch, cut into blocks", "documents of any length, under any mask"),
        matrices(made, 0, coloured=False),
        panel(390, "2  A place for each block", "strips: who owns the tokens; tiles: who computes"),
        matrices(made, 390, coloured=True),
        panel(780, "3  A time for each transfer", "attention above, transfers under it, per rank"),
        timeline(made, 780),
        *(
            f'<path d="M{x} 215 l9 9 l-9 9" class="wait" transform="translate(0 -9)"/>'
            for x in (358, 748)
        ),
    ]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-6 0 1140 400" role="img" '
        'aria-label="A batch is cut into blocks, placed on ranks and scheduled in divisions">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )
    (docs / "images" / "idea.svg").write_text(svg)


def panel(x: int, title: str, line: str) -> str:
    return (
        f'<text x="{x}" y="20" class="title">{title}</text>'
        f'<text x="{x}" y="42" class="soft">{line}</text>'
    )


def rect(x: float, y: float, w: float, h: float, colour: str, edge: bool = False) -> str:
    """A rectangle in a colour, or of a style class where the colour starts with a dot."""
    look = f'class="{colour[1:]}{" edge" if edge else ""}"'
    if not colour.startswith("."):
        look = f'fill="{colour}"' + (' class="edge"' if edge else "")
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" {look}/>'


def matrices(made: Plan, left: int, *, coloured: bool) -> str:
    """The four documents' squares, their triangles cut into tiles."""
    scale, out = 190 / SEQLENS[0], []
    corner = [(left, 64), (left + 215, 64), (left, 284), (left + 215, 196)]
    tables = made.masks["default"]
    rank = tables.items[np.argsort(tables.items[:, Item.TILE]), Item.RANK]
    position, length, sequence = made.block_position, made.block_length, made.block_sequence
    for (x, y), seqlen in zip(corner, SEQLENS, strict=True):
        out.append(rect(x + 9, y + 9, seqlen * scale, seqlen * scale, ".empty"))
    for block in range(made.num_blocks):
        x, y = corner[sequence[block]]
        at, size = 9 + position[block] * scale, length[block] * scale
        colour = COLOURS[made.owner[block]] if coloured else ".plain"
        out += [rect(x + at, y, size, 6, colour, True), rect(x, y + at, 6, size, colour, True)]
    for tile, (q, k) in enumerate(zip(tables.tile_q, tables.tile_k, strict=True)):
        x, y = corner[sequence[q]]
        x, y = x + 9 + position[k] * scale, y + 9 + position[q] * scale
        w, h = length[k] * scale, length[q] * scale
        colour = COLOURS[rank[tile]] if coloured else ".plain"
        if q != k:
            out.append(rect(x, y, w, h, colour, True))
            continue
        look = f'fill="{colour}"' if coloured else ""
        out.append(
            f'<path d="M{x:.1f} {y:.1f}v{h:.1f}h{w:.1f}z" {look} '
            f'class="edge{"" if coloured else " plain"}"/>'
        )
    return "".join(out)


def timeline(made: Plan, left: int) -> str:
    times, out = made.simulate().forward["default"], []
    scale = 300 / times.seconds
    for rank in range(made.num_ranks):
        y = 82 + rank * 66
        out.append(f'<text x="{left}" y="{y + 19}" class="soft">rank {rank}</text>')
        for step in range(len(times.begin)):
            for start, end, top, high, colour in (
                (times.begin, times.computed, 0, 26, COLOURS[rank]),
                (times.begin, times.arrived, 28, 11, ".wait"),
            ):
                a, b = start[step, rank] * scale, end[step, rank] * scale
                if b > a:
                    out.append(rect(left + 50 + a, y + top, b - a, high, colour, True))
    out.append(f'<text x="{left + 50}" y="362" class="soft">time →</text>')
    return "".join(out)
