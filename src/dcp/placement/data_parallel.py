"""Data parallelism: whole sequences to ranks; attention moves nothing."""

from __future__ import annotations

import heapq

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import build_blocks, cut_evenly
from dcp.cluster import Cluster
from dcp.placement import Placement
from dcp.placement.floors import area_seconds, sequence_areas


def data_parallel(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """Packed: each sequence, longest processing time first, to the rank with the least so far."""
    owner = _packed(batch, cluster.num_ranks)
    return _whole(batch, spec, owner, block_size, {"padding_tokens": 0})


def bucketed(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """Bucketed: every rank gets as many sequences as any other of each power-of-two length class.

    The original pads each sequence to its bucket's longest; here only the count of that padding
    remains.
    """
    owner = _bucketed(batch, cluster.num_ranks)
    bucket = _buckets(batch.seqlens)
    longest = np.zeros(int(bucket.max(initial=0)) + 1, dtype=np.int64)
    np.maximum.at(longest, bucket, batch.seqlens)
    padding = int((longest[bucket] - batch.seqlens).sum())
    return _whole(batch, spec, owner, block_size, {"padding_tokens": padding})


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """The compute of the busiest rank: the placement is cheap enough to be made for it."""
    deal = {"data_parallel": _packed, "bucketed": _bucketed}[name]
    owner = deal(batch, cluster.num_ranks)
    load = np.bincount(owner, weights=sequence_areas(batch), minlength=cluster.num_ranks)
    return area_seconds(load.max(), spec, cluster)


def _packed(batch: SequenceBatch, num_ranks: int) -> np.ndarray:
    """Rank of each sequence; equal loads go by tokens, then by rank."""
    areas = sequence_areas(batch)
    owner = np.zeros(len(areas), dtype=np.int64)
    ranks = [(0.0, 0, rank) for rank in range(num_ranks)]
    for index in np.lexsort((-batch.seqlens, -areas)).tolist():
        load, tokens, rank = ranks[0]
        owner[index] = rank
        held = (load + areas[index], tokens + int(batch.seqlens[index]), rank)
        heapq.heapreplace(ranks, held)
    return owner


def _bucketed(batch: SequenceBatch, num_ranks: int) -> np.ndarray:
    """Rank of each sequence: longest bucket first, in each the least served rank of least load."""
    areas, bucket = sequence_areas(batch), _buckets(batch.seqlens)
    owner = np.zeros(len(areas), dtype=np.int64)
    load = [0.0] * num_ranks
    for each in np.unique(bucket)[::-1].tolist():
        ranks = [(0, load[rank], rank) for rank in range(num_ranks)]  # served in this bucket, load
        heapq.heapify(ranks)
        members = np.flatnonzero(bucket == each)
        for index in members[np.argsort(-areas[members], kind="stable")].tolist():
            served, _, rank = ranks[0]
            owner[index] = rank
            load[rank] += float(areas[index])
            heapq.heapreplace(ranks, (served + 1, load[rank], rank))
    return owner


def _buckets(seqlens: np.ndarray) -> np.ndarray:
    """Length class of each sequence: the bits of its length."""
    bits: np.ndarray = np.ceil(np.log2(np.maximum(seqlens, 1)))
    return bits.astype(np.int64)


def _whole(
    batch: SequenceBatch,
    spec: AttentionSpec,
    rank_of_sequence: np.ndarray,
    block_size: int | None,
    notes: dict[str, object],
) -> Placement:
    size = block_size or max(int(batch.seqlens.max(initial=0)), 1)
    blocks = build_blocks(batch, spec, block_lengths=cut_evenly(batch.seqlens, size))
    owner = rank_of_sequence[blocks.sequence]
    rank = {name: owner[tiles.q] for name, tiles in blocks.masks.items()}
    return Placement(blocks, owner, rank, notes=notes)
