"""``python -m lab learn``: ``auto`` whose rates begin wrong, and what it makes of what it measures.

On an emulated cluster (:mod:`lab.emulate`) or on real ranks between shaped links, batch after
batch runs by ``auto``, with a cluster file whose rates are wrong by a factor, or with one rank
slower than it says. Then some more batches run beside every rule, which knows the true rates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.kernel_table import scaled_table
from dcp.placement import strategy_names
from lab.emulated_network import dilated, open_network
from lab.emulated_rank import link_ratios
from lab.fleet import measured_cluster, run_plans
from lab.results import merge
from lab.testbed import Testbed, open_testbed

EMULATED = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16")
REAL = AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=64, dtype="float32")
SEARCHED = ("bisection", "hypergraph")  # what auto chooses from beside simple rules
TARGETS = {"rates": 1.03, "straggler": 1.12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--real", action="store_true", help="two nodes of one rank each at --mbits")
    parser.add_argument("--mbits", type=float, default=200, help="default: %(default)s")
    parser.add_argument("--nodes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--devices-per-node", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--wrong", type=float, default=1.0, help="factor of the rates given")
    parser.add_argument("--what", nargs="+", default=["compute", "network"], choices=WRONG,
                        help="which of them (default: %(default)s)")  # fmt: skip
    parser.add_argument("--slowness", type=float, default=1.0,
                        help="of one rank's device (default: %(default)s)")  # fmt: skip
    parser.add_argument("--fixed", action="store_true", help="learn nothing")
    parser.add_argument("--tokens", type=int, help="of a batch")
    parser.add_argument("--batches", type=int, default=30, help="to learn from")
    parser.add_argument("--compared", type=int, default=4, help="batches after that")
    parser.add_argument("--rounds", type=int, default=1, help="of comparing")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--dilation", type=float, default=1500, help="default: %(default)s")
    parser.add_argument("--mask", default="causal", help="default: %(default)s")
    parser.add_argument("--rules", nargs="+", metavar="NAME", help="default: all by name")
    parser.add_argument("--out", type=Path, help="folder of learn.json, to add this run to")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


WRONG = {
    "compute": ("device_flops",),
    "network": ("inter_node_bandwidth", "device_network_bandwidth"),
    "device": ("intra_node_bandwidth",),
}


def run(args: argparse.Namespace) -> int:
    """Learn, compare, print, write. Returns the exit status."""
    if args.real:
        with open_testbed(2, bandwidth=args.mbits * 1e6 / 8) as bed:
            like = Cluster.preset("laptop", num_nodes=2, devices_per_node=1)
            like = replace(like, inter_node_bandwidth=args.mbits * 1e6 / 8)
            true = measured_cluster(
                run_plans(bed, [], REAL, ranks_per_node=1, rates=True), like, name="measured"
            )
            found = _run(bed, true, args, REAL, tokens=args.tokens or 6144)
    else:
        true = Cluster.preset("a100", num_nodes=args.nodes, devices_per_node=args.devices_per_node)
        true = dilated(true, args.dilation)
        with open_network(true) as bed:
            found = _run(bed, true, args, EMULATED, tokens=args.tokens or 1024 * true.num_ranks)
    result = {"conditions": conditions()} | summarise(found, true, args)
    if args.out:
        merge(args.out / "learn.json", _name(args), result)
    print(json.dumps(result) if args.json else as_text(_name(args), result))
    return 0


def _run(
    bed: Testbed, true: Cluster, args: argparse.Namespace, spec: AttentionSpec, *, tokens: int
) -> list[dict[str, Any]]:
    slowness = [1.0] * true.num_ranks
    slowness[-1] = args.slowness
    names = args.rules or [name for name in strategy_names() if name not in SEARCHED]
    job = {
        "spec": asdict(spec), "true": asdict(true), "given": asdict(wrong(true, args)),
        "sleeps": not args.real, "slowness": slowness, "lengths": lengths(tokens, args),
        "mask": args.mask, "tokens_per_batch": tokens, "learns": not args.fixed,
        "model_width": 0 if args.real else None, "num_batches": args.batches,
        "num_compared": args.compared, "rules": names, "rounds": args.rounds,
        "warm_up": int(args.real), "layers": args.layers,
    }  # fmt: skip
    per_node = int(true.node_sizes[0])
    return bed.run("lab.learn_rank:learn", job, ranks_per_node=per_node, timeout_seconds=3600.0)


def wrong(true: Cluster, args: argparse.Namespace) -> Cluster:
    """The cluster that the loader is given."""
    fields = {name: getattr(true, name) * args.wrong for what in args.what for name in WRONG[what]}
    if "compute" in args.what and true.kernel_rates:
        rates = [(side, rate * args.wrong) for side, rate in true.kernel_rates]
        fields["kernel_rates"] = tuple(rates)
    if "compute" in args.what:
        slower = 1 / args.wrong
        fields["kernel_table"] = scaled_table(true.kernel_table, forward=slower, backward=slower)
    return replace(true, name="given", **fields)


def lengths(tokens: int, args: argparse.Namespace) -> list[int]:
    """Documents of long-tailed lengths, enough for all batches and to spare."""
    rng = np.random.default_rng(0)
    wanted = tokens * (args.batches + args.compared + 8)
    drawn = rng.lognormal(np.log(tokens / 24), 1.2, size=4096)
    drawn = np.clip(drawn, 16, tokens * 0.7).astype(int)
    count = int(np.searchsorted(np.cumsum(drawn), wanted)) + 1
    found: list[int] = drawn[:count].tolist()
    return found


# --------------------------------------------------------------------------- what came out


def summarise(
    found: Sequence[dict[str, Any]], true: Cluster, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a layer by rule, of the cluster's own; a layer ends with its last rank."""
    dilation = 1.0 if args.real else args.dilation
    steps = np.max([rank["steps"] for rank in found], axis=0) / dilation
    rules: dict[str, list[float]] = {}
    for index in range(args.compared):
        for name in found[0]["compared"][index]:
            rounds = np.max([rank["compared"][index][name] for rank in found], axis=0)
            rules.setdefault(name, []).append(median(rounds.tolist()) / dilation)
    whole = {name: mean(of) for name, of in rules.items() if len(of) == args.compared}
    others = {name: seconds for name, seconds in whole.items() if name != "auto"}
    best = min(others, key=others.__getitem__)
    learnt = found[0]["cluster"]
    return {
        "true": asdict(true),
        "given": asdict(wrong(true, args)),
        "learnt": learnt,
        "links": {} if args.real else link_ratios([rank["links"] for rank in found], true),
        "error": found[0]["error"],
        "steps": steps.tolist(),
        "predicted": found[0]["predicted"],
        "seconds": rules,
        "best_rule": best,
        "auto_over_best_rule": whole["auto"] / others[best],
        "auto_over_best_of_each": whole["auto"]
        / mean(map(min, zip(*(rules[n] for n in others), strict=True))),
    }


