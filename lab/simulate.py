"""``python -m lab simulate``: the simulator beside measured runs of real ranks.

Gloo ranks run plans inside a testbed of shaped links (:mod:`lab.testbed`). The same ranks
measure their kernels and links, and the simulator predicts the same plans from those rates alone.
Kernels without a network are compared, too: all ranks' work in one process.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.masks import named_mask
from dcp.planner import plan
from dcp.plans import Plan
from dcp.simulate import simulate
from lab.fleet import measured_cluster, run_plans
from lab.testbed import open_testbed

SPEC = AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=64, dtype="float32")
STRATEGIES = ("zigzag", "allgather", "bisection", "a2a_p2p", "flexible_groups")
MASKS = {"causal": {}, "streaming": {"sink": 64, "window": 1024}}
BATCHES = {  # tokens of each sequence: one long among short ones, and many of middling length
    "one long": (3000, 500, 260, 140, 90, 60, 30, 16),
    "long-tailed": (1400, 900, 640, 420, 280, 190, 120, 80, 40, 26),
}
TARGET = 0.2  # median relative error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=2, help="namespaces (default: %(default)s)")
    parser.add_argument(
        "--ranks-per-node", type=int, default=1, help="each wants a core of its own"
    )
    parser.add_argument(
        "--mbits", type=float, nargs="+", default=[1000, 200], help="link speeds, Mbit/s"
    )
    parser.add_argument("--repeat", type=int, default=5, help="timed runs per plan; median kept")
    parser.add_argument("--out", type=Path, help="folder for simulate.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, simulate, print, write. Returns the exit status."""
    cases = make_cases(args.nodes, args.ranks_per_node, args.mbits[0])
    rows, clusters = [], {}
    for mbits in args.mbits:
        with open_testbed(args.nodes, bandwidth=mbits * 1e6 / 8) as bed:
            found = run_plans(
                bed,
                [made for _, made in cases],
                SPEC,
                ranks_per_node=args.ranks_per_node,
                repeat=args.repeat,
                rates=True,
                local=True,
            )
        cluster = measured_cluster(found, cases[0][1].cluster, name=f"{mbits:g} Mbit/s")
        clusters[cluster.name] = asdict(cluster)
        for i, (labels, made) in enumerate(cases):
            runs, local = [rank["runs"][i] for rank in found], [rank["local"][i] for rank in found]
            rows.append(labels | {"link": cluster.name} | compare(made, cluster, runs, local))
    summary = summarise(rows)
    result = {"conditions": conditions(), "clusters": clusters, "rows": rows, "summary": summary}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "simulate.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else as_text(rows, summary))
    return 0


def make_cases(nodes: int, ranks_per_node: int, mbits: float) -> list[tuple[dict[str, str], Plan]]:
    """Every batch, mask and strategy, planned for roughly such a machine."""
    cluster = Cluster.preset("laptop", num_nodes=nodes, devices_per_node=ranks_per_node)
    cluster = replace(cluster, inter_node_bandwidth=mbits * 1e6 / 8)
    cases = []
    for (name, seqlens), mask, strategy in product(BATCHES.items(), MASKS, STRATEGIES):
        batch = SequenceBatch(
            seqlens, [named_mask(mask, seqlen, **MASKS[mask]) for seqlen in seqlens]
        )
        labels = {"batch": name, "mask": mask, "strategy": strategy}
        cases.append((labels, plan(batch, SPEC, cluster, strategy=strategy)))
    return cases


# --------------------------------------------------------------------------- compared


def compare(
    made: Plan,
    cluster: Cluster,
    runs: list[list[tuple[float, float]]],
    local: list[tuple[float, float]],
) -> dict[str, Any]:
    """One plan's measured and simulated seconds.

    Args:
        runs: seconds of (forward, backward) ``[ranks, repeats, 2]``; the first warmed up.
        local: the same of all ranks' work in one process, ``[ranks, 2]``.
    """
    timeline = simulate(made, cluster)
    measured = np.median(np.max(runs, axis=0)[1:], axis=0)  # a pass ends with its last rank
    alone = np.median(local, axis=0)
    row: dict[str, Any] = {"inter_node_bytes": made.stats.inter_node_bytes}
    for i, name in enumerate(("forward", "backward")):
        passes = getattr(timeline, name).values()
        kernels = sum(float(each.compute_seconds.sum()) for each in passes)
        whole = getattr(timeline, f"{name}_seconds")
        row[name] = _beside(measured[i], whole) | {"local": _beside(alone[i], kernels)}
    return row


def _beside(measured: float, simulated: float) -> dict[str, float]:
    """Both seconds and the relative error of the simulated."""
    return {
        "measured_seconds": float(measured),
        "simulated_seconds": float(simulated),
        "error": float(simulated / measured - 1),
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and worst absolute relative errors, per link, pass and kernel-only, and of all.

    Strategies that came to one and the same plan (on one device a node, an all-to-all inside it
    is nothing) count once.
    """
    rows = distinct(rows)

    def line(name: str, errors: list[float]) -> dict[str, Any]:
        sizes = [abs(error) for error in errors]
        return {
            "what": name,
            "median_error": median(sizes),
            "worst_error": max(sizes),
            "median_signed_error": median(errors),
        }

    passes = ("forward", "backward")
    links = list(dict.fromkeys(row["link"] for row in rows))
    lines = [line("all passes on ranks", [row[p]["error"] for row in rows for p in passes])]
    for link, each in product(links, passes):
        errors = [row[each]["error"] for row in rows if row["link"] == link]
        lines.append(line(f"{each}, {link}", errors))
    for each in passes:
        errors = [row[each]["local"]["error"] for row in rows]
        lines.append(line(f"{each}, one process, kernels only", errors))
    return lines


def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each plan and link: equal plans have equal predictions to the last bit."""
    first: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        predicted = (row[each]["simulated_seconds"] for each in ("forward", "backward"))
        first.setdefault((row["link"], row["batch"], row["mask"], *predicted), row)
    return list(first.values())


# --------------------------------------------------------------------------- output


def as_text(rows: list[dict[str, Any]], summary: list[dict[str, Any]]) -> str:
    """The tables that are printed."""
    lines = [
        f"{'link':12} {'batch':12} {'mask':10} {'strategy':16} {'MB':>6} "
        f"{'forward ms':>11} {'simulated':>9} {'error':>6} "
        f"{'backward ms':>11} {'simulated':>9} {'error':>6}"
    ]
    for row in rows:
        numbers = ""
        for name in ("forward", "backward"):
            each = row[name]
            numbers += (
                f" {each['measured_seconds'] * 1e3:11.1f} {each['simulated_seconds'] * 1e3:9.1f}"
                f" {each['error']:+6.0%}"
            )
        lines.append(
            f"{row['link']:12} {row['batch']:12} {row['mask']:10} {row['strategy']:16} "
            f"{row['inter_node_bytes'] / 1e6:6.1f}{numbers}"
        )
    lines += ["", f"{'relative error':34} {'median':>7} {'worst':>7} {'signed':>7}"]
    lines += [
        f"{each['what']:34} {each['median_error']:7.1%} {each['worst_error']:7.1%} "
        f"{each['median_signed_error']:+7.1%}"
        for each in summary
    ]
    met = summary[0]["median_error"] <= TARGET
    lines.append(f"target of the median: {TARGET:.0%}, {'met' if met else 'NOT MET'}")
    return "\n".join(lines)
