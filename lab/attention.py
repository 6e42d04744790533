"""``python -m lab attention``: planned attention beside every other strategy, on real slow links.

Gloo ranks run the plans inside a testbed of shaped links (:mod:`lab.testbed`): first they
measure their kernels and links, then every batch is planned for that cluster, then all plans run in
turn, round after round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.masks import named_mask
from dcp.placement import StrategyError
from dcp.planner import plan
from dcp.plans import Plan
from dcp.stats import Stats
from dcp.tables import Move
from lab.fleet import measured_cluster, run_plans
from lab.peers import MEGATRON, plan_megatron
from lab.planner import MASKS, load
from lab.results import merge
from lab.testbed import Testbed, open_testbed

SPEC = AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=64, dtype="float32")
OURS = "auto"
STATIC = ("ring", "zigzag", "allgather", "ulysses", "usp", "double_ring", "a2a_p2p")
PER_BATCH = ("data_parallel", "bucketed", "groups", "flexible_groups", "data_centric", "magi")
TARGETS = {"causal": 1.2, "sparse": 2.0}  # median gain over the best static strategy
LEAST_GAIN = 0.97  # over it, in every case
WIRE_TARGET = 0.05  # relative error of the plan's bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=2, help="nodes (default: %(default)s)")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--mbits", type=float, default=200, help="link speed, Mbit/s (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=int, default=16, help="divides lengths and masks of the reference batches"
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        metavar="NAME",
        default=["longalign-131k-0", "longalign-131k-1", "ldc-131k-0", "ldc-131k-1"],
        help="reference batches (default: %(default)s)",
    )
    parser.add_argument("--masks", nargs="+", default=MASKS, choices=MASKS, metavar="NAME")
    parser.add_argument("--repeat", type=int, default=5, help="timed rounds over all plans")
    parser.add_argument("--out", type=Path, help="folder of attention.json, to add this run to")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Returns the exit status."""
    batches = choose_batches(args.batches)
    with open_testbed(args.nodes, bandwidth=args.mbits * 1e6 / 8) as bed:
        cluster = measure_cluster(bed, args)
        cases = [
            make_case(batch, mask, cluster, scale=args.scale)
            for batch, mask in product(batches, args.masks)
        ]
        different = [made for case in cases for made in case.plans]
        found = run_plans(
            bed, different, SPEC, ranks_per_node=args.ranks_per_node, repeat=args.repeat
        )
    rows, first = [], 0
    for case in cases:
        last = first + len(case.plans)
        runs = [rank["runs"][first:last] for rank in found]
        wire = [rank["wire"][first:last] for rank in found]
        rows.append(compare(case, cluster, runs, wire))
        first = last
    name = f"{args.nodes} x {args.ranks_per_node}, {args.mbits:g} Mbit/s"
    result = {
        "conditions": conditions(),
        "scale": args.scale,
        "repeat": args.repeat,
        "spec": asdict(SPEC),
        "cluster": asdict(cluster),
        "rows": rows,
        "summary": summarise(rows),
    }
    if args.out:
        merge(args.out / "attention.json", name, result)
    print(json.dumps({name: result}) if args.json else as_text(name, result))
    return 0


def choose_batches(names: Sequence[str]) -> list[dict[str, Any]]:
    """Reference batches by name, in the order given."""
    known = {batch["name"]: batch for batch in load("planner_batches.json")}
    for name in names:
        if name not in known:
            raise ValueError(f"--batches: {name!r} is not one of {', '.join(known)}")
    return [known[name] for name in names]


def measure_cluster(bed: Testbed, args: argparse.Namespace) -> Cluster:
    """What the ranks measure of themselves; nothing is fitted to the runs."""
    like = Cluster.preset("laptop", num_nodes=args.nodes, devices_per_node=args.ranks_per_node)
    like = replace(like, inter_node_bandwidth=args.mbits * 1e6 / 8)
    found = run_plans(bed, [], SPEC, ranks_per_node=args.ranks_per_node, rates=True)
    return measured_cluster(found, like, name=f"testbed, {args.mbits:g} Mbit/s")


