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
# milliseconds, causal: data set -> (forward, backward) -> system -> scales .5, 1, 2, 4
PUBLISHED = {
    "ldc": (
        {
            "Ring": (28.3, 52.5, 26.9, 26.8),
            "ZigZag": (37.2, 32.0, 29.5, 28.8),
            "LT": (19.4, 14.8, 13.1, 10.4),
            "TE": (24.4, 15.5, 14.5, 11.7),
            "DCP": (8.03, 7.00, 8.47, 8.91),
        },
        {
            "Ring": (80.8, 78.6, 77.0, 75.1),
            "ZigZag": (81.3, 79.9, 76.4, 76.2),
            "LT": (44.2, 35.6, 33.8, 27.1),
            "TE": (33.9, 26.8, 25.0, 23.1),
            "DCP": (16.0, 13.7, 15.6, 18.2),
        },
    ),
    "longalign": (
        {
            "Ring": (27.4, 26.9, 27.1, 26.7),
            "ZigZag": (30.0, 28.8, 28.0, 27.1),
            "LT": (11.8, 10.1, 9.60, 9.21),
            "TE": (13.9, 12.6, 11.6, 11.8),
            "DCP": (7.91, 9.38, 10.96, 13.27),
        },
        {
            "Ring": (77.8, 75.1, 74.8, 73.3),
            "ZigZag": (79.2, 75.7, 75.9, 73.6),
            "LT": (30.6, 27.0, 24.2, 22.9),
            "TE": (25.3, 23.2, 22.7, 23.1),
            "DCP": (15.5, 19.1, 20.4, 27.7),
        },
    ),
}
# TE ÷ DCP, forward + backward, sparse masks (causal blockwise, streaming, shared question)
PUBLISHED_SPARSE = {
    "ldc": {
        "causal_blockwise": (3.85, 3.57, 3.28, 2.92),
        "streaming": (3.29, 1.49, 3.07, 3.86),
        "shared_question": (3.39, 3.08, 2.48, 2.30),
    },
    "longalign": {
        "causal_blockwise": (3.30, 2.92, 2.70, 2.25),
        "streaming": (3.43, 3.55, 3.72, 3.64),
        "shared_question": (2.70, 2.21, 1.87, 1.58),
    },
}


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
    """Markdown tables, as docs/simulator.md shows them."""
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
