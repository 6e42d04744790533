"""``python -m lab emulate``: strategies executed on an emulated cluster, in stretched time.

Every rank is a process with the real executor and real gloo messages of their true sizes. Its
attention kernel sleeps the predicted seconds times a dilation, links are as much slower and
latencies as much longer (:mod:`lab.emulated_rank`, :mod:`lab.emulated_network`). What a run takes,
divided by the dilation, is called *emulated*: it shows the schedule, the executor and the messages
at work, and takes the kernels' times from the simulator.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dcp.bench.conditions import conditions
from dcp.cluster import PRESETS, Cluster
from dcp.planner import layer_seconds
from dcp.plans import Plan
from dcp.simulate import simulate
from lab.attention import OURS, STATIC, choose_batches
from lab.emulated_network import dilated, open_network
from lab.emulated_plans import (
    CAREFUL,
    chosen_strategies,
    fits_in_memory,
    make_cases,
    own_share,
    predicted_seconds,
    wanted_dilation,
    worth_running,
)
from lab.emulated_rank import link_ratios
from lab.planner import MASKS, SPEC

KEYS = ("batch", "mask", "strategy")  # what a row is of
MOST_BUSY = 0.7  # of the cores' time; beyond it, messages wait for cores and not for links
LINK_ERROR = 0.1  # between what a link should give and what it gave
MOST_OWN_SHARE = 0.2  # beyond which a pass is too short to say anything of its simulation
MOST_TRIES = 3  # of links that are not what they should be: other work holds them up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--devices-per-node", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--preset", default="a100", choices=PRESETS, metavar="NAME",
                        help=f"rates: {', '.join(PRESETS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--batches", nargs="+", metavar="NAME", default=["longalign-131k-0"],
                        help="reference batches (default: %(default)s)")  # fmt: skip
    parser.add_argument("--masks", nargs="+", default=["causal"], choices=MASKS, metavar="NAME")
    parser.add_argument("--strategies", nargs="+", metavar="NAME",
                        default=["auto", "zigzag", "double_ring", "data_parallel"],
                        help="by name, 'static' or 'all' (default: %(default)s)")  # fmt: skip
    parser.add_argument("--within", type=float, metavar="FACTOR",
                        help="leave out what is predicted this many times slower than the fastest; "
                        "the fastest static rule stays")  # fmt: skip
    parser.add_argument("--layers", type=int, default=0,
                        help="also run this many whole layers in a row; plans are then chosen by "
                        "the layer, else by attention alone")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1, help="over all plans; median kept")
    parser.add_argument("--dilation", type=float, help="how much slower; default: what the cores "
                        "can carry")  # fmt: skip
    parser.add_argument("--out", type=Path, help="file to add every batch to; those that it has "
                        "already are not run again")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, execute, compare; returns the exit status."""
    cluster = Cluster.preset(
        args.preset, num_nodes=args.nodes, devices_per_node=args.devices_per_node
    )
    names = chosen_strategies(args.strategies)
    result = read_result(args.out, args, cluster)
    done = {tuple(row[key] for key in KEYS) for row in result["rows"]}
    cases = []
    for batch in choose_batches(args.batches):
        for mask in args.masks:
            of_mask = list(make_cases(batch, mask, names, cluster, layers=args.layers))
            of_mask = [case for case in of_mask if fits_in_memory(*case)]
            if args.within:
                of_mask = worth_running(of_mask, within=args.within)
            cases += [case for case in of_mask if tuple(map(case[0].get, KEYS)) not in done]
    for rows in execute(cases, cluster, args):
        result["rows"] += rows
        result["summary"] = summarise(result["rows"])
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else as_text(result))
    return 0


def read_result(path: Path | None, args: argparse.Namespace, cluster: Cluster) -> dict[str, Any]:
    """What the file has already, if it is of the same cluster and layers; else a new result."""
    new: dict[str, Any] = json.loads(json.dumps({
        "conditions": conditions(), "cluster": asdict(cluster), "spec": asdict(SPEC),
        "layers": args.layers, "rounds": args.rounds, "within": args.within, "rows": [],
    }))  # fmt: skip
    if path is None or not path.exists():
        return new
    held: dict[str, Any] = json.loads(path.read_text())
    for name in ("cluster", "layers", "within"):
        if held[name] != new[name]:
            raise ValueError(f"{path} is of another {name} ({held[name]}): give another --out")
    return held


# --------------------------------------------------------------------------- execution


