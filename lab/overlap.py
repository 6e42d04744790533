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
from dcp.layer import linear_share, period, rank_linear_seconds
from dcp.planner import plan
from dcp.plans import Plan
from dcp.simulate import Flows, Work, flow_work, pass_work, sum_flows
from dcp.tables import Move
from dcp.transfers import DKV, OUT
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
    linear = rank_linear_seconds(made, cluster, None) * linear_share(backward=backward)
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
    compute, flows = [], []
    for index, made in enumerate(two):
        [mask] = made.masks
        work = pass_work(made, mask, cluster, backward=backward)
        compute.append(rank_linear_seconds(made, cluster, None) * linear_share(backward=backward))
        compute.append(work.compute.sum(axis=0))
        sends = made.masks[mask].sends.copy()
        results = np.isin(sends[:, Move.BUFFER], (OUT, DKV))
        # launched in which of the steps linear, linear, attention, attention; counted from 1
        sends[:, Move.STEP] = 2 + index + 2 * results
        volume = made.moved_bytes(mask, backward=backward)
        flows.append(sum_flows(sends, volume, made.num_ranks))
    steps = np.stack([compute[0], compute[2], compute[1], compute[3]])
    line = _in_a_row(steps, flows, cluster).play()
    ends = np.maximum(line.computed, line.arrived)[3::4].max(axis=1)
    return float((ends[-1] - ends[0]) / (LAYERS - 1))


def _in_a_row(steps: np.ndarray, flows: Sequence[Flows], cluster: Cluster) -> Work:
    """Several layers of the same steps and flows, one after the other."""
    source, target, step, volume = (np.concatenate(each) for each in zip(*flows, strict=True))
    layer = np.repeat(np.arange(LAYERS), len(step))
    at = np.tile(step, LAYERS) + layer * len(steps)
    keep = at < LAYERS * len(steps)  # the last results travel under a layer that is not played
    source, target, volume = (np.tile(each, LAYERS)[keep] for each in (source, target, volume))
    return flow_work(np.tile(steps, (LAYERS, 1)), (source, target, at[keep], volume), cluster)


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
