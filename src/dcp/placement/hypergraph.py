"""Hypergraph partitioning: compute blocks and data blocks are vertices, what they share the nets.

A net joins a piece (one data block's queries and partial outputs, or its keys and values) with the
compute blocks that need it, and weighs the bytes that every further rank costs. Mt-KaHyPar cuts
the vertices over the nodes, then each node's share over its devices. It balances one weight per
vertex: its seconds of a layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Goal, Placement, StrategyError
from dcp.placement.improve import DEFAULT, choose_blocks, finish, improve
from dcp.placement.refine import LINEAR, State
from dcp.placement.state import empty_state, recount, to_placement

_SCALE = 10_000  # vertex weight of a rank's share: Mt-KaHyPar counts in integers
_TOLERANCE = 0.03  # that the partitioner is given; the local search removes it
_MAX_TILES = 6_000  # more are made only where tokens need them
_TOO_MANY = 50_000  # compute blocks that would take a quarter of a minute


def hypergraph(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
    goal: Goal = DEFAULT,
) -> Placement:
    """Partition the batch's hypergraph, then refine; ``block_size`` None chooses one.

    Raises :class:`StrategyError` where the hypergraph is too large for a partitioner, or there is
    no partitioner.
    """
    _partitioner()
    blocks = choose_blocks(batch, spec, cluster, block_size=block_size, max_tiles=_MAX_TILES)
    if blocks.num_compute_blocks > _TOO_MANY:
        raise StrategyError(
            f"hypergraph: {blocks.num_compute_blocks} compute blocks are too many to partition in "
            f"seconds (at most {_TOO_MANY}): give a larger block_size or use bisection"
        )
    state, seconds = empty_state(blocks, cluster, model_width=goal.model_width)
    if cluster.num_ranks == 1 or not blocks.num_blocks:
        return to_placement(state, blocks)
    _partition(state, cluster, seed, goal.tolerance or _TOLERANCE)
    recount(state)
    improve(state, seconds, cluster, seed=seed, goal=goal)
    return finish(to_placement(state, blocks), cluster, seed=seed, goal=goal)


@cache
def _partitioner() -> tuple[Any, Any]:
    """Mt-KaHyPar's module, and the library started once per process with one thread."""
    try:
        import mtkahypar
    except ImportError as error:
        raise StrategyError(
            f"hypergraph: no partitioner ({error}): pip install mtkahypar, or use bisection"
        ) from None
    return mtkahypar, mtkahypar.initialize(1)


def _partition(state: State, cluster: Cluster, seed: int, tolerance: float) -> None:
    """Set every rank and owner: nodes first, then devices inside each node."""
    num_compute, num_blocks = len(state.rank), len(state.owner)
    vertices = np.arange(num_compute + num_blocks)
    node = _cut(state, vertices, cluster.node_sizes, seed, tolerance)
    first = np.concatenate([[0], np.cumsum(cluster.node_sizes)])
    place = np.zeros(len(vertices), dtype=np.int64)
    for index, size in enumerate(cluster.node_sizes.tolist()):
        inside = np.flatnonzero(node == index)
        devices = np.ones(size, dtype=np.int64)
        place[inside] = first[index] + _cut(state, inside, devices, seed, tolerance)
    state.rank[:] = place[:num_compute]
    state.owner[:] = place[num_compute:]


def _cut(
    state: State, vertices: np.ndarray, sizes: np.ndarray, seed: int, tolerance: float
) -> np.ndarray:
    """Part of each vertex (compute blocks, then data blocks), parts in proportion to ``sizes``."""
    parts = len(sizes)
    if parts == 1 or len(vertices) <= 1:
        return np.zeros(len(vertices), dtype=np.int64)
    share = np.concatenate([state.work, state.price[LINEAR] * state.tokens])[vertices]
    # every vertex weighs something: the library mistreats weightless ones
    weight = np.maximum(np.rint(share * _SCALE), 1).astype(np.int64)
    nets, net_weight = _nets(state, vertices)
    mtkahypar, library = _partitioner()
    context = library.context_from_preset(mtkahypar.PresetType.DETERMINISTIC)
    context.set_partitioning_parameters(parts, tolerance, mtkahypar.Objective.KM1)
    context.logging = False
    if (sizes != sizes[0]).any():
        limit = np.ceil(weight.sum() * (1 + tolerance) * sizes / sizes.sum())
        context.set_individual_target_block_weights(limit.astype(np.int64).tolist())
    mtkahypar.set_seed(seed)
    graph = library.create_hypergraph(
        context, len(vertices), len(nets), nets, weight.tolist(), net_weight.tolist()
    )
    partition = graph.partition(context)
    return np.array(partition.get_partition(), dtype=np.int64)


def _nets(state: State, vertices: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """Nets of two pins or more among ``vertices``, in their own numbers, and their weights."""
    num_compute = len(state.rank)
    local = np.full(num_compute + len(state.owner), -1)
    local[vertices] = np.arange(len(vertices))
    pieces = np.arange(len(state.piece_block))
    piece = np.concatenate([state.pins[:, 0], state.pins[:, 1], pieces])
    vertex = np.concatenate(
        [np.arange(num_compute), np.arange(num_compute), num_compute + state.piece_block]
    )
    piece, vertex = piece[local[vertex] >= 0], local[vertex][local[vertex] >= 0]
    order = np.argsort(piece, kind="stable")
    members = np.split(vertex[order], np.cumsum(np.bincount(piece, minlength=len(pieces)))[:-1])
    used = [index for index, net in enumerate(members) if len(net) > 1]
    size = (state.in_bytes + state.out_bytes)[used]
    size = np.rint(size * (1000 / max(size.max(initial=0.0), 1e-9)))
    return [members[index].tolist() for index in used], np.maximum(size, 1).astype(np.int64)
