"""``python -m lab published``: the simulator beside the published attention microbenchmark.

The SOSP'25 artifact reports milliseconds of one attention operator on 4 nodes x 8 A100 (8 query
heads, 2 KV heads, head_dim 128, bf16, 131,072 tokens a batch) for five systems over four length
scales. Here the same systems are simulated on the same cluster preset, with lengths drawn from two
long-tailed distributions of the same shape (the originals' batches are not published).
"""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path
from statistics import geometric_mean, mean, median
from typing import Any

import numpy as np

from dcp.batch import SequenceBatch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.placement import StrategyError
from dcp.planner import plan
from lab.planner import MASKS, SPEC, load, make_batch

CLUSTER = Cluster.preset("a100", num_nodes=4, devices_per_node=8)
SCALES = (0.5, 1, 2, 4)
STATIC = ("ring", "zigzag", "allgather", "ulysses", "usp", "double_ring", "a2a_p2p")
SYSTEMS = {  # the published name, the strategy that stands for it
    "Ring": "ring",
    "ZigZag": "zigzag",
    "LT": "double_ring",
    "TE": "a2a_p2p",
    "DCP": "auto",
}
_READ_OFF = load("published.json")
# milliseconds, causal: data set -> (forward, backward) -> system -> scales .5, 1, 2, 4
PUBLISHED = {
    data: (each["forward"], each["backward"]) for data, each in _READ_OFF["causal_ms"].items()
}
# TE ÷ DCP, forward + backward, under sparse masks: data set -> mask -> scales .5, 1, 2, 4
PUBLISHED_SPARSE = _READ_OFF["sparse_ratio"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=4, help="batches a cell is a mean of")
    parser.add_argument("--out", type=Path, help="folder for published.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Simulate every cell of the published tables. Returns the exit status."""
    causal = [causal_cell(data, scale, args.batches) for data in PUBLISHED for scale in SCALES]
    sparse = [
        sparse_cell(data, mask, scale, args.batches)
        for data, masks in PUBLISHED_SPARSE.items()
        for mask in masks
        for scale in SCALES
    ]
    static = [static_cell(entry, mask) for entry in long_tailed_batches() for mask in MASKS]
    result = {"conditions": conditions(), "causal": causal, "sparse": sparse, "static": static}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "published.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else as_text(causal, sparse, static))
    return 0


def draw_lengths(data: str, scale: float, rng: np.random.Generator) -> list[int]:
    """A batch of about 131,072 tokens: reference lengths of one data set, scaled and resampled."""
    batches = load("planner_batches.json")
    known = [n for batch in batches if batch["name"].startswith(data) for n in batch["seqlens"]]
    lengths: list[int] = []
    while True:
        length = min(int(rng.choice(known) * scale), 131072)
        if sum(lengths) + length > 131072:
            if sum(lengths) >= 0.75 * 131072:  # the artifact's rule for a full batch
                return lengths
            continue
        if length:
            lengths.append(length)


def causal_cell(data: str, scale: float, count: int) -> dict[str, Any]:
    """Mean simulated and published milliseconds of every system at one length scale."""
    times = {name: simulate_system(data, "causal", scale, name, count) for name in SYSTEMS}
    forward, backward = PUBLISHED[data]
    at = SCALES.index(scale)
    published = {name: (forward[name][at], backward[name][at]) for name in SYSTEMS}
    return {"data": data, "scale": scale, "simulated_ms": times, "published_ms": published}


def sparse_cell(data: str, mask: str, scale: float, count: int) -> dict[str, Any]:
    """TE ÷ DCP, forward + backward, simulated and published."""
    te, ours = (sum(simulate_system(data, mask, scale, name, count)) for name in ("TE", "DCP"))
    published = PUBLISHED_SPARSE[data][mask][SCALES.index(scale)]
    return {
        "data": data,
        "mask": mask,
        "scale": scale,
        "simulated_ratio": te / ours,
        "published_ratio": published,
    }


def simulate_system(
    data: str, mask: str, scale: float, system: str, count: int
) -> tuple[float, float]:
    """Mean forward and backward milliseconds over ``count`` batches."""
    rng = np.random.default_rng(0)
    stats = [
        plan(
            SequenceBatch(draw_lengths(data, scale, rng), mask),
            SPEC,
            CLUSTER,
            strategy=SYSTEMS[system],
        ).stats.simulated
        for _ in range(count)
    ]
    return (
        mean(s["forward_seconds"] for s in stats) * 1e3,
        mean(s["backward_seconds"] for s in stats) * 1e3,
    )


def long_tailed_batches() -> list[dict[str, Any]]:
    """The reference batches that have a long tail: neither one document nor many equal ones."""
    return [b for b in load("planner_batches.json") if b["name"].startswith(("ldc", "longalign"))]


def static_cell(entry: dict[str, Any], mask: str) -> dict[str, Any]:
    """Milliseconds of ``auto`` and of every static rule, forward + backward."""
    batch = make_batch(entry["seqlens"], mask)

    def milliseconds(strategy: str) -> float:
        stats = plan(batch, SPEC, CLUSTER, strategy=strategy).stats
        return (stats.simulated["forward_seconds"] + stats.simulated["backward_seconds"]) * 1e3

    times = {}
    for name in STATIC:
        with suppress(StrategyError):  # this one cannot serve the case
            times[name] = milliseconds(name)
    auto = milliseconds("auto")
    return {
        "batch": entry["name"],
        "mask": mask,
        "auto_ms": auto,
        "static_ms": times,
        "speedup": min(times.values()) / auto,
    }


def same_order(cell: dict[str, Any]) -> float:
    """Share of pairs of systems that simulation and publication put in the same order."""
    names = list(SYSTEMS)
    total = {
        kind: {name: sum(cell[f"{kind}_ms"][name]) for name in names}
        for kind in ("simulated", "published")
    }
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    agree = [
        (total["simulated"][a] < total["simulated"][b])
        == (total["published"][a] < total["published"][b])
        for a, b in pairs
    ]
    return sum(agree) / len(agree)


def as_text(
    causal: list[dict[str, Any]], sparse: list[dict[str, Any]], static: list[dict[str, Any]]
) -> str:
    """Markdown tables of every cell."""
    names = list(SYSTEMS)
    lines = ["| data, scale | " + " | ".join(names) + " | pairs in order |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for cell in causal:
        shown = [
            f"{sum(cell['simulated_ms'][n]):.1f} / {sum(cell['published_ms'][n]):.1f}"
            for n in names
        ]
        order = f"{same_order(cell):.0%}"
        lines.append(f"| {cell['data']} ×{cell['scale']} | " + " | ".join(shown) + f" | {order} |")
    lines += ["", "| TE ÷ DCP | " + " | ".join(f"×{s}" for s in SCALES) + " |", "|---" * 5 + "|"]
    for data, masks in PUBLISHED_SPARSE.items():
        for mask in masks:
            row = [c for c in sparse if (c["data"], c["mask"]) == (data, mask)]
            shown = [f"{c['simulated_ratio']:.2f} / {c['published_ratio']:.2f}" for c in row]
            lines.append(f"| {data}, {mask} | " + " | ".join(shown) + " |")
    overall = geometric_mean(c["simulated_ratio"] / c["published_ratio"] for c in sparse)
    lines += ["", f"Geometric mean of simulated ÷ published ratio, sparse masks: {overall:.2f}"]
    lines += ["", "| best static ÷ auto | " + " | ".join(MASKS) + " |", "|---" * 5 + "|"]
    for name in dict.fromkeys(cell["batch"] for cell in static):
        shown = [f"{cell['speedup']:.2f}" for cell in static if cell["batch"] == name]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    for what, mine in (("causal", True), ("sparse", False)):
        speedups = [cell["speedup"] for cell in static if (cell["mask"] == "causal") == mine]
        lines += ["", f"{what}: {median(speedups):.2f} in the median, {min(speedups):.2f} at least"]
    return "\n".join(lines)
