"""The talk's motivation: lengths differ, and static context parallelism pays for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lab.figures import style
from lab.figures.style import Drawing, panels, styled
from lab.paper.lengths import Lengths
from lab.paper.rows import Row, mean_by

# Share of an iteration that communication of context parallelism takes, per cent, published by
# (nodes, tokens); which of the last two belongs to which length is not certain.
PUBLISHED_SHARE = {(4, 65536): 27.7, (8, 65536): 44.6, (8, 131072): 36.7}
PUBLISHED_REDUNDANT = 38 / 48  # published example: a shared question mask's key blocks


@styled
def lengths(known: Mapping[str, Lengths]) -> Drawing:
    """Distribution of document lengths: documents by length, and tokens by length."""
    edges = np.geomspace(64, 131072, 45)
    figure, axes = panels(1, 2, height=2.2)
    table: list[Row] = []
    for (data, of), color in zip(known.items(), (style.BLUE, style.ORANGE), strict=True):
        title = f"{style.DATA_TITLES[data]}, {of.source}"
        for each, weights in zip(axes[0], (np.ones(len(of.tokens)), of.tokens), strict=True):
            share = np.histogram(of.tokens, bins=edges, weights=weights)[0] / weights.sum() * 100
            each.stairs(share, edges, color=color, fill=True, alpha=0.35)
            each.stairs(share, edges, color=color, label=title)
        counts = np.histogram(of.tokens, bins=edges)[0]
        table += [
            {"data": data, "source": of.source, "from": round(a), "to": round(b)}
            | {"documents": int(n)}
            for a, b, n in zip(edges, edges[1:], counts, strict=False)
        ]
    for each, what in zip(axes[0], ("documents", "tokens"), strict=True):
        each.set_xscale("log", base=2)
        each.set_xticks(
            [2**n for n in range(6, 18, 2)], ["64", "256", "1 K", "4 K", "16 K", "64 K"]
        )
        each.set(xlabel="document length (tokens)", ylabel=f"share of {what} (%)")
    style.legend(figure, axes[0][0], columns=2)
    return figure, table


@styled
def share(rows: Sequence[Row]) -> Drawing:
    """Share of an iteration that exposed communication takes under the static scheme."""
    parts = ("others", "attention_alone", "overlapped", "exposed")
    table = mean_by(rows, ("nodes", "tokens"), parts)
    for row in table:
        row["simulated_percent"] = 100 * row["exposed"] / sum(row[part] for part in parts)
        row["published_percent"] = PUBLISHED_SHARE.get((row["nodes"], row["tokens"]), float("nan"))
    figure, axes = panels(1, 1, height=2.2, width=style.COLUMN)
    series = {
        "simulated": [row["simulated_percent"] for row in table],
        "published": [row["published_percent"] for row in table],
    }
    groups = [f"{row['nodes']} nodes\n{row['tokens'] // 1024} K" for row in table]
    style.bars(
        axes[0][0], groups, series, colors=dict.fromkeys(series, style.RED), hatched=("published",)
    )
    axes[0][0].set_ylabel("communication (% of iteration)")
    axes[0][0].legend(loc="upper left")
    return figure, table


@styled
def waste(rows: Sequence[Row]) -> Drawing:
    """What a zigzag ring moves in vain, and how uneven it leaves its ranks, by mask."""
    table = mean_by(rows, ("mask",), ("redundant_share", "compute_balance"))
    figure, axes = panels(1, 2, height=2.2)
    groups = [style.MASK_TITLES[row["mask"]].replace(" ", "\n", 1) for row in table]
    redundant = {"simulated": [100 * row["redundant_share"] for row in table]}
    uneven = {"simulated": [row["compute_balance"] for row in table]}
    style.bars(axes[0][0], groups, redundant, colors={"simulated": style.RED})
    style.bars(axes[0][1], groups, uneven, colors={"simulated": style.BLUE})
    axes[0][0].axhline(
        100 * PUBLISHED_REDUNDANT, color="black", linestyle="-.", linewidth=0.8,
        label="published example, shared question",
    )  # fmt: skip
    axes[0][0].set(ylabel="received keys and values\nthat no query sees (%)", ylim=(0, 100))
    axes[0][1].set(ylabel="compute of the busiest\nrank ÷ mean", ylim=(0, None))
    axes[0][1].axhline(1, color="black", linewidth=0.6)
    axes[0][0].legend(loc="upper left", fontsize=6.5)
    return figure, table
