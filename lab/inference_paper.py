"""Llama3-405B over nodes of 8 H100, simulated beside the tables of arXiv 2411.01783.

Tensor parallelism spans a node, so each GPU has one KV head and its 16 query heads, and GPU ``i``
of all nodes forms a ring of its own: one ring is simulated. Its rates are those that the paper's
tables 5 and 8 imply. Two numbers of the paper are taken as given, both of a single node: the time
of 128 K tokens (it gives the linear layers') and of one token of decoding; the others are
predictions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from dcp.batch import AttentionSpec
from dcp.cluster import Cluster
from dcp.inference.turn import PLACEMENTS, plan_turn
from dcp.simulate import simulate

SPEC = AttentionSpec(num_heads=16, num_kv_heads=1, head_dim=128)
NUM_LAYERS = 126
FLOPS, BANDWIDTH = 510e12, 26e9  # attention's and a ring's, per GPU: implied by table 5
LATENCY = 32e-6  # seconds of a small message: table 8
K = 1024
# Published: new tokens of 128,000 on 4 nodes -> ms of pass-KV, pass-Q (table 4).
TABLE_4 = (
    (1280, 1023.39, 898.71), (3200, 1110.18, 1046.43), (4160, 1298.92, 1280.10),
    (6400, 1305.56, 1302.01), (12800, 2080.67, 2205.27), (25600, 3353.02, 3617.02),
    (38400, 4629.23, 4922.52), (51200, 5745.08, 6217.83), (64000, 6845.21, 7367.99),
    (76800, 7890.35, 8468.66), (89600, 8697.27, 9666.62), (102400, 10105.78, 10652.39),
    (115200, 11136.40, 11571.62), (128000, 11462.15, 12360.57),
)  # fmt: skip
# (tokens, nodes) -> seconds to the first token (tables 6, 7 and figure of the scaling to 1 M).
FULL_PREFILL = {
    (8 * K, 1): 1.740, (32 * K, 1): 7.658, (128 * K, 1): 42.010,
    (8 * K, 2): 0.999, (32 * K, 2): 4.015, (128 * K, 2): 21.042,
    (128 * K, 4): 10.950, (128 * K, 8): 5.85, (128 * K, 16): 3.8, (1024 * K, 16): 77.0,
}  # fmt: skip
# nodes -> ms per token at 128 K (table 7).
DECODE = {1: 46.26, 2: 60.23, 4: 71.31}


def cluster_of(num_nodes: int, *, kernel_tile: int) -> Cluster:
    """One ring: a GPU of each node and its own network card."""
    return Cluster(
        num_nodes=num_nodes,
        devices_per_node=1,
        inter_node_bandwidth=BANDWIDTH,
        device_network_bandwidth=BANDWIDTH,
        inter_node_latency=LATENCY,
        device_flops=FLOPS,
        memory_bandwidth=2.4e12,
        kernel_tile=kernel_tile,
        name=f"{num_nodes} x h100, table 5",
    )


@cache
def attention_seconds(new: int, cached: int, num_nodes: int, strategy: str) -> float:
    """One layer's attention of one sequence, its cache spread evenly."""
    held = [[cached // num_nodes + (rank < cached % num_nodes) for rank in range(num_nodes)]]
    # a kernel for decoding splits the keys instead of padding the one query
    cluster = cluster_of(num_nodes, kernel_tile=128 if new > 1 else 1)
    plan = plan_turn([new], held, SPEC, cluster, strategy=strategy)
    return simulate(plan, cluster, backward=False).forward_seconds


@cache
def linear_token_seconds() -> float:
    """Seconds of all layers' linear parts per token of one node, from 128 K tokens on one node."""
    attention = NUM_LAYERS * attention_seconds(128 * K, 0, 1, "pass_kv")
    return (FULL_PREFILL[128 * K, 1] - attention) / (128 * K)


def first_token_seconds(new: int, cached: int, num_nodes: int, strategy: str) -> float:
    """Predicted time to first token: every layer's attention, and the linear parts."""
    linear = linear_token_seconds() * new / num_nodes
    return NUM_LAYERS * attention_seconds(new, cached, num_nodes, strategy) + linear


def simulated() -> dict[str, Any]:
    """All rows, each with the published number."""
    misses = [
        {"new": new, "cached": 128_000 - new, "published_ms": {"pass_kv": kv, "pass_q": q}}
        | {
            f"{name}_ms": first_token_seconds(new, 128_000 - new, 4, name) * 1e3
            for name in (*PLACEMENTS, "planned")
        }
        for new, kv, q in TABLE_4
    ]
    prefill = [
        {
            "tokens": tokens,
            "num_nodes": nodes,
            "published_seconds": seconds,
            "seconds": first_token_seconds(tokens, 0, nodes, "pass_kv"),
            "planned_seconds": first_token_seconds(tokens, 0, nodes, "planned"),
        }
        for (tokens, nodes), seconds in FULL_PREFILL.items()
    ]
    alone = attention_seconds(1, 128 * K, 1, "pass_q")
    decode = [
        {
            "num_nodes": nodes,
            "published_ms": published,
            "ms": DECODE[1]
            + NUM_LAYERS * (attention_seconds(1, 128 * K, nodes, "pass_q") - alone) * 1e3,
        }
        for nodes, published in DECODE.items()
    ]
    return {
        "linear_token_seconds": linear_token_seconds(),
        "table_4": misses,
        "full_prefill": prefill,
        "decode": decode,
    }


def as_text(found: dict[str, Any]) -> list[str]:
    """Markdown tables, simulated / published."""
    lines = [
        "Llama3-405B, 4 nodes x 8 H100, 128,000 tokens, ms to first token, simulated / published"
    ]
    lines += [
        "",
        "| miss | T | pass-KV | pass-Q | faster | per block | planned |",
        "|---" * 7 + "|",
    ]
    agree = 0
    for row in found["table_4"]:
        published = row["published_ms"]
        ours = "pass-KV" if row["pass_kv_ms"] < row["pass_q_ms"] else "pass-Q"
        theirs = "pass-KV" if published["pass_kv"] < published["pass_q"] else "pass-Q"
        agree += ours == theirs
        lines.append(
            f"| {row['new'] / 128_000:.2%} | {row['new']} "
            f"| {row['pass_kv_ms']:.0f} / {published['pass_kv']:.0f} "
            f"| {row['pass_q_ms']:.0f} / {published['pass_q']:.0f} | {ours} / {theirs} "
            f"| {row['pass_either_ms']:.0f} | {row['planned_ms']:.0f} |"
        )
    lines += ["", f"Same way faster in {agree} of {len(found['table_4'])} rows.", ""]
    lines += ["| tokens | nodes | seconds to first token | error | planned |", "|---" * 5 + "|"]
    for row in found["full_prefill"]:
        error = row["seconds"] / row["published_seconds"] - 1
        both = f"{row['seconds']:.2f} / {row['published_seconds']:.2f}"
        shown = f"| {row['tokens'] // K} K | {row['num_nodes']} | {both} | {error:+.0%} "
        lines.append(shown + f"| {row['planned_seconds']:.2f} |")
    lines += ["", "| nodes | ms per token at 128 K |", "|---|---|"]
    lines += [
        f"| {row['num_nodes']} | {row['ms']:.1f} / {row['published_ms']:.1f} |"
        for row in found["decode"]
    ]
    return lines
