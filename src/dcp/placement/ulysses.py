"""Ulysses: every rank computes whole sequences for a share of the heads."""

from __future__ import annotations

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Placement, StrategyError
from dcp.placement.floors import grid_floor
from dcp.placement.grids import Grid, head_groups, place_on_grids


def ulysses(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
) -> Placement:
    """Head parallelism (DeepSpeed Ulysses, arXiv 2309.14509): two all-to-alls and no ring.

    The packed batch is dealt in N equal runs of tokens. An all-to-all gives each rank all tokens of
    its query heads and of the KV heads these share (so a KV head goes to several ranks where there
    are fewer than ranks); another one brings outputs home. Heads need not divide evenly: 8 heads
    on 3 ranks are dealt 3, 3, 2.

    Raises :class:`StrategyError` where there are more ranks than heads.
    """
    num_ranks = cluster.num_ranks
    if num_ranks > spec.num_heads:
        raise StrategyError(
            f"ulysses: {spec.num_heads} heads cannot be dealt to {num_ranks} ranks; "
            "usp and a2a_p2p deal heads and tokens"
        )
    padding = -batch.num_tokens % num_ranks
    return place_on_grids(
        batch,
        spec,
        [_grid(cluster)],
        np.zeros(len(batch.seqlens), dtype=np.int64),
        num_ranks=num_ranks,
        num_head_groups=head_groups(spec, num_ranks),
        block_size=block_size,
        notes={"head_degree": num_ranks, "padding_tokens": padding},
    )


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """The busiest rank's heads, after keys and values have reached it."""
    if cluster.num_ranks > spec.num_heads:
        return 0.0
    return grid_floor(_grid(cluster), batch, spec, cluster)


def _grid(cluster: Cluster) -> Grid:
    return Grid(np.arange(cluster.num_ranks)[None, :])
