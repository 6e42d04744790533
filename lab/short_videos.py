"""``python -m lab short_videos``: why short-dominated videos gain less here than published.

The comparison of ``lab data_centric`` on 32 simulated GPUs, with one thing changed at a time: the
accumulation of the published configuration, other distributions of short videos, longer and
shorter epochs, and costs that weigh on small samples. Every gain over bucket parallel is taken
apart into what balance gives, ``(1 - imbalance) / (1 - bucket's imbalance)``, and the rest: cheaper
degrees and batches, less recomputation, fewer steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.datacentric.buckets import Bucket, video_buckets
from lab.data_centric import PUBLISHED, video_epoch
from lab.video_cost import VideoCost

NUM_NODES, PER_NODE = 4, 8
WAYS = ("intra", "inter", "inter+PAC")
# of 32 GPUs, read off a plot that does not say of which distribution; bucket's is in the text
PUBLISHED_IMBALANCE = {"bucket": 0.164, "intra": 0.053, "inter": 0.043, "inter+PAC": 0.033}

ORDERS: dict[str, Callable[[Bucket], Any]] = {  # from the shortest on
    "size": lambda bucket: (bucket.size, bucket.name),
    "frames": lambda bucket: (bucket.shape[0], bucket.size),
    "resolution": lambda bucket: (bucket.shape[1], bucket.size),
}


@dataclass(frozen=True)
class Variant:
    """One change. ``order`` and ``offset`` are of the distribution, whose n-th bucket weighs
    ``(n + offset) ** -3``; ``epoch`` multiplies the samples."""

    name: str
    order: str = "size"
    offset: float = 5.0
    epoch: float = 1.0
    caps: dict[str, int] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)


VARIANTS = (
    Variant("as in the table"),
    Variant("least accumulation 15", caps={"least": 15}),
    Variant("least and most accumulation 15", caps={"least": 15, "steps": 15}),
    Variant("distribution: (n + 0)^-3", offset=0.0),
    Variant("distribution: (n + 2)^-3", offset=2.0),
    Variant("distribution: (n + 10)^-3", offset=10.0),
    Variant("distribution: n counts by frames", order="frames"),
    Variant("distribution: n counts by resolution", order="resolution"),
    Variant("a tenth of the samples", epoch=0.1),
    Variant("three times the samples", epoch=3.0),
    Variant("kernel launches of a block 1 ms", costs={"launch_seconds": 1e-3}),
    Variant("launch of an exchange 0.3 ms", costs={"exchange_seconds": 0.3e-3}),
    Variant("a step costs 1 s more", costs={"step_seconds": 1.0}),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=10000, help="of a simulated epoch")
    parser.add_argument("--out", type=Path, help="folder for short_videos.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Simulate every variant, print, write. Returns the exit status."""
    rows = [published(), *(simulate_variant(variant, args.samples) for variant in VARIANTS)]
    found = {"conditions": conditions(), "samples": args.samples, "rows": rows}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "short_videos.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if args.json else as_text(rows))
    return 0


def simulate_variant(variant: Variant, num_samples: int) -> dict[str, Any]:
    """Gains over bucket parallel under one change, and their parts."""
    cluster = Cluster.preset("h100", num_nodes=NUM_NODES, devices_per_node=PER_NODE)
    drawn = draw_short(variant, max(int(num_samples * variant.epoch), 1))
    cost = VideoCost(cluster, **variant.costs)
    presets = video_epoch(cost, drawn, ("bucket", *WAYS), **variant.caps)
    rate = {name: figures["tokens_per_second"] for name, figures in presets.items()}
    return taken_apart(
        variant.name,
        {way: rate[way] / rate["bucket"] for way in WAYS},
        {name: figures["imbalance"] for name, figures in presets.items()},
    )


def draw_short(variant: Variant, num_samples: int) -> list[Bucket]:
    """Buckets of the samples, mostly short ones."""
    ordered: Sequence[Bucket] = sorted(video_buckets(), key=ORDERS[variant.order])
    weights = (np.arange(1, len(ordered) + 1) + variant.offset) ** -3.0
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(ordered), size=num_samples, p=weights / weights.sum())
    return [ordered[index] for index in drawn.tolist()]


def published() -> dict[str, Any]:
    """The published gains on short-dominated data, with the imbalances that were published."""
    return taken_apart("published", PUBLISHED["short"], PUBLISHED_IMBALANCE)


def taken_apart(name: str, gains: dict[str, float], imbalance: dict[str, float]) -> dict[str, Any]:
    """A gain is that of balance times the rest."""
    balance = {way: (1 - imbalance[way]) / (1 - imbalance["bucket"]) for way in WAYS}
    return {
        "name": name,
        "gain": gains,
        "imbalance": imbalance,
        "of_balance": balance,
        "rest": {way: gains[way] / balance[way] for way in WAYS},
    }


def as_text(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, as docs/measured.md shows it: gain = balance x rest."""
    lines = [
        "| | bucket waits | " + " | ".join(WAYS) + " |",
        "|---" * (len(WAYS) + 2) + "|",
    ]
    for row in rows:
        parts = [
            f"{row['gain'][way]:.2f} = {row['of_balance'][way]:.2f} × {row['rest'][way]:.2f}"
            for way in WAYS
        ]
        lines.append(f"| {row['name']} | {row['imbalance']['bucket']:.1%} | {' | '.join(parts)} |")
    return "\n".join(lines)
