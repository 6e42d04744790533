"""Why plan at all: what static context parallelism pays for, and where an iteration's time goes.

The talk's motivation figures (share of communication, keys and values sent to ranks that do not
need them, imbalance under each mask) and the decomposition of an iteration, all simulated.
"""

from __future__ import annotations

import numpy as np

from dcp.cluster import Cluster
from dcp.planner import plan
from dcp.plans import Plan
from dcp.simulate import PassTimeline
from dcp.tables import Item
from lab.paper.campaign import Task
from lab.paper.end_to_end import GPT_8B, predict_iteration, sliced_cluster
from lab.paper.rows import Row
from lab.paper.training import STATIC, TENSOR_PARALLEL
from lab.paper.workbench import MASKS, Workbench
from lab.planner import make_batch

NODES = (4, 8)
TOKENS = (65536, 131072)
BATCHES = 12
RING = "zigzag"  # every rank sees all keys and values: what is redundant shows


def share_rows(bench: Workbench) -> list[Row]:
    """Parts of an iteration under static context parallelism, by nodes and tokens."""
    cases = [_case(nodes, tokens, "causal", STATIC) for nodes in NODES for tokens in TOKENS]
    return bench.run("motivation_share", _tasks(bench, cases), decompose)


def waste_rows(bench: Workbench) -> list[Row]:
    """What a zigzag ring sends in vain and how uneven its ranks are, by mask."""
    cases = [_case(8, 65536, mask, RING) for mask in MASKS]
    return bench.run("motivation_waste", _tasks(bench, cases), waste)


def decomposition_rows(bench: Workbench) -> list[Row]:
    """Parts of an iteration of 131,072 tokens on 8 nodes, static and ours, by mask."""
    cases = [_case(8, 131072, mask, strategy) for mask in MASKS for strategy in (STATIC, "auto")]
    return bench.run("decomposition", _tasks(bench, cases), decompose)


def _case(nodes: int, tokens: int, mask: str, strategy: str) -> Row:
    return {"nodes": nodes, "tokens": tokens, "mask": mask, "strategy": strategy}


def _tasks(bench: Workbench, cases: list[Row]) -> list[Task]:
    """Every case with each of its batches."""
    lengths, count = {"lengths": bench.label("longalign")}, bench.count(BATCHES)
    return [
        (lengths | case | {"batch": index}, seqlens)
        for case in cases
        for index, seqlens in enumerate(
            bench.batches("longalign", tokens=case["tokens"], count=count)
        )
    ]


def _planned(case: Row, seqlens: list[int]) -> tuple[Plan, Cluster]:
    cluster = Cluster.preset("a100", num_nodes=case["nodes"], devices_per_node=8)
    made = plan(
        make_batch(seqlens, case["mask"]),
        GPT_8B.spec(TENSOR_PARALLEL),
        sliced_cluster(cluster, TENSOR_PARALLEL),
        strategy=case["strategy"],
    )
    return made, cluster


def decompose(case: Row, seqlens: list[int]) -> Row:
    """Seconds of an iteration: others, attention alone, overlapped, exposed communication."""
    made, cluster = _planned(case, seqlens)
    timeline = made.simulate()
    alone = overlapped = exposed = 0.0
    for played in (*timeline.forward.values(), *timeline.backward.values()):
        parts = overlap(played)
        alone += parts[0] * GPT_8B.num_layers
        overlapped += parts[1] * GPT_8B.num_layers
        exposed += parts[2] * GPT_8B.num_layers
    iteration = predict_iteration(made, GPT_8B, cluster, TENSOR_PARALLEL)
    return {
        "chosen": made.stats.strategy,
        "others": iteration.others,
        "attention_alone": alone,
        "overlapped": overlapped,
        "exposed": exposed,
    }


def overlap(played: PassTimeline) -> tuple[float, float, float]:
    """Mean rank's seconds of compute alone, of both at once, and of waiting for others; their
    sum is the pass."""
    compute = played.computed - played.begin
    transfer = played.arrived - played.begin
    both = np.minimum(compute, transfer).sum(axis=0)
    alone = compute.sum(axis=0) - both
    return float(alone.mean()), float(both.mean()), float((played.seconds - alone - both).mean())


def waste(case: Row, seqlens: list[int]) -> Row:
    """Share of received keys and values that no query of the receiver sees; and imbalance."""
    made, _ = _planned(case, seqlens)
    [tables] = made.masks.values()
    needed = np.zeros((made.num_ranks, made.num_blocks), dtype=bool)
    items = tables.items
    needed[items[:, Item.RANK], tables.tile_k[items[:, Item.TILE]]] = True
    foreign = made.owner[None, :] != np.arange(made.num_ranks)[:, None]
    received = (foreign * made.block_length).sum()
    useful = (needed & foreign) * made.block_length
    return {
        "redundant_share": 1 - float(useful.sum() / received),
        "compute_balance": made.stats.compute_balance,
        "inter_node_mb": made.stats.inter_node_bytes / 1e6,
    }
