"""Recursive bisection of the ranks, then local search: the planner's own constructive strategy."""

from __future__ import annotations

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable
from dcp.cluster import Cluster
from dcp.placement import Goal, Placement
from dcp.placement.construct import construct
from dcp.placement.improve import DEFAULT, Best, choose_blocks, improve, improve_owners
from dcp.placement.refine import State
from dcp.placement.state import empty_state, recount, to_placement

# compute that a bisection may leave uneven: which suits a batch best is tried
_FREE = (0.01, 0.02)
_SLACK = 1.05
_LARGE = 20_000  # compute blocks and pairs of ranks from which one construction has to do


def bisection(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
    goal: Goal = DEFAULT,
) -> Placement:
    """Construct a few placements by bisection, refine the best; ``block_size`` None chooses one.

    Inside one node, where bytes are cheap, equal chunks dealt out by work are one of them.
    """
    blocks = choose_blocks(batch, spec, cluster, block_size=block_size)
    state, seconds = empty_state(blocks, cluster, model_width=goal.model_width)
    if cluster.num_ranks == 1 or not blocks.num_blocks:
        return to_placement(state, blocks)
    _construct(state, blocks, seconds, cluster, seed, goal)
    improve(state, seconds, cluster, seed=seed, goal=goal)
    return to_placement(state, blocks)


def _construct(
    state: State, blocks: BlockTable, seconds: float, cluster: Cluster, seed: int, goal: Goal
) -> None:
    """Bring ``state`` to the best of a few bisections: of one, inside a node or where they cost."""
    best = Best(state, seconds, goal=goal, lenient=True)
    one = cluster.num_nodes == 1 or len(state.rank) + cluster.num_ranks**2 > _LARGE
    slack = _SLACK
    for index, free in enumerate(_FREE[: 1 if one else None]):
        number = len(_FREE) * seed + index
        construct(state, blocks.sequence, seconds=seconds, slack=slack, free=free, seed=number)
        recount(state)
        improve_owners(state, seconds, seed=seed, goal=goal)
        best.look()
    best.restore()