# --------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One batch under one mask, planned by every strategy.

    Attributes:
        plans: those that differ; strategies that come to one and the same plan share it.
        index: the plan of each strategy.
        cannot: why a strategy has none.
    """

    batch: str
    mask: str
    plans: list[Plan]
    index: dict[str, int]
    cannot: dict[str, str]


def make_case(batch: dict[str, Any], mask: str, cluster: Cluster, *, scale: int) -> Case:
    """Lengths and the mask's own lengths divided by ``scale``, rounded up.

    Attention alone is timed, so attention alone decides (``model_width=0``).
    """
    sequences = scaled_batch(batch["seqlens"], mask, scale)
    plans: list[Plan] = []
    index: dict[str, int] = {}
    cannot: dict[str, str] = {}
    known: dict[bytes, int] = {}
    for strategy in (OURS, *STATIC, *PER_BATCH, MEGATRON):
        try:
            if strategy == MEGATRON:
                made = plan_megatron(sequences, SPEC, cluster)
            else:
                made = plan(sequences, SPEC, cluster, strategy=strategy, model_width=0)
        except StrategyError as error:
            cannot[strategy] = str(error)
            continue
        index[strategy] = known.setdefault(_identity(made), len(plans))
        if index[strategy] == len(plans):
            plans.append(made)
    return Case(batch["name"], mask, plans, index, cannot)


def scaled_batch(seqlens: Sequence[int], mask: str, scale: int) -> SequenceBatch:
    """A reference batch and mask, made smaller alike."""
    parameters = {
        "streaming": {"sink": -(-64 // scale), "window": -(-4096 // scale)},
        "causal_blockwise": {"block": -(-256 // scale)},
    }.get(mask, {})
    lengths = [-(-seqlen // scale) for seqlen in seqlens]
    return SequenceBatch(lengths, [named_mask(mask, n, **parameters) for n in lengths])


def _identity(made: Plan) -> bytes:
    """The same for plans whose ranks do the same, whatever they are called."""
    digest = hashlib.sha256()
    for rank in range(made.num_ranks):
        digest.update(replace(made.rank_plan(rank), stats=Stats()).to_bytes())
    return digest.digest()


# --------------------------------------------------------------------------- compared


def compare(
    case: Case,
    cluster: Cluster,
    runs: Sequence[Sequence[Sequence[tuple[float, float]]]],
    wire: Sequence[Sequence[tuple[int, int]]],
) -> dict[str, Any]:
    """All strategies of a case, and ours against the best of the others.

    Args:
        runs: seconds of (forward, backward), ``[ranks, plans, rounds, 2]``; round 0 warmed up.
        wire: bytes that a rank's node sent and received in both passes, ``[ranks, plans, 2]``.
    """
    slowest = np.max(runs, axis=0)[:, 1:]  # a pass ends with its last rank
    seconds = slowest.sum(axis=2)
    middle = np.median(seconds, axis=1)

    def gain(names: Sequence[str]) -> dict[str, Any]:
        best = min((name for name in names if name in case.index), key=lambda n: of(n, middle))
        by_round = of(best, seconds) / of(OURS, seconds)
        return {
            "best": best,
            "gain": float(of(best, middle) / of(OURS, middle)),
            "lowest": float(by_round.min()),
            "highest": float(by_round.max()),
        }

    def of(name: str, values: np.ndarray) -> Any:
        return values[case.index[name]]

    strategies = {}
    for name, i in case.index.items():
        made, timeline = case.plans[i], case.plans[i].simulate()
        forward, backward = np.median(slowest[i], axis=0)
        strategies[name] = {
            "plan": i,
            "chosen": made.stats.strategy,
            "seconds": float(middle[i]),
            "spread": [float(seconds[i].min()), float(seconds[i].max())],
            "forward_seconds": float(forward),
            "backward_seconds": float(backward),
            "simulated_seconds": timeline.forward_seconds + timeline.backward_seconds,
            "compute_balance": made.stats.compute_balance,
            "token_balance": made.stats.token_balance,
            **compute_and_transfer(made, cluster),
            **carried([rank[i] for rank in wire], made),
        }
    return {
        "batch": case.batch,
        "mask": case.mask,
        "num_tokens": case.plans[0].num_tokens,
        "strategies": strategies,
        "cannot": case.cannot,
        "over_static": gain(STATIC),
        "over_all": gain([*STATIC, *PER_BATCH, MEGATRON]),
    }


def compute_and_transfer(made: Plan, cluster: Cluster) -> dict[str, float]:
    """Seconds the busiest rank computes and the busiest card carries, each as if alone."""
    timeline = made.simulate()
    passes = [*timeline.forward.values(), *timeline.backward.values()]
    compute = sum(float(each.compute_seconds.max()) for each in passes)
    busiest = float(planned_wire(made).max(initial=0))
    return {
        "compute_seconds": compute,
        "transfer_seconds": busiest / cluster.inter_node_bandwidth,
    }


def planned_wire(made: Plan) -> np.ndarray:
    """Bytes that each node sends and receives in both passes: ``[nodes, 2]``."""
    node = made.cluster.node_of_rank
    total = np.zeros((made.cluster.num_nodes, 2), dtype=np.int64)
    for name, tables in made.masks.items():
        source, target = node[tables.sends[:, Move.RANK]], node[tables.sends[:, Move.PEER]]
        for backward in (False, True):
            volume = made.moved_bytes(name, backward=backward) * (source != target)
            np.add.at(total, (source, 0), volume)
            np.add.at(total, (target, 1), volume)
    return total


def carried(wire: Sequence[Sequence[int]], made: Plan) -> dict[str, Any]:
    """Bytes on the busiest card, as planned and as its counters say."""
    planned = planned_wire(made)
    counted = np.array(wire)[np.cumsum(made.cluster.node_sizes) - 1]
    busiest = np.unravel_index(planned.argmax(), planned.shape)
    return {"planned_bytes": int(planned[busiest]), "counted_bytes": int(counted[busiest])}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, worst cases and whether the targets were met."""
    masks = {}
    for kind, target in TARGETS.items():
        gains = [
            row["over_static"]["gain"]
            for row in rows
            if (row["mask"] == "causal") == (kind == "causal")
        ]
        if not gains:
            continue
        masks[kind] = {
            "median_gain": median(gains),
            "lowest_gain": min(gains),
            "highest_gain": max(gains),
            "target": target,
            "met": median(gains) >= target,
        }
    least = min(row["over_static"]["gain"] for row in rows)
    errors = [
        each["counted_bytes"] / each["planned_bytes"] - 1
        for row in rows
        for each in row["strategies"].values()
        if each["planned_bytes"]
    ]
    return {
        "masks": masks,
        "least_gain": least,
        "never_slower": least >= LEAST_GAIN,
        "least_gain_over_all": min(row["over_all"]["gain"] for row in rows),
        "wire_error": max(map(abs, errors), default=0.0),
        "wire_met": max(map(abs, errors), default=0.0) <= WIRE_TARGET,
    }


