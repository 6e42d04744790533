"""Recursive bisection of the ranks, then local search: the planner's own constructive strategy."""

from __future__ import annotations

import numpy as np
from numba import njit

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable
from dcp.cluster import Cluster
from dcp.placement import Goal, Placement
from dcp.placement.construct import construct
from dcp.placement.dispatch import chunks_per_rank, dispatch
from dcp.placement.improve import (
    DEFAULT,
    Best,
    choose_blocks,
    estimate,
    finish,
    improve,
    improve_owners,
)
from dcp.placement.refine import FAR, NEAR, State
from dcp.placement.state import empty_state, recount, to_placement

# by variant: compute that a bisection may leave uneven, and tokens of a half over its share
_VARIANTS = ((0.01, 1.05), (0.03, 1.05), (0.02, 1.1), (0.01, 1.08), (0.04, 1.08))
_LARGE = 20_000  # compute blocks and pairs of ranks from which one start has to do
_SEEDS = 1000  # apart, of the variants
_CLEARLY = 3.0  # fewer bytes: keys may be fetched for several rows at once


def bisection(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
    goal: Goal = DEFAULT,
) -> Placement:
    """Construct a placement by bisection, refine it; ``block_size`` None chooses one.

    It may start from equal runs of tokens instead or, inside one node, where bytes are cheap, from
    equal chunks dealt out by work.
    """
    blocks = choose_blocks(batch, spec, cluster, block_size=block_size)
    state, seconds = empty_state(blocks, cluster, model_width=goal.model_width)
    if cluster.num_ranks == 1 or not blocks.num_blocks:
        return to_placement(state, blocks)
    seed += goal.variant * _SEEDS
    _construct(state, blocks, seconds, seed, goal)
    if cluster.num_nodes == 1 and goal.variant % 2 == 0:
        chunks, dealt, dealt_seconds = _deal(batch, spec, cluster, block_size, goal)
        if estimate(dealt, dealt_seconds, goal) < estimate(state, seconds, goal):
            blocks, state, seconds = chunks, dealt, dealt_seconds
    improve(state, seconds, cluster, seed=seed, goal=goal)
    return finish(to_placement(state, blocks), cluster, seed=seed, goal=goal)


def _construct(state: State, blocks: BlockTable, seconds: float, seed: int, goal: Goal) -> None:
    """Bring ``state`` to the better of a bisection and of equal runs of tokens."""
    best = Best(state, seconds, goal=goal, lenient=True)
    free, slack = _VARIANTS[goal.variant % len(_VARIANTS)]
    construct(state, blocks.sequence, seconds=seconds, slack=slack, free=free, seed=seed)
    large = len(state.rank) + len(state.load) ** 2 > _LARGE
    for start in (None,) if large else (None, in_a_row):
        if start is not None:
            start(state)
        recount(state)
        improve_owners(state, seconds, seed=seed, goal=goal)
        best.look()
    best.restore()


def _deal(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    block_size: int | None,
    goal: Goal,
) -> tuple[BlockTable, State, float]:
    """Equal chunks dealt out by work; every owner computes its own queries."""
    per_rank = chunks_per_rank(batch, cluster.num_ranks, block_size)
    blocks, owner = dispatch(batch, spec, cluster.num_ranks, per_rank=per_rank)
    state, seconds = empty_state(blocks, cluster, model_width=goal.model_width)
    state.owner[:] = owner
    state.rank[:] = owner[state.piece_block[state.pins[:, 0]]]
    recount(state)
    return blocks, state, seconds


def in_a_row(state: State) -> None:
    """Give ranks equal runs of tokens, one after the other; uncounted.

    Queries are computed where they are, and their keys fetched, which costs next to nothing where
    a mask has a short reach; unless it costs less that they visit the owners of their keys.
    """
    middle = np.cumsum(state.tokens) - state.tokens / 2
    ends = np.cumsum(1 / state.slow)[:-1]
    state.owner[:] = np.searchsorted(ends, middle, side="right")
    state.rank[:] = state.owner[state.piece_block[state.pins[:, 0]]]
    _visit(state)


@njit(cache=True)
def _visit(s: State) -> None:
    """Run each row of compute blocks at the owners of its keys if fewer bytes move then."""
    near, far = s.price[NEAR], s.price[FAR]
    seen = np.full(len(s.load), -1)
    met = np.full(s.present.shape[1], -1)
    for piece in range(len(s.piece_block)):
        if s.out_bytes[piece] == 0.0:
            continue
        home = s.owner[s.piece_block[piece]]
        fetching = visiting = 0.0
        for i in range(s.member_start[piece], s.member_start[piece + 1]):
            key = s.pins[s.members[i], 1]
            r = s.owner[s.piece_block[key]]
            if r == home:
                continue
            inside = s.node[r] == s.node[home]
            fetching += s.in_bytes[key] * (near if inside else far)
            if seen[r] != piece:
                seen[r] = piece
                first = not inside and met[s.node[r]] != piece
                met[s.node[r]] = piece
                size = s.in_bytes[piece] + s.out_bytes[piece]
                visiting += size * (far if first else near)
        if _CLEARLY * visiting < fetching:
            for i in range(s.member_start[piece], s.member_start[piece + 1]):
                v = s.members[i]
                s.rank[v] = s.owner[s.piece_block[s.pins[v, 1]]]
