"""Figures 16 to 19: what plans move and cost, without running them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from lab.figures import style
from lab.figures.style import Drawing, panels, styled
from lab.paper.rows import Row, mean_by

LINES = {"bisection": "-", "hypergraph": "--", "auto": ":"}  # strategy, how its line is drawn
MOST_SECONDS = 10  # published: planning stays below this at reasonable block sizes


@styled
def communication(rows: Sequence[Row]) -> Drawing:
    """Figure 16: inter-node volume over block size, with the static baseline's as a line."""
    table = mean_by(rows, ("data", "strategy", "mask", "block_size"), ("inter_node_mb",))
    figure, axes = panels(1, 2, height=2.3, sharey=True)
    for each, data in zip(axes[0], style.DATA_TITLES, strict=True):
        _mask_lines(each, [row for row in table if row["data"] == data], "inter_node_mb")
        [static] = [r for r in table if r["data"] == data and r["block_size"] == 0]
        each.axhline(
            static["inter_node_mb"],
            color="black",
            linestyle="-.",
            label="static (a2a + p2p)",
            linewidth=0.9,
        )
        each.set(title=style.DATA_TITLES[data], xlabel="block size (tokens)", ylim=(0, None))
    axes[0][0].set_ylabel("inter-node volume of a\nforward pass (MB)")
    style.legend(figure, axes[0][0], columns=4)
    return figure, table


@styled
def planning_time(rows: Sequence[Row]) -> Drawing:
    """Figure 17: planning seconds over block size, masks and blocks included."""
    chosen = [row for row in rows if row["block_size"]]
    table = mean_by(chosen, ("data", "strategy", "mask", "block_size"), ("planning_seconds",))
    figure, axes = panels(1, 2, height=2.3, sharey=True)
    for each, data in zip(axes[0], style.DATA_TITLES, strict=True):
        _mask_lines(each, [row for row in table if row["data"] == data], "planning_seconds")
        each.axhline(MOST_SECONDS, color="black", linestyle="-.", label="published bound (10 s)")
        each.set_yscale("log")
        each.set(title=style.DATA_TITLES[data], xlabel="block size (tokens)", ylim=(0.02, 20))
    axes[0][0].set_ylabel("planning time (s, one core)")
    style.legend(figure, axes[0][0], columns=4)
    return figure, table


@styled
def sparsity(rows: Sequence[Row]) -> Drawing:
    """Figure 18: volume over the mask's sparsity; a pale dot is one batch, a dark one a mean."""
    table = mean_by(
        rows,
        ("data", "mask", "parameter", "value"),
        (
            "inter_node_mb",
            "sparsity",
        ),
    )
    figure, axes = panels(1, 1, height=2.5, width=style.COLUMN)
    [[only]] = axes
    for mask, color in style.MASK_COLORS.items():
        each = [row for row in rows if row["mask"] == mask]
        points = sorted((r["sparsity"], r["inter_node_mb"]) for r in table if r["mask"] == mask)
        if points:
            only.scatter(
                [r["sparsity"] for r in each], [r["inter_node_mb"] for r in each],
                s=2, color=color, alpha=0.2, linewidths=0,
            )  # fmt: skip
            only.plot(*zip(*points, strict=True), "o-", color=color, label=style.MASK_TITLES[mask])
    only.set(xlabel="share of the causal mask's pairs", ylabel="inter-node volume (MB)")
    only.set(xlim=(0, 1.02), ylim=(0, None))
    only.legend(loc="upper left")
    return figure, table


@styled
def balance(rows: Sequence[Row]) -> Drawing:
    """Figure 19: volume over the compute imbalance that plans were allowed, and have."""
    table = mean_by(
        rows,
        ("data", "tolerance"),
        (
            "inter_node_mb",
            "compute_balance",
        ),
    )
    figure, axes = panels(1, 1, height=2.5, width=style.COLUMN)
    [[only]] = axes
    for (data, title), color in zip(
        style.DATA_TITLES.items(), (style.BLUE, style.ORANGE), strict=True
    ):
        points = [row for row in table if row["data"] == data]
        only.plot(
            [row["compute_balance"] for row in points], [row["inter_node_mb"] for row in points],
            "o-", color=color, label=title,
        )  # fmt: skip
        below = data != next(iter(style.DATA_TITLES))
        for row in (row for row in points if row["tolerance"] >= 0.1):  # the others are crowded
            only.annotate(
                f"{row['tolerance']:g}", (row["compute_balance"], row["inter_node_mb"]),
                textcoords="offset points", xytext=(0, -9 if below else 4), fontsize=6,
                color=style.GREY,
            )  # fmt: skip
    only.set(xlabel="compute of the busiest rank ÷ mean", ylabel="inter-node volume (MB)")
    only.set_ylim(0, 1.35 * max(row["inter_node_mb"] for row in table))
    only.legend(loc="upper right", title="number: tolerance asked for", title_fontsize=6.5)
    return figure, table


def _mask_lines(axes: Axes, rows: Sequence[Row], value: str) -> None:
    """A line per mask and strategy over block size; only the first strategy is in the legend."""
    for strategy, dashes in LINES.items():
        for mask, color in style.MASK_COLORS.items():
            points = sorted(
                (row["block_size"], row[value])
                for row in rows
                if (row["strategy"], row["mask"]) == (strategy, mask) and row["block_size"]
            )
            if points:
                label = (
                    style.MASK_TITLES[mask] if strategy == "bisection" else f"_{mask} {strategy}"
                )
                marker = "o" if strategy == "bisection" else ""
                axes.plot(*zip(*points, strict=True), marker + dashes, color=color, label=label)
    sizes = sorted({row["block_size"] for row in rows if row["block_size"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    for strategy, dashes in LINES.items():
        if strategy != "bisection" and any(row["strategy"] == strategy for row in rows):
            axes.plot([], [], dashes, color=style.GREY, label=f"{strategy}, same colours")
