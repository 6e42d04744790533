"""Heads x context: USP, LoongTrain's double ring, TransformerEngine's a2a + p2p."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Placement, StrategyError
from dcp.placement.floors import grid_estimate, grid_floor, sequence_areas
from dcp.placement.grids import Grid, head_groups, padding_tokens, place_on_grids

ORDERS = ("head-first", "context-first")


def usp(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
    head_degree: int | None = None,
) -> Placement:
    """Unified sequence parallelism (arXiv 2405.07719): Ulysses inside, a zigzag ring across.

    ``head_degree`` neighbouring ranks of a node share heads; ranks of the same share form a ring.
    None: the divisor of the nodes' sizes, up to the number of heads, with the least estimate.
    """
    grid = _usp(batch, spec, cluster, head_degree)
    return _place(batch, spec, cluster, grid, block_size, {})


def a2a_p2p(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
) -> Placement:
    """TransformerEngine's hierarchy: head all-to-all inside a node, zigzag ring across.

    As in the original, every rank of the all-to-all gets whole KV heads: their number bounds the
    degree, which here need not divide it.
    """
    return _place(batch, spec, cluster, _a2a_p2p(spec, cluster), block_size, {})


def double_ring(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    seed: int = 0,
    head_degree: int | None = None,
    window: int | None = None,
    order: str | None = None,
) -> Placement:
    """LoongTrain (arXiv 2406.18485): heads x context, the context ring cut in inner rings.

    Keys go round an inner ring while the same keys are on their way to the next inner ring, by all
    links between the two. What is None is chosen by estimate.

    Args:
        head_degree: ranks that share a context; divides the number of ranks.
        window: contexts of an inner ring; divides the number of contexts.
        order: ``"head-first"`` (neighbours share a context, the all-to-all stays inside a node) or
            ``"context-first"`` (neighbours form a ring, the all-to-all crosses nodes).

    Raises :class:`StrategyError` for values that do not fit the cluster or the heads.
    """
    grid, order = _double_ring(batch, spec, cluster, head_degree, window, order)
    return _place(batch, spec, cluster, grid, block_size, {"window": grid.window, "order": order})


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """The floor of the grid that the strategy would choose."""
    match name:
        case "usp":
            grid = _usp(batch, spec, cluster, None)
        case "a2a_p2p":
            grid = _a2a_p2p(spec, cluster)
        case _:
            grid, _ = _double_ring(batch, spec, cluster, None, None, None)
    return grid_floor(grid, batch, spec, cluster)


def _usp(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, head_degree: int | None
) -> Grid:
    degrees = _divisors(int(np.gcd.reduce(cluster.node_sizes)), spec.num_heads)
    if head_degree is not None:
        _require("usp", "head_degree", head_degree, degrees)
        degrees = [head_degree]
    grids = [Grid(_cells(cluster.num_ranks, degree, ORDERS[0])) for degree in degrees]
    return _least(grids, batch, spec, cluster)


def _a2a_p2p(spec: AttentionSpec, cluster: Cluster) -> Grid:
    degrees = _divisors(int(np.gcd.reduce(cluster.node_sizes)), spec.num_kv_heads)
    return Grid(_cells(cluster.num_ranks, degrees[-1], ORDERS[0]))


def _double_ring(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    head_degree: int | None,
    window: int | None,
    order: str | None,
) -> tuple[Grid, str]:
    """The grid of least estimate among those that the given values allow, and its order."""
    degrees = _divisors(cluster.num_ranks, spec.num_heads)
    if head_degree is not None:
        _require("double_ring", "head_degree", head_degree, degrees)
        degrees = [head_degree]
    if order is not None:
        _require("double_ring", "order", order, ORDERS)
    made = {
        Grid(_cells(cluster.num_ranks, degree, this), window=inner): this
        for degree in degrees
        for this in (ORDERS if order is None else (order,))
        for inner in _windows(cluster.num_ranks // degree, window)
    }
    grid = _least(made, batch, spec, cluster)
    return grid, made[grid]


def _least(
    grids: Iterable[Grid], batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster
) -> Grid:
    """The grid of least estimate, the first of equal ones."""
    area = sequence_areas(batch).sum() / sum(batch.weights.values())
    tokens = batch.num_tokens
    return min(grids, key=lambda grid: grid_estimate(grid, tokens, area, spec, cluster))


def _windows(num_contexts: int, window: int | None) -> list[int]:
    """Sizes of inner rings: one that fits, or all from a single plain ring down to 2."""
    sizes = _divisors(num_contexts, num_contexts)
    if window is not None:
        _require("double_ring", "window", window, sizes)
        return [window]
    return [size for size in sizes[::-1] if size > 1] or [1]


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]


def _require(strategy: str, name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise StrategyError(f"{strategy}: {name}={value!r} does not fit: choose one of {choices}")


def _cells(num_ranks: int, head_degree: int, order: str) -> np.ndarray:
    """Rank of each (context, column)."""
    ranks = np.arange(num_ranks)
    if order == "head-first":
        return ranks.reshape(-1, head_degree)
    return ranks.reshape(head_degree, -1).T


def _place(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    grid: Grid,
    block_size: int | None,
    notes: dict[str, object],
) -> Placement:
    """All sequences on one grid. The original pads each to twice the contexts, times the heads."""
    degree = grid.num_columns
    chunks = len(grid.chunk_context) * degree
    chosen = {"head_degree": degree, "context_degree": grid.num_contexts}
    return place_on_grids(
        batch,
        spec,
        [grid],
        np.zeros(len(batch.seqlens), dtype=np.int64),
        num_ranks=cluster.num_ranks,
        num_head_groups=head_groups(spec, degree),
        block_size=block_size,
        notes=chosen | notes | {"padding_tokens": padding_tokens(batch.seqlens, chunks)},
    )
