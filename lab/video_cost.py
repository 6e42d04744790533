"""Seconds and bytes of a large video transformer on a cluster: the profile that would be measured.

The model is Open-Sora 1.2's STDiT3-XL/2: 28 spatial and 28 temporal blocks, width 1152, 16 heads.
A block is a roofline: products at the device's rate, everything else at its memory's, and the
launches of its kernels; exchanges go over the links. The same for Llama's layers, with the cost
functions that plans are made by.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.cost import attention_seconds, linear_seconds
from dcp.datacentric.buckets import Bucket
from dcp.datacentric.profile import LayerCost, Measurement, Profile
from dcp.datacentric.search import candidate_degrees, search

WIDTH, DEPTH, WORDS, PATCH, BYTES = 1152, 28, 300, 2, 2  # BYTES of a bfloat16
# What a block keeps for its backward pass, in rows of WIDTH per token: counted on this project's
# model of the same structure.
KEPT_ROWS = 31
MOVED_ROWS = 3 * KEPT_ROWS  # read and written by all that is no product, per token and block
LAUNCH_SECONDS = 300e-6  # of a block's forward kernels, from Python: a guess
LINEAR_FLOPS = 28 * WIDTH**2  # per token and block: self- and cross-attention's products, the MLP
NUM_WEIGHTS = 1.1e9
KINDS = ("spatial", "temporal")
STATE_BYTES = 4, 12  # of a weight on every rank (itself, its gradient), and shared out (ZeRO-1)


@dataclass(frozen=True)
class VideoCost:
    """Micro-batches of the model on ``cluster``, groups inside nodes where they fit.

    Attributes:
        linear_share: of the device's matrix rate that products reach.
        launch_seconds: of a block's forward kernels, from Python.
        exchange_seconds: of launching one exchange, whatever its size.
        step_seconds: of a step, beside adding up gradients.
    """

    cluster: Cluster
    linear_share: float = 0.75
    launch_seconds: float = LAUNCH_SECONDS
    exchange_seconds: float = 0.0
    step_seconds: float = 0.0

    def measure(self, bucket: Bucket, degree: int, batch_size: int) -> Measurement:
        """As :class:`dcp.datacentric.measure.Meter` has it, of all layers at once."""
        parts = [(bucket, batch_size)]
        forward = {kind: self.block_seconds(kind, degree, parts) for kind in KINDS}
        tokens = _tokens(bucket) * batch_size / degree
        row_bytes = int(tokens * WIDTH * BYTES)
        layers = {
            kind: LayerCost(seconds, 2 * seconds, row_bytes, KEPT_ROWS * row_bytes)
            for kind, seconds in forward.items()
        }
        peak = row_bytes * (2 * DEPTH + KEPT_ROWS)
        return Measurement(4 * DEPTH * sum(forward.values()), peak, layers)

    def block_seconds(self, kind: str, degree: int, parts: list[tuple[Bucket, int]]) -> float:
        """Forward pass of one block over (bucket, samples) that are packed into one."""
        works, exchanged = zip(*(self._part(kind, b, degree, n) for b, n in parts), strict=True)
        seconds = max(sum(works), self.launch_seconds)
        if kind == "spatial" and degree > 1:
            seconds += 2 * (self._exchange(sum(exchanged), degree) + self.exchange_seconds)
        return seconds

    def _part(self, kind: str, bucket: Bucket, degree: int, batch_size: int) -> tuple[float, float]:
        """Seconds of the busiest rank, and bytes that it exchanges each way."""
        frames, space = bucket.shape[0], _space(bucket)
        local = -(-space // degree) * frames * batch_size  # the rank with most
        rows = -(-frames * batch_size // degree)  # frames whose spatial attention it computes
        pairs = rows * space**2 if kind == "spatial" else local * frames
        flops = local * LINEAR_FLOPS + 4 * WIDTH * (pairs + local * WORDS)
        products = flops / (self.linear_share * self.cluster.device_flops)
        moved = local * MOVED_ROWS * WIDTH * BYTES / self.cluster.memory_bandwidth
        return products + moved, local * WIDTH * BYTES

    def _exchange(self, num_bytes: float, degree: int) -> float:
        """An all-to-all of what every rank of a group holds."""
        per_node = int(self.cluster.node_sizes.max())
        inside = degree <= per_node
        rate = self.cluster.intra_node_bandwidth
        latency = self.cluster.intra_node_latency
        if not inside:
            rate = self.cluster.inter_node_bandwidth / per_node
            latency = self.cluster.inter_node_latency
        packing = 4 * num_bytes / self.cluster.memory_bandwidth
        return num_bytes * (degree - 1) / degree / rate + packing + 2 * latency

    def num_tokens(self, bucket: Bucket) -> int:
        """Of one sample."""
        return _tokens(bucket)

    def sync_seconds(self) -> float:
        """Adding up all gradients in bfloat16, as a ring does."""
        several = self.cluster.num_nodes > 1
        rate = self.cluster.inter_node_bandwidth if several else self.cluster.intra_node_bandwidth
        return 2 * NUM_WEIGHTS * BYTES / rate + self.step_seconds

    def profile(self, buckets: list[Bucket], *, memory_bytes: float, max_batch: int) -> Profile:
        """The profile of these buckets, searched for as a measured one is."""
        num_ranks = self.cluster.num_ranks
        everywhere, shared = STATE_BYTES
        profile = Profile(
            machine={"cluster": self.cluster.name, "num_ranks": num_ranks},
            model={"kind": "STDiT3-XL/2"},
            depth=dict.fromkeys(KINDS, DEPTH),
            measured_depth=dict.fromkeys(KINDS, DEPTH),
            memory_bytes=int(memory_bytes),
            static_bytes=int(NUM_WEIGHTS * (everywhere + shared / num_ranks)),
            sync_seconds=self.sync_seconds(),
        )
        limits = {bucket.name: max_batch for bucket in buckets}
        search(profile, buckets, candidate_degrees(num_ranks), self.measure, max_batch=limits)
        return profile


def _space(bucket: Bucket) -> int:
    return -(-bucket.shape[1] // PATCH) * -(-bucket.shape[2] // PATCH)


def _tokens(bucket: Bucket) -> int:
    return bucket.shape[0] * _space(bucket)


@dataclass(frozen=True)
class TextCost:
    """One layer of a Llama with ``spec``, Ulysses inside groups, documents as long as buckets."""

    cluster: Cluster
    spec: AttentionSpec

    def measure(self, bucket: Bucket, degree: int, batch_size: int) -> Measurement:
        """Seconds of forward and backward; activations are taken to be kept."""
        length = bucket.size
        tokens = length * batch_size / degree
        area = batch_size * length * (length + 1) / 2 / degree
        seconds = linear_seconds(tokens, self.spec, self.cluster)
        for backward in (False, True):
            seconds += float(attention_seconds(area, self.spec, self.cluster, backward=backward))
        if degree > 1:
            spec = self.spec
            row = 2 * spec.q_token_bytes + spec.kv_token_bytes  # queries, outputs, keys and values
            per_node = int(self.cluster.node_sizes.max())
            rate = self.cluster.intra_node_bandwidth
            if degree > per_node:
                rate = self.cluster.inter_node_bandwidth / per_node
            seconds += 2 * tokens * row * (degree - 1) / degree / rate
        return Measurement(seconds, 0, {"layer": LayerCost(0.0, 0.0, 0, 0)})

    def profile(self, buckets: list[Bucket], *, max_batch: int) -> Profile:
        """The profile of these buckets; memory is no limit."""
        one = {"layer": 1}
        profile = Profile(
            machine={"cluster": self.cluster.name},
            model={"kind": "llama"},
            depth=one,
            measured_depth=one,
            memory_bytes=1,
            static_bytes=0,
        )
        degrees = [d for d in candidate_degrees(self.cluster.num_ranks) if d <= self.spec.num_heads]
        limits = {bucket.name: max_batch for bucket in buckets}
        search(profile, buckets, degrees, self.measure, max_batch=limits)
        return profile
