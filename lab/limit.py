"""``python -m lab limit``: predicted layers over their limit, and where the excess goes.

The limit is the mean rank's attention and linear layers at full rate, nothing exposed. The excess
comes in parts (:class:`dcp.layer.LayerTimes`): load imbalance, kernel tiles and launches, waiting
inside nodes and between them. All times are simulated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from dcp.batch import AttentionSpec
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.planner import Planner
from lab.planner import MASKS, load, make_batch
from lab.results import merge

PRESETS = ("a100", "h100", "h200", "b200")
SHAPES = ((4, 8), (16, 8), (32, 8))  # nodes, devices of each
MODELS: dict[str, tuple[AttentionSpec, int | None]] = {  # one tensor-parallel rank's heads, width
    "8B-tp4": (AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128), None),
    "8B-tp1": (AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128), 4096),
    "70B-tp8": (AttentionSpec(num_heads=8, num_kv_heads=1, head_dim=128), 8192),
    "MLA": (AttentionSpec(num_heads=16, num_kv_heads=16, head_dim=192, value_dim=128), 7168),
}
PARTS = {
    "imbalance": "load imbalance",
    "kernels": "tiles and launches",
    "intra_node": "waits inside nodes",
    "inter_node": "waits between nodes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", default=["h100"], choices=PRESETS)
    parser.add_argument("--nodes", nargs="+", type=int, default=[4], help="of 8 devices each")
    parser.add_argument("--models", nargs="+", default=["8B-tp4"], choices=tuple(MODELS))
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--all", action="store_true", help="every preset, cluster and model")
    parser.add_argument("--strategy", default="auto", help="strategy to plan with")
    parser.add_argument("--time-budget", type=float, help="seconds for candidates, of the Planner")
    parser.add_argument("--name", default="limit", help="name of this run in the result file")
    parser.add_argument("--out", type=Path, help="folder for limit.json and limit.png")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan every case, print, write. Returns the exit status."""
    every = args.all
    clusters = [
        Cluster.preset(preset, num_nodes=nodes, devices_per_node=8)
        for preset in (PRESETS if every else args.presets)
        for nodes in ([nodes for nodes, _ in SHAPES] if every else args.nodes)
    ]
    rows = [
        measure(batch, mask, cluster, model, strategy=args.strategy, time_budget=args.time_budget)
        for cluster in clusters
        for model in (MODELS if every else args.models)
        for batch in load("planner_batches.json")
        for mask in args.masks
    ]
    result = {"conditions": conditions(), "rows": rows, "summary": summarise(rows)}
    if args.out:
        merge(args.out / "limit.json", args.name, result)
        plot(rows, args.out / "limit.png")
    print(json.dumps(result) if args.json else as_text(result))
    return 0


def measure(
    batch: dict[str, Any],
    mask: str,
    cluster: Cluster,
    model: str,
    *,
    strategy: str = "auto",
    time_budget: float | None = None,
) -> dict[str, Any]:
    """Layer over limit of one batch, its excess in parts of the limit, CPU seconds of planning."""
    spec, width = MODELS[model]
    budget: dict[str, Any] = {} if time_budget is None else {"time_budget": time_budget}
    planner = Planner(spec, cluster, strategy=strategy, model_width=width, **budget)
    began = process_time()
    stats = planner.plan(make_batch(batch["seqlens"], mask)).stats
    return {
        "batch": batch["name"],
        "mask": mask,
        "cluster": f"{cluster.name} {cluster.num_nodes}x{cluster.node_sizes[0]}",
        "model": model,
        "chosen": stats.strategy,
        "num_divisions": stats.num_divisions,
        "token_balance": stats.token_balance,
        "layer_seconds": stats.layer_seconds,
        "limit_seconds": stats.limit_seconds,
        "ratio": stats.layer_seconds / stats.limit_seconds,
        "excess": {name: stats.layer_excess[name] / stats.limit_seconds for name in PARTS},
        "cpu_seconds": process_time() - began,
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and worst of every cluster and model."""
    keys = list(dict.fromkeys((row["cluster"], row["model"]) for row in rows))
    summary = []
    for key in keys:
        some = [row for row in rows if (row["cluster"], row["model"]) == key]
        ratios, seconds = ([row[name] for row in some] for name in ("ratio", "cpu_seconds"))
        summary.append(
            {
                "cluster": key[0],
                "model": key[1],
                "median": median(ratios),
                "worst": max(ratios),
                "mean_excess": {
                    name: sum(row["excess"][name] for row in some) / len(some) for name in PARTS
                },
                "cpu_seconds_median": median(seconds),
                "cpu_seconds_worst": max(seconds),
            }
        )
    return summary


def as_text(result: dict[str, Any]) -> str:
    heads = ("cluster", "model", "batch", "mask", "chosen", "÷ limit", *PARTS.values(), "CPU s")
    lines = ["  ".join(heads)]
    for row in result["rows"]:
        parts = "  ".join(f"{100 * row['excess'][name]:5.1f}%" for name in PARTS)
        lines.append(
            f"{row['cluster']:10} {row['model']:8} {row['batch']:17} {row['mask']:16} "
            f"{row['chosen']:14} {row['ratio']:.3f}  {parts}  {row['cpu_seconds']:.2f}"
        )
    lines.append("")
    for line in result["summary"]:
        parts = ", ".join(f"{PARTS[n]} {100 * x:.1f}%" for n, x in line["mean_excess"].items())
        lines.append(
            f"{line['cluster']} {line['model']}: median {line['median']:.3f}, worst "
            f"{line['worst']:.3f}; mean excess: {parts}; planning {line['cpu_seconds_median']:.2f} "
            f"CPU s in the median, {line['cpu_seconds_worst']:.2f} at worst"
        )
    where = result["conditions"]
    return "\n".join([*lines, f"simulated; planned on {where['processor']}, {where['date']}"])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One bar a case: the parts of its excess, stacked."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install 'dynamic-context-parallel[plots]'")
        return
    figure = Figure(figsize=(max(6.0, 0.22 * len(rows)), 4.2), layout="constrained")
    axes, base = figure.subplots(), [0.0] * len(rows)
    for name, colour in zip(PARTS, ("#c9cbd0", "#8fb0ff", "#6fae75", "#d9804c"), strict=True):
        part = [100 * max(row["excess"][name], 0.0) for row in rows]
        axes.bar(range(len(rows)), part, bottom=base, color=colour, label=PARTS[name])
        base = [below + here for below, here in zip(base, part, strict=True)]
    axes.set_ylabel("layer beyond its limit, %")
    labels = [f"{row['batch']} {row['mask']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=90, fontsize=6)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
