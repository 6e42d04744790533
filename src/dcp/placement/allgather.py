"""All-gather: every rank fetches all keys and values, then computes its own queries."""

from __future__ import annotations

from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable, build_blocks
from dcp.cluster import Cluster
from dcp.placement import Placement, Route
from dcp.placement.floors import compute_floor
from dcp.placement.grids import cut_at, join_routes
from dcp.ragged import starts


def allgather(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """Queries in zigzag; one all-gather of keys and values before any work (Llama 3's way).

    The packed batch is cut in 2N chunks, documents or not; rank ``r`` holds chunks ``r`` and
    ``2N - 1 - r``. Every rank receives every key, needed or not: each node once, its ranks passing
    on. Partial key and value gradients are summed in each node, then go to their owners.
    """
    num_ranks, tokens = cluster.num_ranks, batch.num_tokens
    there = np.arange(num_ranks)
    chunks = np.arange(2 * num_ranks + 1) * tokens // (2 * num_ranks)
    finer = range(0, tokens, block_size) if block_size else ()
    edges = np.unique(np.concatenate([chunks, np.array(finer, dtype=np.int64)]))
    blocks = build_blocks(batch, spec, block_lengths=cut_at(batch, edges))
    chunk = np.searchsorted(chunks, blocks.offset, side="right") - 1
    owner = np.concatenate([there, there[::-1]])[chunk]
    return gathered(blocks, owner, cluster, notes={"padding_tokens": -tokens % (2 * num_ranks)})


def gathered(
    blocks: BlockTable, owner: np.ndarray, cluster: Cluster, *, notes: dict[str, Any]
) -> Placement:
    """Ranks compute the queries of the blocks they own, after an all-gather of all keys.

    ``owner``: of each block, int64 ``[num_blocks]``.
    """
    rank = {name: owner[tiles.q] for name, tiles in blocks.masks.items()}
    route = _gather(owner, cluster)
    before = int(route.step.max(initial=0))  # divisions without work: nothing hides the gather
    return Placement(
        blocks,
        owner,
        rank,
        division={name: np.full_like(of, before) for name, of in rank.items()},
        num_divisions=before + 1,
        kv_route=route,
        gradients_travel=True,
        gradient_lane=cluster.node_of_rank,
        notes=notes,
    )


def _gather(owner: np.ndarray, cluster: Cluster) -> Route:
    """Every piece from its owner to its node's ranks and to one rank of each other node, who passes
    it on to the ranks of that node."""
    node, sizes = cluster.node_of_rank, cluster.node_sizes
    start = starts(sizes)
    hops = []
    for target in range(cluster.num_ranks):
        away = np.flatnonzero(owner != target)
        there = node[target]
        leader = start[there] + (owner[away] - start[node[owner[away]]]) % sizes[there]
        direct = (node[owner[away]] == there) | (leader == target)
        source = np.where(direct, owner[away], leader)
        hops.append(Route(away, source, np.full_like(away, target), np.where(direct, 1, 2)))
    return join_routes(hops)


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """The mean rank's compute, after the all-gather of either pass.

    Nobody computes before all keys have come into the node, or where there is one node to the rank.
    """
    share = max(batch.num_tokens // cluster.num_ranks - 2, 0) * spec.kv_token_bytes
    away = cluster.num_ranks - int(cluster.node_sizes.max())
    gather = away * share / cluster.inter_node_bandwidth
    if not away:
        gather = (cluster.num_ranks - 1) * share / cluster.intra_node_bandwidth
    passes = 2 * sum(batch.weights.values())
    return compute_floor(batch, spec, cluster) + passes * gather
