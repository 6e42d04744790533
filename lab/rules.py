"""``python -m lab rules``: ``auto`` beside every rule by name, on random batches.

Lengths, masks, clusters and models are drawn; every rule is planned by name, the searching ones
too, and ``auto`` with a budget that leaves none of them out. All times are simulated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.placement import StrategyError, strategies
from dcp.planner import Planner
from lab.limit import MODELS, PRESETS
from lab.planner import MASKS, make_batch
from lab.results import merge

CLUSTERS = ((1, 3), (1, 8), (2, 2), (2, 4), (3, 1), (4, 8))  # nodes, devices of each
WITHIN = 1 + 1e-9  # of each other are equal plans


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, default=200, help="random batches")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--time-budget", type=float, default=4.0, help="of auto, in seconds")
    parser.add_argument("--out", type=Path, help="folder for rules.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, print, write. Returns the exit status: 1 where a rule was faster than ``auto``."""
    rows = [measure(*case, args.time_budget) for case in draw(args.batches, args.seed)]
    result: dict[str, Any] = {
        "conditions": conditions(),
        "rows": rows,
        "summary": summarise(rows),
    }
    if args.out:
        merge(args.out / "rules.json", "random", result)
    print(json.dumps(result) if args.json else as_text(result))
    return int(result["summary"]["auto_slower"] > 0)


def draw(count: int, seed: int) -> Iterator[tuple[list[int], str, Cluster, str]]:
    """Lengths, a mask, a cluster and a model's name, ``count`` times."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        middle, spread = rng.uniform(np.log(200), np.log(20_000)), rng.uniform(0.2, 1.8)
        drawn = rng.lognormal(middle, spread, rng.integers(1, 24))
        nodes, devices = CLUSTERS[rng.integers(len(CLUSTERS))]
        kinds: tuple[tuple[str, ...], ...] = (PRESETS, MASKS, tuple(MODELS))
        preset, mask, model = (names[rng.integers(len(names))] for names in kinds)
        cluster = Cluster.preset(preset, num_nodes=nodes, devices_per_node=devices)
        lengths = np.clip(drawn.astype(int), 1, 131_072).tolist()
        yield lengths, mask, cluster, model


def measure(
    seqlens: list[int], mask: str, cluster: Cluster, model: str, time_budget: float
) -> dict[str, Any]:
    """Seconds of a layer by ``auto`` and by every rule that can serve the batch."""
    spec, width = MODELS[model]
    batch = make_batch(seqlens, mask)
    seconds = {}
    for name in ("auto", *(strategy.name for strategy in strategies())):
        planner = Planner(spec, cluster, strategy=name, model_width=width, time_budget=time_budget)
        try:
            stats = planner.plan(batch).stats
        except StrategyError:
            continue
        seconds[name] = stats.layer_seconds
        if name == "auto":
            chosen, limit = stats.strategy, stats.limit_seconds
    return {
        "seqlens": seqlens,
        "mask": mask,
        "cluster": f"{cluster.name} {cluster.num_nodes}x{cluster.node_sizes[0]}",
        "model": model,
        "chosen": chosen,
        "limit_seconds": limit,
        "layer_seconds": seconds,
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often ``auto`` was slower than a rule, and what it is worth beside each."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        seconds = row["layer_seconds"]
        for name in seconds.keys() - {"auto"}:
            ratios.setdefault(name, []).append(seconds[name] / seconds["auto"])
    return {
        "batches": len(rows),
        "auto_slower": sum(ratio * WITHIN < 1 for each in ratios.values() for ratio in each),
        "layer_over_limit": median(r["layer_seconds"]["auto"] / r["limit_seconds"] for r in rows),
        "rules": {
            s.name: {
                "served": len(ratios[s.name]),
                "least": min(ratios[s.name]),
                "median": median(ratios[s.name]),
                "most": max(ratios[s.name]),
            }
            for s in strategies()
            if s.name in ratios
        },
    }


def as_text(result: dict[str, Any]) -> str:
    summary, where = result["summary"], result["conditions"]
    lines = [f"{'rule ÷ auto':16} {'served':>6} {'least':>6} {'median':>7} {'most':>6}"]
    lines += [
        f"{name:16} {r['served']:6} {r['least']:6.3f} {r['median']:7.3f} {r['most']:6.2f}"
        for name, r in summary["rules"].items()
    ]
    lines.append(
        f"{summary['batches']} batches; auto slower than a rule: {summary['auto_slower']} times; "
        f"its layer ÷ limit: {summary['layer_over_limit']:.3f} in the median"
    )
    return "\n".join([*lines, f"simulated; planned on {where['processor']}, {where['date']}"])