def execute(
    cases: Sequence[tuple[dict[str, str], Plan]],
    cluster: Cluster,
    args: argparse.Namespace,
    *,
    most_busy: float = MOST_BUSY,
    link_error: float = LINK_ERROR,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of all cases; plans that kept the cores too busy run again at a larger dilation."""
    plans = {made.fingerprint: made for _, made in cases}
    dilations = {each: args.dilation or wanted_dilation(made, cluster)
                 for each, made in plans.items()}  # fmt: skip
    tries = 0
    while plans:
        dilation = max(dilations[each] for each in plans)
        some = [made for each, made in plans.items() if dilations[each] == dilation]
        found = run_ranks(some, cluster, args, dilation=dilation, link_error=link_error)
        rows = rows_of(found, some, cluster, args, dilation=dilation, most_busy=most_busy)
        yield [labels | rows[m.fingerprint] for labels, m in cases if m.fingerprint in rows]
        plans = {each: made for each, made in plans.items() if each not in rows}
        left = [made.fingerprint for made in some if made.fingerprint not in rows]
        if left:
            problem, remedy, slower = problem_of(found, cluster, dilation)
            tries += slower == dilation
            if args.dilation or tries == MOST_TRIES:
                raise ValueError(f"at a dilation of {dilation:g}, {problem}: {remedy}")
            print(f"at a dilation of {dilation:g}, {problem}: {len(left)} plans again at "
                  f"{slower:g}", file=sys.stderr)  # fmt: skip
            dilations |= dict.fromkeys(left, slower)


def rows_of(
    found: Sequence[dict[str, Any]], plans: Sequence[Plan], cluster: Cluster,
    args: argparse.Namespace, *, dilation: float, most_busy: float,
) -> dict[int, dict[str, Any]]:  # fmt: skip
    """By fingerprint, what was found of each plan that left the cores idle enough."""
    if not found[0]["passes"]:  # the links were not what they should be
        return {}
    links = link_ratios([rank["links"] for rank in found], dilated(cluster, dilation))
    rows = {}
    for index, (made, busy) in enumerate(zip(plans, busy_shares(found), strict=True)):
        if busy <= most_busy:
            of = compare(made, found, index, dilation=dilation, layers=args.layers)
            share = own_share(made, dilation)
            rows[made.fingerprint] = of | {
                "dilation": dilation, "busy": busy, "links": links, "own_share": share,
            }  # fmt: skip
    return rows


def busy_shares(found: Sequence[dict[str, Any]]) -> list[float]:
    """Of the cores' time, by plan: the busiest rank's word."""
    each = [[np.median(busy) for busy in rank["busy"]] for rank in found]
    return [float(share) for share in np.max(each, axis=0)]


def problem_of(
    found: Sequence[dict[str, Any]], cluster: Cluster, dilation: float
) -> tuple[str, str, float]:
    """Why plans are to run again, what would help, and the dilation to try."""
    if not found[0]["passes"]:
        links = link_ratios([rank["links"] for rank in found], dilated(cluster, dilation))
        problem = f"the links give {_ratios(links)} times what they should"
        return problem, "end other work, or give another --dilation", dilation
    busy = max(busy_shares(found))
    slower = float(np.ceil(dilation * busy / CAREFUL / 100) * 100)
    return (f"the cores were busy for {busy:.0%}",
            f"end other work, give --dilation {slower:g}, or none", slower)  # fmt: skip


def _ratios(links: dict[str, float]) -> str:
    return ", ".join(f"{ratio:.2f} ({name})" for name, ratio in links.items())


def run_ranks(
    plans: Sequence[Plan], cluster: Cluster, args: argparse.Namespace, *, dilation: float,
    link_error: float, backward: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """What every rank found (:func:`lab.emulated_rank.run_plans`)."""
    slow = dilated(cluster, dilation)
    with (
        tempfile.TemporaryDirectory(prefix="dcp-emulate-") as folder,
        open_network(slow) as bed,
    ):
        for index, made in enumerate(plans):
            for rank in range(cluster.num_ranks):
                mine = made.rank_plan(rank).to_bytes()
                (Path(folder) / f"{index}-{rank}.plan").write_bytes(mine)
        job = {
            "spec": asdict(plans[0].spec), "cluster": asdict(slow), "backward": backward,
            "folder": folder, "num_plans": len(plans), "rounds": args.rounds,
            "shortest": int(np.argmin([predicted_seconds(made) for made in plans])),
            "layers": args.layers, "link_error": link_error,
        }  # fmt: skip
        return bed.run(
            "lab.emulated_rank:run_plans",
            job,
            ranks_per_node=int(cluster.node_sizes[0]),
            timeout_seconds=3600.0,
        )


def compare(
    made: Plan, found: Sequence[dict[str, Any]], index: int, *, dilation: float, layers: int
) -> dict[str, Any]:
    """Simulated and executed seconds of one plan; a pass ends with its last rank."""
    passes = np.max([rank["passes"][index] for rank in found], axis=0)  # [rounds, 2]
    forward, backward = (float(x) for x in np.median(passes, axis=0) / dilation)
    timeline = simulate(made, made.cluster)
    row = {
        "chosen": made.stats.strategy,
        "simulated_forward_seconds": timeline.forward_seconds,
        "simulated_backward_seconds": timeline.backward_seconds,
        "executed_forward_seconds": forward,
        "executed_backward_seconds": backward,
        "inter_node_bytes": made.stats.inter_node_bytes,
        "intra_node_bytes": made.stats.intra_node_bytes,
        "num_divisions": made.stats.num_divisions,
    }
    if layers:
        ends = np.max([rank["layers"][index] for rank in found], axis=0)
        row["simulated_layer_seconds"] = layer_seconds(made)
        row["executed_layer_seconds"] = float(np.median(ends)) / dilation / layers
    return row


# --------------------------------------------------------------------------- what came out


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Executed ÷ simulated, ``auto`` against the others, and pairs in the simulated order."""
    ratios = [
        row[f"executed_{name}_seconds"] / row[f"simulated_{name}_seconds"]
        for row in long_enough(rows)
        for name in ("forward", "backward")
    ]
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["batch"], row["mask"]), {})[row["strategy"]] = row
    gains: dict[str, list[float]] = {"static, causal": [], "static, sparse": [], "any": []}
    same = pairs = 0
    for (_, mask), by_name in cases.items():
        for one, other in combinations(by_name.values(), 2):
            before, after = (both_passes(one, way) / both_passes(other, way) for way in WAYS)
            if abs(np.log(before)) > np.log(1.05):
                pairs, same = pairs + 1, same + ((before > 1) == (after > 1))
        ours = by_name.get(OURS)
        if ours is None:
            continue
        own = both_passes(ours, "executed")
        static = [
            both_passes(row, "executed") / own for name, row in by_name.items() if name in STATIC
        ]
        others = [
            both_passes(row, "executed") / own for name, row in by_name.items() if name != OURS
        ]
        if static:
            gains["static, causal" if mask == "causal" else "static, sparse"].append(min(static))
        if others:
            gains["any"].append(min(others))
    return {
        "executed_over_simulated": {
            "median": median(ratios), "least": min(ratios), "most": max(ratios),
        },
        "best_other_over_auto": {
            name: {"median": median(seen), "least": min(seen)}
            for name, seen in gains.items()
            if seen
        },
        "pairs_in_order": same / pairs if pairs else None,
        "num_pairs": pairs,
    }  # fmt: skip


