"""What was measured: the attention operator on real ranks, and steps of real training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lab.figures import style
from lab.figures.style import Drawing, panels, styled
from lab.paper.rows import Row, mean_by, mean_of

PASSES = ("forward_ms", "backward_ms")


@styled
def attention(rows: Sequence[Row]) -> Drawing:
    """Milliseconds, forward and backward, of every system: causal over scales, then by mask."""
    table = mean_by(rows, ("data", "mask", "scale", "system", "ranks", "device", "tokens"), PASSES)
    for row in table:
        row["total_ms"] = row["forward_ms"] + row["backward_ms"]
    figure, axes = panels(2, 2, height=3.4)
    for line, data in zip(axes, ("ldc", "longalign"), strict=True):
        mine = [row for row in table if row["data"] == data]
        scales = sorted({row["scale"] for row in mine})
        causal = {
            system: [
                mean_of(mine, "total_ms", mask="causal", scale=scale, system=system)
                for scale in scales
            ]
            for system in style.SYSTEM_COLORS
        }
        style.bars(line[0], [f"×{scale:g}" for scale in scales], causal, colors=style.SYSTEM_COLORS)
        masks = [mask for mask in style.MASK_TITLES if mask != "causal"]
        sparse = {
            system: [mean_of(mine, "total_ms", mask=mask, system=system) for mask in masks]
            for system in ("TE", "DCP")
        }
        style.bars(
            line[1], [style.MASK_TITLES[mask] for mask in masks], sparse, colors=style.SYSTEM_COLORS
        )
        line[0].set_ylabel(f"{style.DATA_TITLES[data]}\nforward + backward (ms)")
        line[0].set_title("causal")
        line[1].set_title("sparse masks, mean of the scales")
    where = table[0]
    ran = f"{where['ranks']} ranks ({where['device']}), {where['tokens']:,} tokens a batch"
    axes[1][0].set_xlabel("length scale")
    axes[1][1].set_xlabel(ran)
    style.legend(figure, axes[0][0], columns=5)
    return figure, table


@styled
def steps(rows: Sequence[Row]) -> Drawing:
    """Median seconds of a training step by mask, the first tenth of the steps left out."""
    table = []
    for mask in style.MASK_TITLES:
        row: Row = {"mask": mask}
        for system in ("static", "dcp"):
            mine = [r for r in rows if (r["mask"], r["system"]) == (mask, system)]
            warm = [r["seconds"] for r in mine if r["step"] >= len(mine) // 10]
            row[f"{system}_seconds"] = median(warm)
        table.append(row | {"speedup": row["static_seconds"] / row["dcp_seconds"]})
    figure, axes = panels(1, 1, height=2.2, width=style.COLUMN)
    titles = {"static (zigzag ring)": "static", "dcp": "dcp"}
    series = {
        title: [row[f"{system}_seconds"] * 1e3 for row in table] for title, system in titles.items()
    }
    groups = [style.MASK_TITLES[row["mask"]].replace(" ", "\n", 1) for row in table]
    style.bars(
        axes[0][0],
        groups,
        series,
        colors=dict(zip(titles, (style.ORANGE, style.BLUE), strict=True)),
    )
    axes[0][0].set_ylabel("median training step (ms)")
    style.legend(figure, axes[0][0], columns=2)
    return figure, table


@styled
def shaped(results: Mapping[str, Mapping[str, Any]]) -> Drawing:
    """Runs of ``python -m lab attention`` on shaped links: every strategy's gain of ours over it.

    Args:
        results: the runs of ``attention.json`` by name (nodes x ranks, link speed).
    """
    table: list[Row] = []
    for run, kept in results.items():
        for case in kept["rows"]:
            ours = case["strategies"]["auto"]["seconds"]
            table += [
                {"run": run, "batch": case["batch"], "mask": case["mask"], "strategy": name}
                | {"seconds": found["seconds"], "gain": found["seconds"] / ours}
                for name, found in case["strategies"].items()
                if name != "auto"
            ]
    figure, axes = panels(len(results), 1, height=0.4 + 1.7 * len(results), sharex=True)
    names = list(dict.fromkeys(row["strategy"] for row in table))
    for [each], run in zip(axes, results, strict=True):
        masks = {row["mask"]: None for row in table if row["run"] == run}
        series = {}
        for mask in masks:
            gains = [
                [r["gain"] for r in table if (r["run"], r["mask"], r["strategy"]) == (run, mask, n)]
                for n in names
            ]
            series[style.MASK_TITLES[mask]] = [
                median(gain) if gain else float("nan") for gain in gains
            ]
        colors = {style.MASK_TITLES[mask]: style.MASK_COLORS[mask] for mask in masks}
        style.bars(each, [name.replace("_", "\n") for name in names], series, colors=colors)
        each.axhline(1, color="black", linewidth=0.6)
        each.set(title=run, ylabel="its time ÷ dcp's\n(median of batches)")
    style.legend(figure, axes[0][0], columns=4)
    return figure, table
