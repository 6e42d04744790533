"""Recursive bisection of the ranks, then local search: the planner's own constructive strategy."""

from __future__ import annotations

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

    Inside one node, where bytes are cheap, equal chunks dealt out by work are one of them.

    ``tolerance``: compute that the busiest rank may have beyond the mean.
    """
    blocks = choose_blocks(batch, spec, cluster, block_size=block_size)
    state, seconds = empty_state(blocks, cluster)
    if cluster.num_ranks == 1 or not blocks.num_blocks:
        return to_placement(state, blocks)
    _construct(state, blocks, seconds, cluster, seed)
    limit, price = TOKEN_LIMIT, 1.0
    if cluster.num_nodes == 1:
        dealt, chunks = _deal(batch, spec, cluster, block_size)
        attention, linear = _layer_seconds(dealt, chunks, seconds, cluster)
        if attention + linear < sum(_layer_seconds(state, blocks, seconds, cluster)):
            blocks, state, limit = chunks, dealt, float(dealt.held.max())
            price = max(linear / max(attention, 1e-12), 1.0)
    improve(
        state,
        seconds,
        cluster,
        seed=seed,
        tolerance=tolerance,
        token_limit=limit,
        token_price=price,
    )
    return to_placement(state, blocks)


def _construct(
    state: State, blocks: BlockTable, seconds: float, cluster: Cluster, seed: int
) -> None:
    """Bring ``state`` to the best of a few bisections: of one, inside a node or where they cost."""
    best = Best(state, seconds, cluster, strictness=_LENIENT)
    one = cluster.num_nodes == 1 or len(state.rank) + cluster.num_ranks**2 > _LARGE
    for index, (slack, free) in enumerate(_TOLERANCES[: 1 if one else None]):
        number = len(_TOLERANCES) * seed + index
        construct(state, blocks.sequence, seconds=seconds, slack=slack, free=free, seed=number)
        recount(state)
        improve_owners(state, seconds, cluster, seed=seed)
        best.look()
    best.restore()


def _deal(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, block_size: int | None
) -> tuple[State, BlockTable]:
    """Equal chunks dealt out by work; every owner computes its own queries."""
    per_rank = chunks_per_rank(batch, cluster.num_ranks, block_size)
    blocks, owner = dispatch(batch, spec, cluster.num_ranks, per_rank=per_rank)
    state, _ = empty_state(blocks, cluster)
    state.owner[:] = owner
    state.rank[:] = owner[state.piece_block[state.pins[:, 0]]]
    recount(state)
    return state, blocks


def _layer_seconds(
    state: State, blocks: BlockTable, seconds: float, cluster: Cluster
) -> tuple[float, float]:
    """What a layer would take, forward and backward: attention, whose transfers hide behind its
    compute, and linear layers on the fullest rank."""
    batch = blocks.batch
    receiving = state.recv.max() / cluster.intra_node_bandwidth
    attention = (1 + cluster.backward_ratio) * max(seconds * state.load.max(), receiving)
    tokens = state.held.max() * batch.num_tokens / cluster.num_ranks
    linear = linear_seconds(tokens, blocks.spec, cluster) * sum(batch.weights.values())
    return float(attention), float(linear)
