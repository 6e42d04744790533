"""``python -m lab dynamic``: planned attention beside Megatron's schedulers, in the simulator.

The reference batches (two data sets, one document, many short ones) under the paper's masks, on
four nodes of eight devices. Megatron-Core must be installed (``pip install --no-deps``): its own
code forms the groups. Its attention is causal; under other masks its groups compute what the mask
shows, which it cannot do itself.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.masks import named_mask
from dcp.placement import StrategyError
from dcp.planner import layer_seconds, plan
from dcp.plans import Plan
from lab.peers import plan_megatron, plan_megatron_turns
from lab.planner import MASKS, SPEC, load

OURS = "auto"
SYSTEMS: dict[str, Callable[[SequenceBatch, AttentionSpec, Cluster], list[Plan]]] = {
    OURS: lambda batch, spec, cluster: [plan(batch, spec, cluster)],
    "hybrid CP, in one pass": lambda batch, spec, cluster: [plan_megatron(batch, spec, cluster)],
    "dynamic CP": plan_megatron_turns,
    "dynamic CP, any degree": partial(plan_megatron_turns, any_degree=True),
    "flexible_groups": lambda batch, spec, cluster: [
        plan(batch, spec, cluster, strategy="flexible_groups")
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--masks", nargs="+", default=MASKS, choices=MASKS, metavar="NAME")
    parser.add_argument("--out", type=Path, help="folder for dynamic.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, simulate, print, write. Returns the exit status."""
    rows = [compare(batch, mask) for batch in load("planner_batches.json") for mask in args.masks]
    result = {
        "conditions": conditions(),
        "megatron": version("megatron-core"),
        "rows": rows,
        "summary": summarise(rows),
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "dynamic.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else as_text(result))
    return 0


def compare(batch: dict[str, Any], mask: str) -> dict[str, Any]:
    """Simulated seconds of a layer, forward and backward with its linear parts, by system."""
    cluster = Cluster(num_nodes=batch["nodes"], devices_per_node=batch["devices_per_node"])
    masks = [named_mask(mask, length) for length in batch["seqlens"]]
    sequences = SequenceBatch(batch["seqlens"], masks)
    seconds: dict[str, float] = {}
    turns, cannot = {}, {}
    for system, plans_of in SYSTEMS.items():
        try:
            plans = plans_of(sequences, SPEC, cluster)
        except StrategyError as error:
            cannot[system] = str(error)
            continue
        seconds[system], turns[system] = sum(map(simulated, plans)), len(plans)
    row = {"batch": batch["name"], "mask": mask, "layer_seconds": seconds, "turns": turns}
    return row | {"cannot": cannot}


def simulated(made: Plan) -> float:
    if not made.stats.layer_seconds:
        made.stats.simulated = made.simulate().to_json()
        made.stats.layer_seconds = layer_seconds(made)
    return made.stats.layer_seconds


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as long as ours a system takes: the geometric mean by data set and mask."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        data = re.sub(r"-\d+$", "", row["batch"])
        gains = found.setdefault((data, row["mask"]), {})
        for system, seconds in row["layer_seconds"].items():
            gains.setdefault(system, []).append(seconds / row["layer_seconds"][OURS])
    return [
        {"data": data, "mask": mask, "slower": {s: geometric_mean(g) for s, g in gains.items()}}
        for (data, mask), gains in found.items()
    ]


def as_text(result: dict[str, Any]) -> str:
    lines = [f"{'batch':18} {'mask':16}" + "".join(f"{name:>24}" for name in SYSTEMS)]
    for row in result["rows"]:
        figures = [
            f"{1e3 * seconds:.2f} ms in {row['turns'][name]}"
            if (seconds := row["layer_seconds"].get(name)) is not None
            else "-"
            for name in SYSTEMS
        ]
        lines.append(f"{row['batch']:18} {row['mask']:16}" + "".join(f"{f:>24}" for f in figures))
    return "\n".join(lines)
