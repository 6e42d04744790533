"""Figures 12 and 13: the attention operator, simulated on 4 nodes of 8 A100."""

from __future__ import annotations

from dcp.cluster import Cluster
from dcp.planner import plan
from lab.paper.campaign import Task
from lab.paper.rows import Row
from lab.paper.workbench import MASKS, SCALES, Workbench
from lab.planner import SPEC, make_batch
from lab.published import PUBLISHED, SYSTEMS

TOKENS = 131072
BATCHES = 12  # a cell is a mean of
SPARSE_SYSTEMS = ("TE", "DCP")


def causal_rows(bench: Workbench) -> list[Row]:
    """Every system at every scale, causal."""
    return bench.run("micro_causal", _tasks(bench, ("causal",), tuple(SYSTEMS)), measure)


def sparse_rows(bench: Workbench) -> list[Row]:
    """TE and ours under the other masks; the published figure has no other system there."""
    return bench.run("micro_sparse", _tasks(bench, MASKS[1:], SPARSE_SYSTEMS), measure)


def _tasks(bench: Workbench, masks: tuple[str, ...], systems: tuple[str, ...]) -> list[Task]:
    count = bench.count(BATCHES)
    return [
        (_case(bench.label(data), data, mask, scale, system, index), seqlens)
        for data in PUBLISHED
        for scale in SCALES
        for index, seqlens in enumerate(
            bench.batches(data, tokens=TOKENS, count=count, scale=scale)
        )
        for mask in masks
        for system in systems
    ]


def _case(lengths: str, data: str, mask: str, scale: float, system: str, index: int) -> Row:
    return {
        "lengths": lengths,
        "data": data,
        "mask": mask,
        "scale": scale,
        "system": system,
        "batch": index,
    }


def measure(case: Row, seqlens: list[int]) -> Row:
    """Simulated milliseconds of one batch under one system."""
    cluster = Cluster.preset("a100", num_nodes=4, devices_per_node=8)
    made = plan(make_batch(seqlens, case["mask"]), SPEC, cluster, strategy=SYSTEMS[case["system"]])
    stats = made.stats
    return {
        "strategy": stats.strategy,
        "forward_ms": stats.simulated["forward_seconds"] * 1e3,
        "backward_ms": stats.simulated["backward_seconds"] * 1e3,
        "exposed_ms": stats.simulated["exposed_comm_seconds"] * 1e3,
        "inter_node_bytes": stats.inter_node_bytes,
        "compute_balance": stats.compute_balance,
    }