# --------------------------------------------------------------------------- output


def as_text(name: str, result: dict[str, Any]) -> str:
    """The tables that are printed."""
    lines = [
        f"{name}, lengths ÷ {result['scale']}",
        f"{'batch':18} {'mask':17} {'strategy':16} {'ms':>7} {'lowest':>7} {'highest':>7} "
        f"{'simulated':>9} {'balance':>7} {'tokens':>7} {'MB':>6} {'counted':>7}",
    ]
    for row in result["rows"]:
        for strategy, each in sorted(row["strategies"].items(), key=lambda s: s[1]["seconds"]):
            shown = f"auto: {each['chosen']}" if strategy == OURS else strategy
            low, high = each["spread"]
            lines.append(
                f"{row['batch']:18} {row['mask']:17} {shown:16.16} {each['seconds'] * 1e3:7.0f} "
                f"{low * 1e3:7.0f} {high * 1e3:7.0f} {each['simulated_seconds'] * 1e3:9.0f} "
                f"{each['compute_balance']:7.2f} {each['token_balance']:7.2f} "
                f"{each['planned_bytes'] / 1e6:6.1f} {each['counted_bytes'] / 1e6:7.1f}"
            )
    lines += ["", f"{'batch':18} {'mask':17} {'over static':>32} {'over every other':>32}"]
    for row in result["rows"]:
        shown = [
            f"{g['best']:>15} {g['gain']:4.2f} ({g['lowest']:4.2f}-{g['highest']:5.2f})"
            for g in (row["over_static"], row["over_all"])
        ]
        lines.append(f"{row['batch']:18} {row['mask']:17} {shown[0]:>32} {shown[1]:>32}")
    summary = result["summary"]
    lines += [
        f"{mask:18} median gain {s['median_gain']:.2f} of {s['target']}, "
        f"{'met' if s['met'] else 'NOT MET'}"
        for mask, s in summary["masks"].items()
    ]
    lines.append(
        f"least gain over the best static {summary['least_gain']:.2f}, "
        f"over any strategy {summary['least_gain_over_all']:.2f}; "
        f"bytes on the busiest card within {summary['wire_error']:.1%} of the plan's"
    )
    return "\n".join(lines)
