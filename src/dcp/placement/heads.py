"""Head parallelism, alone (Ulysses) or with rings across (USP, the double ring, a2a + p2p)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Placement, StrategyError
from dcp.placement.floors import grid_estimate, grid_floor, sequence_areas
from dcp.placement.grids import Grid, padding_tokens, place_on_grid

ORDERS = ("head-first", "context-first")


def ulysses(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
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
    notes = {"head_degree": num_ranks, "padding_tokens": -batch.num_tokens % num_ranks}
    return place_on_grid(batch, spec, _ulysses(cluster), block_size=block_size, notes=notes)


def usp(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    head_degree: int | None = None,
) -> Placement:
    """Unified sequence parallelism (arXiv 2405.07719): Ulysses inside, a zigzag ring across.

    ``head_degree`` neighbouring ranks of a node share heads; ranks of the same share form a ring.
    None: the divisor of the nodes' sizes, up to the number of heads, with the least estimate.
    """
    return _place(batch, spec, _usp(batch, spec, cluster, head_degree), block_size)


def a2a_p2p(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """TransformerEngine's hierarchy: head all-to-all inside a node, zigzag ring across.

    As in the original, every rank of the all-to-all gets whole KV heads: their number bounds the
    degree, which here need not divide it.
    """
    return _place(batch, spec, _a2a_p2p(spec, cluster), block_size)


def double_ring(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
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
    return _place(batch, spec, grid, block_size, window=grid.window, order=order)


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """The floor of the grid that the strategy would choose; 0 where Ulysses lacks heads."""
    match name:
        case "ulysses" if cluster.num_ranks > spec.num_heads:
            return 0.0
        case "ulysses":
            grid = _ulysses(cluster)
        case "usp":
            grid = _usp(batch, spec, cluster, None)
        case "a2a_p2p":
            grid = _a2a_p2p(spec, cluster)
        case _:
            grid, _ = _double_ring(batch, spec, cluster, None, None, None)
    return grid_floor(grid, batch, spec, cluster)


def _ulysses(cluster: Cluster) -> Grid:
    return Grid(np.arange(cluster.num_ranks)[None, :])


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
    grid: Grid,
    block_size: int | None,
    **notes: object,
) -> Placement:
    """All sequences on one grid. The original pads each to twice the contexts, times the heads."""
    padding = padding_tokens(batch.seqlens, len(grid.chunk_context) * grid.num_columns)
    chosen = {"head_degree": grid.num_columns, "context_degree": grid.num_contexts}
    notes = chosen | notes | {"padding_tokens": padding}
    return place_on_grid(batch, spec, grid, block_size=block_size, notes=notes)
