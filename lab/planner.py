"""``python -m lab planner``: plans of the reference batches beside the recorded SOSP'25 planner.

The recorded figures (``data/recorded_planner.json``) are one run of that planner with two
partitioners on the same batches; see ``docs/planner.md`` for the conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from importlib.resources import files
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.cost import attention_seconds, bound_seconds, linear_seconds
from dcp.layer import linear_share
from dcp.masks import named_mask
from dcp.planner import plan
from dcp.plans import Plan

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16")
MASKS = ("causal", "streaming", "shared_question", "causal_blockwise")
RECORDED_NAMES = {"streaming": "lambda"}
SCALE_CASES = (  # name, seqlens, nodes, devices per node, limit in seconds
    ("1 M tokens, 256 devices", "long-tailed 1048576", 32, 8, 3.0),
    ("131 k tokens, 1,024 devices", "long-tailed 131072", 128, 8, 3.0),
    ("one document of 4 M tokens, 256 devices", "single 4194304", 32, 8, 10.0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strategy", default="auto", help="strategy to plan with")
    parser.add_argument("--repeat", type=int, default=3, help="timed runs per case; median kept")
    parser.add_argument("--no-scale", action="store_true", help="leave out the large cases")
    parser.add_argument("--out", type=Path, help="folder for planner.json and planner.png")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Returns the exit status."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, as the table says
    warm_up(args.strategy)
    rows = [
        measure(batch, mask, strategy=args.strategy, repeat=args.repeat)
        for batch in load("planner_batches.json")
        for mask in MASKS
    ]
    result: dict[str, Any] = {"conditions": conditions(), "rows": rows, "summary": summarise(rows)}
    if not args.no_scale:
        result["scale"] = [measure_scale(*case) for case in SCALE_CASES]
        result["growth"] = measure_growth()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "planner.json").write_text(json.dumps(result, indent=1) + "\n")
        if "growth" in result:
            _plot_growth(result["growth"], args.out / "planner.png")
    print(json.dumps(result) if args.json else _as_text(result))
    return 0


def load(name: str) -> Any:
    """Reference data of the folder ``lab/data``, from JSON."""
    return json.loads(files("lab").joinpath("data", name).read_text())


def warm_up(strategy: str) -> None:
    """Compile what is compiled on first use, so that planning time holds planning alone."""
    for mask in MASKS:
        plan(SequenceBatch([9000, 3000, 70], mask), SPEC, _cluster(2, 2), strategy=strategy)


# --------------------------------------------------------------------------- one case


def measure(batch: dict[str, Any], mask: str, *, strategy: str, repeat: int) -> dict[str, Any]:
    """Plan one batch ``repeat`` times; figures beside the recorded ones where there are any."""
    cluster = _cluster(batch["nodes"], batch["devices_per_node"])
    times = []
    for _ in range(repeat):
        sequences = make_batch(batch["seqlens"], mask)
        made = plan(sequences, SPEC, cluster, strategy=strategy)
        times.append(made.stats.planning_seconds)
    stats = made.stats
    row = {
        "batch": batch["name"],
        "mask": mask,
        "chosen": stats.strategy,
        "planning_seconds": median(times),
        "compute_balance": stats.compute_balance,
        "token_balance": stats.token_balance,
        "inter_node_bytes": stats.inter_node_bytes,
        "total_bytes": stats.inter_node_bytes + stats.intra_node_bytes,
        "max_rank_recv_bytes": stats.max_rank_recv_bytes,
        "num_divisions": stats.num_divisions,
        "num_compute_blocks": stats.num_compute_blocks,
        "simulated": stats.simulated,
    }
    bounds = _bounds(
        sequences, stats.compute_balance, stats.token_balance, stats.inter_node_bytes,
        stats.max_rank_recv_bytes, cluster,
    )  # fmt: skip
    row["bound_seconds"], row["layer_bound_seconds"] = bounds
    return row | _against_recorded(row, sequences, cluster)


def _bounds(
    batch: SequenceBatch,
    compute_balance: float,
    token_balance: float,
    inter_node_bytes: float,
    max_rank_recv_bytes: float,
    cluster: Cluster,
) -> tuple[float, float]:
    """Seconds of a forward pass of attention with nothing overlapped, and of a layer: with the
    linear layers of the rank that has most to do, if each rank is uneven in one of both only."""
    area, tokens = batch.area() / cluster.num_ranks, batch.num_tokens / cluster.num_ranks
    bound = bound_seconds(
        max_rank_area=area * compute_balance,
        inter_node_bytes=inter_node_bytes,
        max_rank_recv_bytes=max_rank_recv_bytes,
        spec=SPEC,
        cluster=cluster,
    )
    linear = linear_seconds(tokens, SPEC, cluster) * linear_share(backward=False)
    uneven = (token_balance - 1) * linear
    less = (compute_balance - 1) * attention_seconds(area, SPEC, cluster)
    return bound, float(bound + linear + max(uneven - less, 0.0))


def make_batch(seqlens: list[int], mask: str) -> SequenceBatch:
    """A batch under one benchmark mask, its masks made anew (that time counts as planning)."""
    return SequenceBatch(seqlens, [named_mask(mask, seqlen) for seqlen in seqlens])


def _against_recorded(
    row: dict[str, Any], batch: SequenceBatch, cluster: Cluster
) -> dict[str, Any]:
    """Ours ÷ recorded; empty where the case was not recorded."""
    name = RECORDED_NAMES.get(row["mask"], row["mask"])
    recorded = [
        r for r in load("recorded_planner.json") if r["batch"] == row["batch"] and r["mask"] == name
    ]
    if not recorded:
        return {}
    bounds, layers = zip(
        *(
            _bounds(
                batch, r["imb"], r["tok_imb"], (r["in_inter_MB"] + r["out_inter_MB"]) * 1e6,
                r["max_recv_MB"] * 1e6, cluster,
            )
            for r in recorded
        ),
        strict=True,
    )  # fmt: skip
    [kahypar] = [r for r in recorded if r["solver"] == "kahypar" and r["block"] == 2048]
    received = row["max_rank_recv_bytes"]
    parts = ("in_inter_MB", "in_intra_MB", "out_inter_MB", "out_intra_MB")
    return {
        "recorded_bound_seconds": min(bounds),
        "recorded_planning_seconds": min(r["gen_s"] + r["compile_s"] for r in recorded),
        "bound_ratio": row["bound_seconds"] / min(bounds),
        "layer_bound_ratio": row["layer_bound_seconds"] / min(layers),
        "bytes_ratio": _ratio(row["total_bytes"], sum(kahypar[part] for part in parts) * 1e6),
        "recv_ratio": _ratio(received, min(r["max_recv_MB"] for r in recorded) * 1e6),
    }


def _ratio(ours: float, theirs: float) -> float:
    """Ours ÷ theirs; nothing against nothing is 1."""
    return ours / theirs if theirs else (1.0 if ours == 0 else float("inf"))


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of targets: what must hold, what is aimed at, what was measured."""
    recorded = [row for row in rows if "bound_ratio" in row]

    def line(name: str, value: float, must: float, aim: float) -> dict[str, Any]:
        return {"figure": name, "value": value, "must": must, "aim": aim, "met": value <= must}

    def most(key: str) -> float:
        return max(row[key] for row in rows)

    def middle(key: str, of: list[dict[str, Any]]) -> float:
        return median(row[key] for row in of)

    return [
        line("planning seconds, worst", most("planning_seconds"), 1.0, 0.5),
        line("planning seconds, median", middle("planning_seconds", rows), 0.5, 0.25),
        line("token balance, worst", most("token_balance"), 1.25, 1.10),
        line("bound ÷ recorded, worst", max(r["bound_ratio"] for r in recorded), 1.0, 1.0),
        line("bound ÷ recorded, median", middle("bound_ratio", recorded), 0.7, 0.5),
        line("layer ÷ recorded, worst", max(r["layer_bound_ratio"] for r in recorded), 0.8, 0.8),
        line("layer ÷ recorded, median", middle("layer_bound_ratio", recorded), 0.8, 0.8),
    ]


