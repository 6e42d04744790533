"""``python -m lab packed_video``: planned attention beside data-centric groups, for videos under
full attention. All simulated.

Both train the same samples on the same cluster, with the same rates for products, for attention and
for what is bound by memory. Groups deal whole samples to ranks and share one by its heads
(Ulysses); planned attention packs samples into one sequence and cuts it anywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.cost import attention_seconds, linear_seconds
from dcp.data.batching import TokenBudgetBatches
from dcp.datacentric.buckets import DISTRIBUTIONS, FRAMES, RESOLUTIONS, Bucket, draw_buckets
from dcp.datacentric.iteration import epoch_imbalance
from dcp.datacentric.profile import LayerCost, Measurement, Profile
from dcp.datacentric.schedule import epoch_iterations
from dcp.datacentric.search import candidate_degrees, search
from dcp.layer import rank_linear_seconds
from dcp.planner import Planner
from dcp.plans import Plan
from dcp.simulate import simulate
from lab.data_centric import FIXED_DEGREE, MEMORY_BYTES, chooser_for
from lab.video_cost import BYTES, LAUNCH_SECONDS, MOVED_ROWS, STATE_BYTES

GROUPS = ("bucket", "intra", "inter", "inter+PAC")
PLANNED = ("planned", "planned+PAC")
KEPT_ROWS = 24  # what a block keeps, in rows of the width: two attentions and an MLP


@dataclass(frozen=True)
class VideoModel:
    """A transformer with full attention over a video's tokens, and cross-attention to a text.

    Attributes:
        weights: of a layer, in squares of the width.
        pixels, frames: of a token: its side, and frames after the first.
    """

    name: str
    depth: int
    num_heads: int
    head_dim: int
    weights: float
    pixels: int
    frames: int

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_weights(self) -> float:
        return self.depth * self.weights * self.width**2

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=self.num_heads, num_kv_heads=self.num_heads, head_dim=self.head_dim
        )

    def buckets(self) -> list[Bucket]:
        """The 25 sizes of the other comparison, in this model's tokens."""
        side = self.pixels
        return [
            Bucket(
                f"{name} x {count}", ((count - 1) // self.frames + 1, -(-h // side), -(-w // side))
            )
            for name, (h, w) in RESOLUTIONS.items()
            for count in FRAMES
        ]


MODELS = (
    VideoModel("LTX-Video 2B", 28, 32, 64, weights=14, pixels=32, frames=8),
    VideoModel("Wan 2.1 1.3B", 30, 12, 128, weights=6 + 2 * 8960 / 1536, pixels=16, frames=4),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=float, default=20e6, help="of an epoch, about")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32], help="of the clusters")
    parser.add_argument(
        "--tokens-per-gpu", type=int, default=16384, help="of a planned micro-batch, at least"
    )
    parser.add_argument("--out", type=Path, help="folder for packed_video.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Simulate, print, write. Returns the exit status."""
    rows = [
        simulate_epoch(
            model,
            num_ranks,
            distribution,
            epoch_tokens=args.tokens,
            tokens_per_rank=args.tokens_per_gpu,
        )
        for model in MODELS
        for num_ranks in args.gpus
        for distribution in DISTRIBUTIONS
    ]
    options = {
        name: value for name, value in vars(args).items() if isinstance(value, int | float | list)
    }
    found = {"conditions": conditions(), "options": options, "rows": rows}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "packed_video.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if args.json else as_text(rows))
    return 0


# --------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class PackedCost:
    """Seconds and bytes of a model on a cluster, for groups and for plans."""

    model: VideoModel
    cluster: Cluster

    @cached_property
    def plan_width(self) -> int:
        """What :func:`dcp.cost.linear_seconds` is to take for the width, so that weights agree."""
        return round(self.model.width * self.model.weights / 12)

    @property
    def static_bytes(self) -> float:
        everywhere, shared = STATE_BYTES
        return self.model.num_weights * (everywhere + shared / self.cluster.num_ranks)

    @property
    def row_bytes(self) -> int:
        """Of a token, at the width of the model."""
        return self.model.width * BYTES

    def moved_seconds(self, tokens: float) -> float:
        """Forward, what is no product: bound by the device's memory."""
        return tokens * MOVED_ROWS * self.row_bytes / self.cluster.memory_bandwidth

    def sync_seconds(self) -> float:
        """Adding up all gradients in bfloat16, as a ring does."""
        several = self.cluster.num_nodes > 1
        rate = self.cluster.inter_node_bandwidth if several else self.cluster.intra_node_bandwidth
        return 2 * self.model.num_weights * BYTES / rate

    def measure(self, bucket: Bucket, degree: int, batch_size: int) -> Measurement:
        """A micro-batch of a group, as :class:`dcp.datacentric.measure.Meter` has it."""
        spec, length = self.model.spec, bucket.size
        tokens = -(-length // degree) * batch_size  # of the rank with most
        heads = -(-spec.num_heads // degree) / spec.num_heads
        linear = linear_seconds(tokens, spec, self.cluster, model_width=self.plan_width)
        moved, exchanged = self.moved_seconds(tokens), self._exchange(tokens, degree)
        passes = []
        for is_backward, share in ((False, 1 / 3), (True, 2 / 3)):
            area = batch_size * length**2 * heads
            attention = attention_seconds(area, spec, self.cluster, backward=is_backward)
            times = 2 if is_backward else 1
            work = float(attention) + share * linear + times * moved
            passes.append(max(work, times * LAUNCH_SECONDS) + times * exchanged)
        kept = KEPT_ROWS * tokens * self.row_bytes
        forward, backward = passes
        layer = LayerCost(forward, backward, tokens * self.row_bytes, kept)
        peak = tokens * self.row_bytes * self.model.depth + kept
        return Measurement(self.model.depth * (2 * forward + backward), peak, {"layer": layer})

    def _exchange(self, tokens: float, degree: int) -> float:
        """Queries, keys and values to their heads, and outputs back."""
        if degree == 1:
            return 0.0
        per_node = int(self.cluster.node_sizes.max())
        inside = degree <= per_node
        rate = self.cluster.intra_node_bandwidth
        if not inside:
            rate = self.cluster.inter_node_bandwidth / per_node
        latency = self.cluster.intra_node_latency if inside else self.cluster.inter_node_latency
        return 4 * tokens * self.row_bytes * (degree - 1) / degree / rate + 4 * latency

    def profile(self, buckets: Sequence[Bucket]) -> Profile:
        """The profile of these buckets, searched for as a measured one is."""
        depth = {"layer": self.model.depth}
        profile = Profile(
            machine={"cluster": self.cluster.name},
            model={"kind": self.model.name},
            depth=depth,
            measured_depth=depth,
            memory_bytes=int(MEMORY_BYTES),
            static_bytes=int(self.static_bytes),
            sync_seconds=self.sync_seconds(),
        )
        most = self.model.num_heads
        degrees = [d for d in candidate_degrees(self.cluster.num_ranks) if d <= most]
        search(profile, buckets, degrees, self.measure, max_batch={b.name: 256 for b in buckets})
        return profile

    def plan_seconds(self, made: Plan) -> tuple[float, float]:
        """Of a micro-batch under a plan: every layer recomputed, and as many as memory lets keep.

        Recomputation is the forward pass once more: attention as simulated, and the busiest rank's
        linear layers. ``ValueError`` where not even all recomputed fits.
        """
        tokens, depth = int(made.rank_tokens.max()), self.model.depth
        linear = rank_linear_seconds(made, self.cluster, self.plan_width).max()
        moved = self.moved_seconds(tokens)
        forward = simulate(made, self.cluster).forward_seconds + linear / 3 + moved
        forward = max(forward, LAUNCH_SECONDS)
        layer = max(made.stats.layer_seconds + 3 * moved, 3 * LAUNCH_SECONDS)
        kept = KEPT_ROWS * tokens * self.row_bytes
        free = MEMORY_BYTES - self.static_bytes - depth * tokens * self.row_bytes - kept
        if free < 0:
            raise ValueError(f"{tokens} tokens of a rank do not fit: give fewer --tokens-per-gpu")
        keeping = min(int(free / kept), depth)
        whole = depth * (layer + forward)
        return whole, whole - keeping * forward


# --------------------------------------------------------------------------- epochs


def simulate_epoch(
    model: VideoModel,
    num_ranks: int,
    distribution: str,
    *,
    epoch_tokens: float,
    tokens_per_rank: int,
) -> dict[str, Any]:
    """Tokens per second and imbalance of every way, over one epoch of the same samples."""
    per_node = min(num_ranks, 8)
    cluster = Cluster.preset("h100", num_nodes=num_ranks // per_node, devices_per_node=per_node)
    cost, buckets = PackedCost(model, cluster), model.buckets()
    mean = np.mean([bucket.size for bucket in draw_buckets(buckets, 10000, distribution)])
    drawn = draw_buckets(buckets, max(round(epoch_tokens / mean), 1), distribution)
    tokens = sum(bucket.size for bucket in drawn)
    row: dict[str, Any] = {
        "model": model.name,
        "world": num_ranks,
        "distribution": distribution,
        "tokens": tokens,
        "samples": len(drawn),
        "ways": grouped_epoch(cost, buckets, drawn),
    }
    budget = max(tokens_per_rank * num_ranks, max(bucket.size for bucket in drawn))
    # gradients are added up as often as inter does it
    micro_batches = max(round(tokens / row["ways"]["inter"]["steps"] / budget), 1)
    row["ways"] |= planned_epoch(cost, drawn, budget, micro_batches)
    for figures in row["ways"].values():
        figures["tokens_per_second"] = tokens / figures["seconds"]
    return row


def grouped_epoch(
    cost: PackedCost, buckets: Sequence[Bucket], drawn: Sequence[Bucket]
) -> dict[str, Any]:
    """Seconds, imbalance and steps of every preset of data-centric groups."""
    profile = cost.profile(buckets)
    names, sizes = [bucket.name for bucket in drawn], {b.name: b.size for b in buckets}
    found = {}
    for preset in GROUPS:
        chooser = chooser_for(preset, profile, sizes, degree=FIXED_DEGREE)
        steps = list(epoch_iterations(chooser, names, cost.cluster.num_ranks, seed=0, epoch=0))
        seconds = [step.rank_seconds() for step in steps]
        found[preset] = {
            "seconds": sum(float(each.max()) + profile.sync_seconds for each in seconds),
            "imbalance": epoch_imbalance(seconds),
            "steps": len(steps),
        }
    return found


def planned_epoch(
    cost: PackedCost, drawn: Sequence[Bucket], budget: int, micro_batches: int
) -> dict[str, Any]:
    """The same of planned attention, with batches of ``budget`` tokens over all ranks."""
    lengths = np.array([bucket.size for bucket in drawn])
    planner = Planner(cost.model.spec, cost.cluster, model_width=cost.plan_width)
    plans = [
        planner.plan(SequenceBatch(lengths[batch[:, 0]], "full"))
        for batch in TokenBudgetBatches(lengths, budget, seed=0).epoch(0)
    ]
    every = np.array([cost.plan_seconds(made) for made in plans])
    steps = -(-len(plans) // micro_batches)
    balance = float(np.mean([made.stats.compute_balance for made in plans]))
    return {
        name: {
            "seconds": float(every[:, column].sum()) + steps * cost.sync_seconds(),
            "imbalance": 1 - 1 / balance,
            "steps": steps,
            "plans": len(plans),
            "over_limit": float(
                np.mean([made.stats.layer_seconds / made.stats.limit_seconds for made in plans])
            ),
        }
        for column, name in enumerate(PLANNED)
    }


# --------------------------------------------------------------------------- output


def as_text(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, as docs/measured.md shows it: thousands of tokens a second.

    The best is bold, of those that recompute every layer and of those that keep what fits.
    """
    lines = [
        "| model, GPUs, distribution | " + " | ".join([*GROUPS, *PLANNED]) + " |",
        "|---" * (len(GROUPS) + len(PLANNED) + 1) + "|",
    ]
    for row in rows:
        rate = {way: figures["tokens_per_second"] for way, figures in row["ways"].items()}
        kinds = [[way for way in rate if ("PAC" in way) is keeps] for keeps in (False, True)]
        best = [max(kind, key=lambda way: rate[way]) for kind in kinds]
        texts = {way: f"{value / 1e3:.1f}" for way, value in rate.items()}
        cells = [f"**{text}**" if way in best else text for way, text in texts.items()]
        label = f"{row['model']}, {row['world']}, {row['distribution']}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)
