"""Recursive bisection of the ranks, then local search: the planner's own constructive strategy."""

from __future__ import annotations

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Placement
from dcp.placement.construct import construct
from dcp.placement.improve import TOLERANCE, Best, choose_blocks, improve, improve_owners
from dcp.placement.state import empty_state, recount, to_placement

# tokens and compute that a bisection may leave uneven: which suits a batch best is tried
_TOLERANCES = ((1.08, 0.01), (1.05, 0.02))
_LARGE = 20_000  # compute blocks and pairs of ranks from which one construction has to do
_LENIENT = 3.0  # towards imbalance of a first placement: refining removes most of it


def bisection(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Placement:
    """Construct a few placements by bisection, refine the best; ``block_size`` None chooses one.

    ``tolerance``: compute that the busiest rank may have beyond the mean.
    """
    blocks = choose_blocks(batch, spec, cluster, block_size=block_size)
    state, seconds = empty_state(blocks, cluster)
    if cluster.num_ranks == 1 or not blocks.num_blocks:
        return to_placement(state, blocks)
    best = Best(state, seconds, cluster, strictness=_LENIENT)
    large = len(state.rank) + cluster.num_ranks**2 > _LARGE
    for index, (slack, free) in enumerate(_TOLERANCES[: 1 if large else None]):
        number = len(_TOLERANCES) * seed + index
        construct(state, blocks.sequence, seconds=seconds, slack=slack, free=free, seed=number)
        recount(state)
        improve_owners(state, seconds, cluster, seed=seed)
        best.look()
    best.restore()
    improve(state, seconds, cluster, seed=seed, tolerance=tolerance)
    return to_placement(state, blocks)
