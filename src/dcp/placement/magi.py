"""MagiAttention: chunks dispatched by work, equal in number; only the keys needed move."""

from __future__ import annotations

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Placement
from dcp.placement.dispatch import chunks_per_rank, dispatch
from dcp.placement.floors import compute_floor


def magi(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """Chunks of the packed batch, most work first, to the least loaded rank with room for one more.

    See :func:`dcp.placement.dispatch.dispatch`. Ranks compute the queries they hold; each fetches
    the key blocks that its mask needs, once, in stages that hide behind compute. ``block_size`` is
    the most tokens of a chunk; by default every rank gets four.
    """
    per_rank = chunks_per_rank(batch, cluster.num_ranks, block_size)
    blocks, owner = dispatch(batch, spec, cluster.num_ranks, per_rank=per_rank)
    rank = {name: owner[tiles.q] for name, tiles in blocks.masks.items()}
    num_chunks = per_rank * cluster.num_ranks
    size = max(-(-batch.num_tokens // num_chunks), 1)
    notes = {"chunk_size": size, "padding_tokens": num_chunks * size - batch.num_tokens}
    return Placement(blocks, owner, rank, notes=notes)


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """The mean rank's compute, or what the placement moves into the busiest node.

    A key block comes into a node once a pass, however many ranks share it; its gradient goes back.
    """
    placement = magi(batch, spec, cluster)
    blocks, node, nodes = placement.blocks, cluster.node_of_rank, cluster.num_nodes
    volume = blocks.length * spec.kv_token_bytes
    home = node[placement.owner]
    incoming = np.zeros(nodes)
    for mask, tiles in blocks.masks.items():
        uses = np.unique(node[placement.rank[mask]] * blocks.num_blocks + tiles.k)
        into, block = np.divmod(uses, max(blocks.num_blocks, 1))
        into, block = into[into != home[block]], block[into != home[block]]
        fetched = np.bincount(into, weights=volume[block], minlength=nodes)
        back = np.bincount(home[block], weights=volume[block], minlength=nodes)
        incoming += batch.weights[mask] * (2 * fetched + back)
    moved = float(incoming.max()) / cluster.inter_node_bandwidth
    return max(compute_floor(batch, spec, cluster), moved)
