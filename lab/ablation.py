"""``python -m lab ablation``: what each part of the planner is worth, by leaving it out.

The reference batches under four masks, planned by bisection alone with one part after the other
taken out; layers over their limit and bytes, both simulated. A part that another one can stand in
for looks smaller here than it was when it was added.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any
from unittest.mock import patch

import numpy as np

from dcp import candidates, schedule, transfers
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.placement import bisection, improve
from dcp.planner import Planner
from lab.limit import MODELS
from lab.planner import MASKS, load, make_batch
from lab.results import merge

NONE = np.zeros(0, dtype=np.int64)
Left = tuple[Any, str, Any]  # module, name in it, what stands there instead


def _weights(*, skew: bool = True, links: bool = True) -> tuple[tuple[float, float], ...]:
    return tuple((s * skew, w * links) for s, w in improve._WEIGHTS)


def _without_tail(self: candidates.Candidates, *args: Any, tail: bool) -> Any:
    return _compiled(self, *args, tail=False)


_compiled = candidates.Candidates._compiled
PARTS: dict[str, tuple[Left, ...]] = {
    "all parts": (),
    "no local search": ((improve, "anneal", lambda *_: None),),
    "uneven tokens and attention uncharged": ((improve, "_WEIGHTS", _weights(skew=False)),),
    "busy links uncharged": ((improve, "_WEIGHTS", _weights(links=False)),),
    "edges not levelled": ((improve, "level", lambda placement, *_, **__: placement),),
    "bisection the only start": ((bisection, "_LARGE", -1),),
    "heavy rows not cut": ((improve, "_cut_heavy_rows", lambda blocks, _: blocks),),
    "no leaders in a node": ((schedule, "_followers", lambda *_: (NONE, NONE)),),
    "fetches not spread": ((transfers, "_spread", lambda due, *_: due),),
    "no order by distance": ((candidates.Candidates, "_compiled", _without_tail),),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=tuple(PARTS))
    parser.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the searches")
    parser.add_argument("--out", type=Path, help="folder for ablation.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan with each part left out, print, write. Returns the exit status."""
    parts = ["all parts", *(part for part in args.parts if part != "all parts")]
    rows = [
        {"part": part, "seed": seed, **row}
        for part in parts
        for seed in args.seeds
        for row in measure(part, args.masks, seed)
    ]
    result = {"conditions": conditions(), "rows": rows, "summary": summarise(rows)}
    if args.out:
        merge(args.out / "ablation.json", "bisection", result)
    print(json.dumps(result) if args.json else as_text(result))
    return 0


def measure(part: str, masks: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """Every case, planned without ``part``."""
    spec, width = MODELS["8B-tp4"]
    for batch in load("planner_batches.json"):
        cluster = Cluster.preset(
            "h100", num_nodes=batch["nodes"], devices_per_node=batch["devices_per_node"]
        )
        planner = Planner(spec, cluster, strategy="bisection", model_width=width, seed=seed)
        for mask in masks:
            with left_out(part):
                stats = planner.plan(make_batch(batch["seqlens"], mask)).stats
            yield {
                "batch": batch["name"],
                "mask": mask,
                "ratio": stats.layer_seconds / stats.limit_seconds,
                "bytes": stats.inter_node_bytes + stats.intra_node_bytes,
                "max_rank_recv_bytes": stats.max_rank_recv_bytes,
                "planning_seconds": stats.planning_seconds,
            }


@contextmanager
def left_out(part: str) -> Iterator[None]:
    """Plans made inside lack one of :data:`PARTS`."""
    with ExitStack() as stack:
        for where, name, instead in PARTS[part]:
            stack.enter_context(patch.object(where, name, instead))
        yield


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each part left out: layers over limit, and how many times slower than with all parts."""

    def key(row: dict[str, Any]) -> tuple[str, str, int]:
        return row["batch"], row["mask"], row["seed"]

    whole = {key(row): row for row in rows if row["part"] == "all parts"}
    summary = []
    for part in dict.fromkeys(row["part"] for row in rows):
        some = [row for row in rows if row["part"] == part]
        slower = [row["ratio"] / whole[key(row)]["ratio"] for row in some]
        summary.append(
            {
                "part": part,
                "median": median(row["ratio"] for row in some),
                "worst": max(row["ratio"] for row in some),
                "slower": geometric_mean(slower),
                "slower_worst": max(slower),
                "bytes": _mean_of(some, whole, key, "bytes"),
                "max_rank_recv_bytes": _mean_of(some, whole, key, "max_rank_recv_bytes"),
            }
        )
    return summary


def _mean_of(
    rows: list[dict[str, Any]], whole: dict[Any, Any], key: Callable[..., Any], name: str
) -> float:
    """Geometric mean of a figure over the whole planner's, where both have some."""
    pairs = [(row[name], whole[key(row)][name]) for row in rows]
    return geometric_mean([a / b for a, b in pairs if a and b] or [1.0])


def as_text(result: dict[str, Any]) -> str:
    lines = [
        f"{'left out':38} {'÷ limit':>8} {'worst':>6} {'slower':>7} {'worst':>6} "
        f"{'bytes':>6} {'busiest':>8}"
    ]
    lines += [
        f"{s['part']:38} {s['median']:8.3f} {s['worst']:6.3f} {s['slower']:7.3f} "
        f"{s['slower_worst']:6.3f} {s['bytes']:6.3f} {s['max_rank_recv_bytes']:8.3f}"
        for s in result["summary"]
    ]
    where = result["conditions"]
    return "\n".join([*lines, f"simulated; planned on {where['processor']}, {where['date']}"])