# --------------------------------------------------------------------------- scale


def long_tailed(num_tokens: int, seed: int = 0) -> list[int]:
    """Lognormal document lengths (median 4 k, sigma 1.4, at most 128 k) that sum to num_tokens."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := num_tokens - sum(lengths)) > 0:
        lengths.append(min(int(rng.lognormal(np.log(4096), 1.4)) + 1, 131072, left))
    return lengths


def measure_scale(name: str, source: str, nodes: int, devices: int, limit: float) -> dict[str, Any]:
    """One large case: seconds, peak memory of this process, program bytes per rank."""
    kind, tokens = source.split()
    seqlens = [int(tokens)] if kind == "single" else long_tailed(int(tokens))
    started = perf_counter()
    made = plan(make_batch(seqlens, "causal"), SPEC, _cluster(nodes, devices))
    seconds = perf_counter() - started
    return {
        "case": name,
        "planning_seconds": seconds,
        "limit_seconds": limit,
        "met": seconds <= limit,
        "compute_balance": made.stats.compute_balance,
        "token_balance": made.stats.token_balance,
        "num_compute_blocks": made.stats.num_compute_blocks,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "max_program_bytes": _program_bytes(made),
    }


def _program_bytes(made: Plan) -> int:
    ranks = range(0, made.num_ranks, max(1, made.num_ranks // 32))
    return max(len(made.rank_plan(rank).to_bytes()) for rank in ranks)


def measure_growth() -> list[dict[str, Any]]:
    """Planning time over tokens (32 devices) and over devices (131,072 tokens)."""
    cases = [(tokens, 32) for tokens in (2**14, 2**15, 2**16, 2**17, 2**18, 2**19, 2**20)]
    cases += [(2**17, devices) for devices in (8, 16, 64, 128, 256, 512, 1024)]
    points = []
    for tokens, devices in cases:
        cluster = _cluster(max(devices // 8, 1), min(devices, 8))
        seconds = [
            plan(make_batch(long_tailed(tokens), "causal"), SPEC, cluster).stats.planning_seconds
            for _ in range(3)
        ]
        points.append({"tokens": tokens, "devices": devices, "planning_seconds": median(seconds)})
    return points


def _cluster(nodes: int, devices: int) -> Cluster:
    return Cluster(num_nodes=nodes, devices_per_node=devices)


# --------------------------------------------------------------------------- output


def _as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{'batch':17} {'mask':16} {'chosen':11} {'plan s':>7} {'compute':>8} {'tokens':>7} "
        f"{'inter MB':>9} {'total MB':>9} {'busiest MB':>10} "
        f"{'bound÷':>7} {'bytes÷':>7} {'recv÷':>6}"
    ]
    for r in result["rows"]:
        ratios = [r.get(key) for key in ("bound_ratio", "bytes_ratio", "recv_ratio")]
        shown = [f"{x:.2f}" if x is not None else "-" for x in ratios]
        lines.append(
            f"{r['batch']:17} {r['mask']:16} {r['chosen']:11} {r['planning_seconds']:7.3f} "
            f"{r['compute_balance']:8.3f} {r['token_balance']:7.3f} "
            f"{r['inter_node_bytes'] / 1e6:9.1f} {r['total_bytes'] / 1e6:9.1f} "
            f"{r['max_rank_recv_bytes'] / 1e6:10.1f} {shown[0]:>7} {shown[1]:>7} {shown[2]:>6}"
        )
    lines += ["", f"{'figure':38} {'measured':>9} {'must':>6} {'aim':>6}"]
    lines += [
        f"{s['figure']:38} {s['value']:9.3f} {s['must']:6.2f} {s['aim']:6.2f}"
        f"  {'met' if s['met'] else 'NOT MET'}"
        for s in result["summary"]
    ]
    for s in result.get("scale", []):
        lines.append(
            f"{s['case']:40} {s['planning_seconds']:6.2f} s of {s['limit_seconds']:.0f}, "
            f"balance {s['compute_balance']:.3f} / {s['token_balance']:.3f}, "
            f"{s['max_program_bytes'] / 1e3:.0f} kB a rank, "
            f"{s['peak_memory_bytes'] / 1e9:.2f} GB peak"
        )
    where = result["conditions"]
    lines.append(f"one core of {where['processor']}, {where['date']}")
    return "\n".join(lines)


def _plot_growth(points: list[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install 'dynamic-context-parallel[plots]'")
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = zip(
        figure.subplots(1, 2),
        (("tokens", "devices", 32), ("devices", "tokens", 2**17)),
        strict=True,
    )
    for axes, (along, fixed, value) in panels:
        chosen = sorted((p[along], p["planning_seconds"]) for p in points if p[fixed] == value)
        axes.loglog(*zip(*chosen, strict=True), "o-", color="#2b6cb0")
        axes.set(xlabel=along, ylabel="planning seconds (one core)", title=f"{value:,} {fixed}")
        axes.set_ylim(0.03, 5)
        axes.grid(True, which="both", alpha=0.25)
    figure.savefig(path, dpi=150)
