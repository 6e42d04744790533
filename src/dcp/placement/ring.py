"""Ring attention: every sequence over all ranks, contiguous or in zigzag."""

from __future__ import annotations

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Placement
from dcp.placement.floors import area_seconds, grid_floor, last_chunk_area
from dcp.placement.grids import Grid, padding_tokens, place_on_grid


def ring(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """Contiguous ring (Liu et al., 2023): rank ``r`` holds the ``r``-th of N equal chunks."""
    return _ring(batch, spec, _grid(cluster, zigzag=False), block_size)


def zigzag(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """Zigzag ring: rank ``r`` holds chunks ``r`` and ``2N - 1 - r`` of 2N, even under causality."""
    return _ring(batch, spec, _grid(cluster, zigzag=True), block_size)


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """All keys and values pass over every link of the ring, in either pass.

    A contiguous ring's last rank has the most work of a causal sequence.
    """
    floor = grid_floor(_grid(cluster, zigzag=name == "zigzag"), batch, spec, cluster)
    if name == "zigzag":
        return floor
    last = last_chunk_area(batch, cluster.num_ranks)
    return max(floor, area_seconds(last, spec, cluster))


def _ring(
    batch: SequenceBatch, spec: AttentionSpec, grid: Grid, block_size: int | None
) -> Placement:
    """Compute with the queries; keys and values go round, one step to a rank."""
    padding = padding_tokens(batch.seqlens, grid.num_contexts * (1 + grid.zigzag))
    return place_on_grid(
        batch, spec, grid, block_size=block_size, notes={"padding_tokens": padding}
    )


def _grid(cluster: Cluster, *, zigzag: bool) -> Grid:
    return Grid(np.arange(cluster.num_ranks)[:, None], zigzag=zigzag)