WAYS = ("simulated", "executed")


def long_enough(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which executed over simulated says something: see :func:`own_share`."""
    return [row for row in rows if row.get("own_share", 0.0) <= MOST_OWN_SHARE]


def both_passes(row: dict[str, Any], way: str) -> float:
    """Seconds of forward and backward together, ``simulated`` or ``executed``."""
    return float(row[f"{way}_forward_seconds"] + row[f"{way}_backward_seconds"])


def as_text(result: dict[str, Any]) -> str:
    """The table that is printed."""
    lines = [
        f"{'batch':17} {'mask':16} {'strategy':16} {'forward ms':>10} {'simulated':>9} "
        f"{'backward ms':>11} {'simulated':>9} {'ratio':>6} {'busy':>5}"
    ]
    for row in result["rows"]:
        ratio = both_passes(row, "executed") / both_passes(row, "simulated")
        numbers = [row[f"{way}_{name}_seconds"] * 1e3 for name in ("forward", "backward")
                   for way in reversed(WAYS)]  # fmt: skip
        lines.append(
            f"{row['batch']:17} {row['mask']:16} {row['strategy']:16} {numbers[0]:10.2f} "
            f"{numbers[1]:9.2f} {numbers[2]:11.2f} {numbers[3]:9.2f} {ratio:6.2f} "
            f"{row['busy']:5.0%}"
        )
    found = result["summary"]
    ratio = found["executed_over_simulated"]
    lines += ["", f"executed ÷ simulated: {ratio['median']:.2f} in the median, "
              f"{ratio['least']:.2f} to {ratio['most']:.2f}"]  # fmt: skip
    for name, gain in found["best_other_over_auto"].items():
        lines.append(f"best of {name} ÷ auto, executed: {gain['median']:.2f} in the median, "
                     f"{gain['least']:.2f} at least")  # fmt: skip
    if found["num_pairs"]:
        lines.append(f"in the simulated order: {found['pairs_in_order']:.0%} of "
                     f"{found['num_pairs']} pairs that differ by more than 5%")  # fmt: skip
    return "\n".join(lines)
