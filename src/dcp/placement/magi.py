"""MagiAttention: chunks dispatched by work, equal in number; only the keys needed move."""

from __future__ import annotations

import heapq

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable, build_blocks
from dcp.cluster import Cluster
from dcp.placement import Placement
from dcp.placement.floors import compute_floor
from dcp.placement.grids import cut_at

CHUNKS_PER_RANK = 4


def magi(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
) -> Placement:
    """Chunks of the packed batch, most work first, to the least loaded rank with room for one more.

    The batch is squashed into one sequence and cut into the same number of equal chunks for every
    rank. Ranks compute the queries they hold; each fetches the key blocks that its mask needs,
    once, in stages that hide behind compute. ``block_size`` is the most tokens of a chunk; by
    default every rank gets four.
    """
    num_ranks, tokens = cluster.num_ranks, batch.num_tokens
    per_rank = CHUNKS_PER_RANK
    if block_size is not None:
        per_rank = max(-(-tokens // (block_size * num_ranks)), 1)
    num_chunks = per_rank * num_ranks
    edges = np.arange(num_chunks + 1) * tokens // num_chunks
    blocks = build_blocks(batch, spec, block_lengths=cut_at(batch, edges))
    chunk = np.searchsorted(edges, blocks.offset, side="right") - 1
    work = np.bincount(chunk, weights=_block_work(blocks), minlength=num_chunks)
    owner = _dispatch(work, num_ranks)[chunk]
    rank = {name: owner[tiles.q] for name, tiles in blocks.masks.items()}
    chunk_size = max(-(-tokens // num_chunks), 1)
    notes = {"chunk_size": chunk_size, "padding_tokens": num_chunks * chunk_size - tokens}
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


def _block_work(blocks: BlockTable) -> np.ndarray:
    """Weighted pairs of each block's queries."""
    work = np.zeros(blocks.num_blocks)
    for name, tiles in blocks.masks.items():
        weight = blocks.batch.weights[name]
        work += weight * np.bincount(tiles.q, weights=tiles.area, minlength=blocks.num_blocks)
    return work


def _dispatch(work: np.ndarray, num_ranks: int) -> np.ndarray:
    """Rank of each chunk, by a heap of the ranks' loads; equal counts."""
    rank_of = np.empty(len(work), dtype=np.int64)
    room = np.full(num_ranks, len(work) // num_ranks)
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for chunk in np.argsort(-work, kind="stable").tolist():
        load, rank = heapq.heappop(heap)
        rank_of[chunk] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(heap, (load + work[chunk], rank))
    return rank_of
