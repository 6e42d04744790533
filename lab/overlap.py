"""``python -m lab overlap``: what more overlap of messages and linear layers could be worth.

Two ways on, simulated beside the plans that ``auto`` makes:

- *early*, not built: keys and values leave while queries are still projected, and their gradients
  go home while the query projection's backward pass runs. An upper estimate: queries leave early,
  too.
- *halves*: two half-batches take turns, so that the messages of one travel under the linear layers
  and the attention of the other. An upper estimate: what is handed on inside a node leaves at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dcp.batch import SequenceBatch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.halves import plan_halves
from dcp.layer import BACKWARD_SHARE, period, rank_linear_seconds
from dcp.planner import plan
from dcp.plans import Plan
from dcp.schedule import DKV, OUT
from dcp.simulate import Work, flow_links, pass_work
from dcp.tables import Move
from lab.planner import MASKS, SPEC, load, make_batch
from lab.results import merge

QUERY_PROJECTION = 1 / 12  # of a layer's linear parts
LAYERS = 4  # played in a row; what one adds is counted
TIME_BUDGET = 2.0  # seconds of search, for whole batches and for halves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="h100", help="rates (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="of 8 devices (default: %(default)s)")
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--out", type=Path, help="folder of overlap.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Simulate every case, print, write. Returns the exit status."""
    cluster = Cluster.preset(args.preset, num_nodes=args.nodes, devices_per_node=8)
    rows = [
        compare(batch["name"], mask, make_batch(batch["seqlens"], mask), cluster)
        for batch in load("planner_batches.json")
        for mask in args.masks
    ]
    result = {"conditions": conditions(), "rows": rows, "summary": summarise(rows)}
    if args.out:
        merge(args.out / "overlap.json", f"{args.preset} {args.nodes}x8", result)
    print(json.dumps(result) if args.json else as_text(result))
    return 0


def compare(name: str, mask: str, batch: SequenceBatch, cluster: Cluster) -> dict[str, Any]:
    """Seconds of a layer: planned, with early messages, and in half-batches."""
    made = plan(batch, SPEC, cluster, time_budget=TIME_BUDGET)
    whole = made.stats.layer_seconds
    early = sum(early_seconds(made, cluster, backward=backward) for backward in (False, True))
    two = [half for _, half in plan_halves(batch, SPEC, cluster, time_budget=TIME_BUDGET)]
    ways = (False, True) if len(two) == 2 else ()
    return {
        "batch": name,
        "mask": mask,
        "layer_seconds": whole,
        "early_seconds": early,
        "halves_seconds": sum(turn_seconds(two, cluster, backward=way) for way in ways) or None,
        "exposed": sum(made.stats.layer_excess[where] for where in ("intra_node", "inter_node")),
    }


def early_seconds(made: Plan, cluster: Cluster, *, backward: bool) -> float:
    """A pass's period where its first messages (or last ones, backward) have a query projection's
    time more to travel in."""
    [mask] = made.masks
    share = BACKWARD_SHARE if backward else 1 - BACKWARD_SHARE
    linear = rank_linear_seconds(made, cluster, None) * share
    work = pass_work(made, mask, cluster, backward=backward)
    compute = work.compute.copy()
    compute[-1 if backward else 0] += linear * QUERY_PROJECTION
    return period(replace(work, compute=compute), linear * (1 - QUERY_PROJECTION), LAYERS)


# --------------------------------------------------------------------------- half-batches


def turn_seconds(two: Sequence[Plan], cluster: Cluster, *, backward: bool) -> float:
    """What a layer adds where two plans take turns: both linear parts, then both attentions.

    The inputs of the first travel under the second's linear part, its results under the second's
    attention; those of the second under the first's attention and next linear part.
    """
    share = BACKWARD_SHARE if backward else 1 - BACKWARD_SHARE
    compute, flows = [], []
    for index, made in enumerate(two):
        [mask] = made.masks
        work = pass_work(made, mask, cluster, backward=backward)
        compute.append(rank_linear_seconds(made, cluster, None) * share)
        compute.append(work.compute.sum(axis=0))
        for results in (False, True):
            at = 1 + index + 2 * results  # of the steps: linear, linear, attention, attention
            flows.append((at, *_flows(made, mask, backward=backward, results=results)))
    steps = np.stack([compute[0], compute[2], compute[1], compute[3]])
    line = _in_a_row(steps, flows, cluster).play()
    ends = np.maximum(line.computed, line.arrived)[3::4].max(axis=1)
    return float((ends[-1] - ends[0]) / (LAYERS - 1))


def _flows(
    made: Plan, mask: str, *, backward: bool, results: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, target and bytes of all inputs, or of all results, of a pass."""
    sends, ranks = made.masks[mask].sends, made.num_ranks
    volume = made.moved_bytes(mask, backward=backward)
    keep = (volume > 0) & (np.isin(sends[:, Move.BUFFER], (OUT, DKV)) == results)
    pair = sends[keep, Move.RANK] * ranks + sends[keep, Move.PEER]
    pairs, index = np.unique(pair, return_inverse=True)
    return pairs // ranks, pairs % ranks, np.bincount(index, volume[keep], minlength=len(pairs))


def _in_a_row(
    steps: np.ndarray, flows: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]],
    cluster: Cluster,
) -> Work:  # fmt: skip
    """Several layers of the same steps and flows, one after the other."""
    parts: list[tuple[Any, ...]] = [
        (at + layer * len(steps), *flow)
        for layer in range(LAYERS)
        for at, *flow in flows
        if at + layer * len(steps) < LAYERS * len(steps)
    ]
    step = np.concatenate([np.full(len(source), at) for at, source, *_ in parts])
    source, target, volume = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
    node = cluster.node_of_rank
    crosses = node[source] != node[target]
    links, capacity = flow_links(source, target, crosses, cluster)
    latency = np.where(crosses, cluster.inter_node_latency, cluster.intra_node_latency)
    compute = np.tile(steps, (LAYERS, 1))
    return Work(compute, source, target, step, volume, latency, links, capacity)


# --------------------------------------------------------------------------- output


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds over the planned layer's, in the median, at best and at worst."""
    found = {}
    for name in ("early", "halves"):
        ratios = [
            row[f"{name}_seconds"] / row["layer_seconds"]
            for row in rows
            if row[f"{name}_seconds"] is not None
        ]
        found[name] = {"median": median(ratios), "least": min(ratios), "most": max(ratios)}
    return found


def as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{'batch':17} {'mask':16} {'layer ms':>8} {'exposed':>7} {'early ÷':>7} {'halves ÷':>8}"
    ]
    for row in result["rows"]:
        layer, two = row["layer_seconds"], row["halves_seconds"]
        lines.append(
            f"{row['batch']:17} {row['mask']:16} {1e3 * layer:8.2f} {row['exposed'] / layer:7.1%} "
            f"{row['early_seconds'] / layer:7.3f} {'-' if two is None else f'{two / layer:.3f}':>8}"
        )
    for name, ratio in result["summary"].items():
        lines.append(
            f"{name} ÷ planned: {ratio['median']:.3f} in the median, {ratio['least']:.3f} to "
            f"{ratio['most']:.3f}"
        )
    return "\n".join([*lines, "simulated"])