def _name(args: argparse.Namespace) -> str:
    where = (
        f"real 2 x 1, {args.mbits:g} Mbit/s"
        if args.real
        else (f"emulated {args.nodes} x {args.devices_per_node}")
    )
    what = f"{' and '.join(args.what)} x {args.wrong:g}" if args.wrong != 1 else "right rates"
    slow = f", a rank {args.slowness:g}x slower" if args.slowness != 1 else ""
    return f"{where}, {what}{slow}{', fixed' * args.fixed}"


def as_text(name: str, result: dict[str, Any]) -> str:
    """What is printed."""
    lines = [name]
    if result["learnt"]:
        for field in ("device_flops", "backward_ratio", "launch_seconds", "linear_flops",
                      "inter_node_bandwidth", "intra_node_bandwidth", "inter_node_latency",
                      "intra_node_latency", "pack_bandwidth"):  # fmt: skip
            true, given, learnt = (result[which][field] for which in ("true", "given", "learnt"))
            lines.append(
                f"{field:24} {true!s:>12.12} given {given!s:>12.12} learnt {learnt!s:>12.12}"
            )
        lines.append(f"rank_speeds {[round(x, 2) for x in result['learnt']['rank_speeds']]}")
    lines.append(f"links, of what they should give: {result['links']}")
    lines.append("steps ms " + " ".join(f"{x * 1e3:.1f}" for x in result["steps"]))
    for rule, seconds in sorted(result["seconds"].items(), key=lambda each: mean(each[1])):
        lines.append(f"{rule:18} {mean(seconds) * 1e3:8.2f} ms a layer")
    lines.append(f"auto ÷ best rule ({result['best_rule']}): {result['auto_over_best_rule']:.3f}; "
                 f"÷ the best of each batch: {result['auto_over_best_of_each']:.3f}")  # fmt: skip
    return "\n".join(lines)
