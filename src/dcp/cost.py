"""Seconds of attention work and of transfers: the rates that planning and simulation share."""

from __future__ import annotations

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.kernel_table import BACKWARD_FLOPS, FORWARD_FLOPS, Curves

MODEL_WIDTH = 4096  # hidden size of the 8 B models that context parallelism starts with


def attention_seconds(
    area: np.ndarray | float, spec: AttentionSpec, cluster: Cluster, *, backward: bool = False
) -> np.ndarray | float:
    """Seconds one device needs for ``area`` (query, key) pairs times all query heads, in blocks of
    the best size."""
    if (curves := cluster.curves(spec)) is not None:
        flops, rate = _measured(curves, cluster, backward)
        return area * (flops * spec.num_heads * spec.head_dim / curves.most_flops(backward=rate))
    flops = FORWARD_FLOPS * (cluster.backward_ratio if backward else 1.0)
    # of five products backward, three are as wide as keys: scores, their two gradients
    keys, values = (3, 2) if backward else (1, 1)
    width = (keys * spec.head_dim + values * spec.value_dim) / (keys + values)
    return area * (flops * spec.num_heads * width / cluster.device_flops)


def _measured(curves: Curves, cluster: Cluster, backward: bool) -> tuple[float, bool]:
    """FLOPs per pair, head and width, and whether they run at the backward rate: where none was
    measured, a backward pass is that much longer than the forward one."""
    if backward and curves.trains:
        return BACKWARD_FLOPS, True
    return FORWARD_FLOPS * (cluster.backward_ratio if backward else 1.0), False


def linear_seconds(
    tokens: float, spec: AttentionSpec, cluster: Cluster, *, model_width: int | None = None
) -> float:
    """Forward + backward seconds of a layer's linear parts for ``tokens`` tokens of one device.

    The usual transformer has 12 weights a layer per unit of width and of the rank's own heads, two
    FLOPs a weight forward and four backward. The heads may be one tensor-parallel rank's: unless
    ``model_width`` says how wide the model is, it is taken to be at least :data:`MODEL_WIDTH`.
    """
    own = spec.num_heads * (spec.head_dim + spec.value_dim) / 2
    width = max(own, MODEL_WIDTH) if model_width is None else model_width
    return tokens * 12 * own * width * 6 / (cluster.linear_flops or cluster.device_flops)


def sequence_seconds(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, model_width: int | None = None
) -> np.ndarray:
    """Forward + backward seconds of a layer for each sequence on one device alone: float ``[n]``.

    Where layers have different masks, of the average layer. ``model_width``: see
    :func:`linear_seconds`.
    """
    areas = sum(
        weight * np.array([mask.area for mask in batch.masks[name]], dtype=float)
        for name, weight in batch.weights.items()
    ) / sum(batch.weights.values())
    attention = attention_seconds(areas, spec, cluster)
    attention = attention + attention_seconds(areas, spec, cluster, backward=True)
    return attention + batch.seqlens * linear_seconds(1, spec, cluster, model_width=model_width)


def bound_seconds(
    *,
    max_rank_area: float,
    inter_node_bytes: float,
    max_rank_recv_bytes: float,
    spec: AttentionSpec,
    cluster: Cluster,
) -> float:
    """A forward pass with nothing overlapped: busiest compute + node links + busiest receiver."""
    return float(
        attention_seconds(max_rank_area, spec, cluster)
        + inter_node_bytes / (cluster.num_nodes * cluster.inter_node_bandwidth)
        + max_rank_recv_bytes / cluster.intra_node_bandwidth
    )


KERNEL_TILE = 128  # rows and keys that a device's attention kernel handles at a time


def item_seconds(
    area: np.ndarray,
    q_rows: np.ndarray,
    kv_rows: np.ndarray,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    num_head_groups: int = 1,
    backward: bool = False,
) -> np.ndarray:
    """Seconds of attention items of one head group inside a launch: a roofline.

    Compute counts whole kernel tiles: edges are rounded up, and where the mask cuts an item, half
    a tile is lost along each row of tiles that the cut crosses. Measured rates hold the cost of
    odd sizes already, so with them edges are not rounded; and lines of the cluster's table are of
    cut blocks too, so with them nothing is added. Memory counts each operand once.
    """
    rows = q_rows * (spec.q_token_bytes + spec.out_token_bytes) + kv_rows * spec.kv_token_bytes
    memory = rows * (2.0 if backward else 1.0) / cluster.memory_bandwidth
    if (curves := cluster.curves(spec)) is not None:
        flops, own = _measured(curves, cluster, backward)
        rate = curves.flops(area, q_rows, kv_rows, backward=own)
        products = area * (flops * spec.num_heads * spec.head_dim) / rate
        measured: np.ndarray = np.maximum(products, memory) / num_head_groups
        return measured
    tile = cluster.kernel_tile
    cut = area < q_rows * kv_rows
    if not cluster.kernel_rates:
        q_rows_run, kv_rows_run = (-(-rows // tile) * tile for rows in (q_rows, kv_rows))
    else:
        q_rows_run, kv_rows_run = q_rows, kv_rows
    whole = q_rows_run * kv_rows_run
    pairs = np.where(cut, area + np.minimum(q_rows_run, kv_rows_run) * tile / 2, whole)
    products = attention_seconds(np.minimum(pairs, whole), spec, cluster, backward=backward)
    if cluster.kernel_rates:
        sides, rates = np.array(cluster.kernel_rates).T
        rate = np.interp(np.log(np.maximum(q_rows * kv_rows, 1)) / 2, np.log(sides), rates)
        products = products * cluster.device_flops / rate
    seconds: np.ndarray = np.maximum(products, memory) / num_head_groups
    return seconds


def division_seconds(
    division: np.ndarray, num_divisions: int, seconds: np.ndarray, cluster: Cluster
) -> np.ndarray:
    """Seconds of every division, ``[num_divisions]``: one launch and its items.

    Args:
        division: which one each item belongs to.
        seconds: of each item, see :func:`item_seconds`.
    """
    total = np.bincount(division, weights=seconds, minlength=num_divisions)
    launched = np.bincount(division, minlength=num_divisions) > 0
    every: np.ndarray = total + launched * cluster.launch_seconds
    return every
