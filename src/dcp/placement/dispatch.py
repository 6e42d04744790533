"""Equal chunks of the packed batch dealt out by work: MagiAttention's rule, and a search's seed."""

from __future__ import annotations

import heapq

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable, build_blocks
from dcp.placement.grids import cut_at

_PER_RANK = 4


def chunks_per_rank(batch: SequenceBatch, num_ranks: int, block_size: int | None) -> int:
    """Four, or as many as chunks of at most ``block_size`` tokens need."""
    if block_size is None:
        return _PER_RANK
    return max(-(-batch.num_tokens // (block_size * num_ranks)), 1)


def dispatch(
    batch: SequenceBatch, spec: AttentionSpec, num_ranks: int, *, per_rank: int
) -> tuple[BlockTable, np.ndarray]:
    """Blocks of the chunks and the owner of each block, int64 ``[num_blocks]``.

    The batch is squashed into one sequence and cut in ``per_rank * num_ranks`` equal chunks; those
    with most work come first, each to the least loaded rank with room for one more.
    """
    num_chunks = per_rank * num_ranks
    edges = np.arange(num_chunks + 1) * batch.num_tokens // num_chunks
    blocks = build_blocks(batch, spec, block_lengths=cut_at(batch, edges))
    chunk = np.searchsorted(edges, blocks.offset, side="right") - 1
    work = np.bincount(chunk, weights=_block_work(blocks), minlength=num_chunks)
    return blocks, _deal(work, num_ranks)[chunk]


def _block_work(blocks: BlockTable) -> np.ndarray:
    """Weighted pairs of each block's queries."""
    work = np.zeros(blocks.num_blocks)
    for name, tiles in blocks.masks.items():
        weight = blocks.batch.weights[name]
        work += weight * np.bincount(tiles.q, weights=tiles.area, minlength=blocks.num_blocks)
    return work


def _deal(work: np.ndarray, num_ranks: int) -> np.ndarray:
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
