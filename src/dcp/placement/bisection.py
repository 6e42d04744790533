"""Recursive bisection of the ranks, then local search: the planner's own constructive strategy."""

from __future__ import annotations

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable
from dcp.cluster import Cluster
from dcp.cost import linear_seconds
from dcp.placement import Placement
from dcp.placement.construct import construct
from dcp.placement.dispatch import chunks_per_rank, dispatch
from dcp.placement.improve import (
    TOKEN_LIMIT,
    TOLERANCE,
    Best,
    choose_blocks,
    improve,
    improve_owners,
)
from dcp.placement.refine import State
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

    Inside one node, where bytes are cheap, equal chunks dealt out by work are one more start.

    ``tolerance``: compute that the busiest rank may have beyond the mean.
    """
    blocks = choose_blocks(batch, spec, cluster, block_size=block_size)
    state, seconds = empty_state(blocks, cluster)
    if cluster.num_ranks == 1 or not blocks.num_blocks:
        return to_placement(state, blocks)
    token_limit = TOKEN_LIMIT
    first = _construct(state, blocks, seconds, cluster, seed)
    if cluster.num_nodes == 1:
        per_rank = chunks_per_rank(batch, cluster.num_ranks, block_size)
        chunks, owner = dispatch(batch, spec, cluster.num_ranks, per_rank=per_rank)
        dealt = _deal(chunks, owner, seconds, cluster)
        if _layer_seconds(dealt, chunks) < _layer_seconds(first, blocks):
            blocks, state, token_limit = chunks, dealt.state, float(dealt.state.held.max())
    improve(state, seconds, cluster, seed=seed, tolerance=tolerance, token_limit=token_limit)
    return to_placement(state, blocks)


def _construct(
    state: State, blocks: BlockTable, seconds: float, cluster: Cluster, seed: int
) -> Best:
    """The best of a few bisections, which ``state`` then holds."""
    best = Best(state, seconds, cluster, strictness=_LENIENT)
    large = len(state.rank) + cluster.num_ranks**2 > _LARGE
    for index, (slack, free) in enumerate(_TOLERANCES[: 1 if large else None]):
        number = len(_TOLERANCES) * seed + index
        construct(state, blocks.sequence, seconds=seconds, slack=slack, free=free, seed=number)
        recount(state)
        improve_owners(state, seconds, cluster, seed=seed)
        best.look()
    best.restore()
    return best


def _deal(blocks: BlockTable, owner: np.ndarray, seconds: float, cluster: Cluster) -> Best:
    """A state in which every owner computes its own queries."""
    state, _ = empty_state(blocks, cluster)
    state.owner[:] = owner
    state.rank[:] = owner[state.piece_block[state.pins[:, 0]]]
    recount(state)
    best = Best(state, seconds, cluster, strictness=_LENIENT)
    best.look()
    return best


def _layer_seconds(best: Best, blocks: BlockTable) -> float:
    """What a layer would take, forward and backward, with linear layers on the fullest rank."""
    batch, cluster = blocks.batch, best.cluster
    tokens = best.state.held.max() * batch.num_tokens / cluster.num_ranks
    linear = linear_seconds(tokens, blocks.spec, cluster) * sum(batch.weights.values())
    return float((1 + cluster.backward_ratio) * best.score + linear)
