"""Seconds that fixed rules cannot beat on a cluster: what must be computed, what must be moved."""

from __future__ import annotations

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.cost import attention_seconds
from dcp.placement.grids import Grid, column_of_group, head_groups
from dcp.slices import HI, slice_area


def sequence_areas(batch: SequenceBatch) -> np.ndarray:
    """(query, key) pairs of each sequence over the weighted masks, ``[num_sequences]``."""
    total = np.zeros(len(batch.seqlens))
    for name, weight in batch.weights.items():
        sequence, bands = batch.local_bands(name)
        total += weight * np.bincount(sequence, weights=slice_area(bands), minlength=len(total))
    return total


def compute_floor(batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """Forward and backward seconds of the mean rank's attention, nothing moved."""
    return area_seconds(sequence_areas(batch).sum() / cluster.num_ranks, spec, cluster)


def area_seconds(area: float, spec: AttentionSpec, cluster: Cluster) -> float:
    """Forward and backward seconds of ``area`` pairs, all heads, on one device."""
    passes = [attention_seconds(area, spec, cluster, backward=b) for b in (False, True)]
    return float(sum(passes))


def link_seconds(
    source: np.ndarray, target: np.ndarray, volume: np.ndarray, cluster: Cluster
) -> float:
    """Seconds until the busiest link has carried ``volume`` bytes of each flow."""
    node = cluster.node_of_rank
    crosses = node[source] != node[target]
    into_rank = np.bincount(target[~crosses], weights=volume[~crosses], minlength=1)
    into_node = np.bincount(node[target[crosses]], weights=volume[crosses], minlength=1)
    into_card = np.bincount(target[crosses], weights=volume[crosses], minlength=1)
    return float(
        max(
            into_rank.max() / cluster.intra_node_bandwidth,
            into_card.max() / cluster.device_network_bandwidth,
            into_node.max() / cluster.inter_node_bandwidth,
        )
    )


def column_shares(grid: Grid, spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
    """Of each column: its share of the query heads; bytes of one token's keys and values there."""
    groups = head_groups(spec, grid.num_columns)
    kv_groups = min(groups, spec.num_kv_heads)
    column = column_of_group(groups, grid.num_columns)
    heads = np.bincount(column, minlength=grid.num_columns) / groups
    pairs = np.unique(column * kv_groups + np.arange(groups) * kv_groups // groups)
    distinct = np.bincount(pairs // kv_groups, minlength=grid.num_columns)
    return heads, distinct * (spec.kv_token_bytes // kv_groups)


def ring_flows(grid: Grid, spec: AttentionSpec, *, on: bool) -> tuple[np.ndarray, ...]:
    """Source, target and bytes per token of one turn of the inner rings, or on to the next ones."""
    context = np.arange(grid.num_contexts)
    source, target = grid.cells[grid.before(context, outer=on)], grid.cells
    volume = np.broadcast_to(column_shares(grid, spec)[1], target.shape)
    moves = source != target
    return source[moves], target[moves], volume[moves]


def column_flows(grid: Grid, volume: np.ndarray) -> tuple[np.ndarray, ...]:
    """The all-to-all inside every context, ``volume`` bytes (of each column) per context token."""
    shape = (*grid.cells.shape, grid.num_columns)
    source = np.broadcast_to(grid.cells[:, None, :], shape)
    target = np.broadcast_to(grid.cells[:, :, None], shape)
    share = np.broadcast_to(volume[:, None] / grid.num_columns, shape)
    moves = source != target
    return source[moves], target[moves], share[moves]


def grid_floor(grid: Grid, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """What a whole batch on one grid needs: the busiest column's compute or the busiest link.

    Keys and values go all the way in either pass. Their gradients do too where every context uses
    them, as a plain zigzag's do for the first half of a causal sequence.
    """
    contexts, window = grid.num_contexts, grid.window or grid.num_contexts
    rounds = contexts // window
    flows = [ring_flows(grid, spec, on=on) for on in (False, True)]
    turns = np.repeat([rounds * (window - 1), rounds - 1], [len(flow[0]) for flow in flows])
    source, target, volume = (np.concatenate(parts) for parts in zip(*flows, strict=True))
    tokens = max(batch.num_tokens // contexts - 2, 0)
    once = link_seconds(source, target, volume * turns * tokens, cluster)
    passes = 2.0 * sum(batch.weights.values())
    if grid.zigzag and rounds == 1 and contexts > 2:
        share = _causal_share(batch, contexts) / 2 * (contexts - 2) / (contexts - 1)
        passes += share * gradient_ratio(contexts, spec)
    busiest = column_shares(grid, spec)[0].max() * grid.num_columns
    return float(max(busiest * compute_floor(batch, spec, cluster), passes * once))


def gradient_ratio(contexts: int, spec: AttentionSpec) -> float:
    """Bytes of a ring's partial gradients to those of its keys and values: they are summed on the
    way in full precision, unless each goes straight to its owner."""
    return spec.exact_bytes / spec.dtype_bytes if contexts > 2 else 1.0


def _causal_share(batch: SequenceBatch, contexts: int) -> float:
    """Weighted share of the tokens whose first-half keys every context of a zigzag uses.

    Those of sequences that are causal or full as a whole; a chunk's odd token is left out.
    """
    share = 0.0
    for name, weight in batch.weights.items():
        seqlens = batch.seqlens[_at_least_causal(batch, name)]
        share += weight * float(np.maximum(seqlens - 2 * contexts, 0).sum())
    return share / max(batch.num_tokens, 1)


def last_chunk_area(batch: SequenceBatch, num_chunks: int) -> float:
    """Weighted pairs of the last chunks of all sequences that are causal or full as a whole."""
    area = 0.0
    for name, weight in batch.weights.items():
        seqlens = batch.seqlens[_at_least_causal(batch, name)]
        rows = seqlens // num_chunks
        area += weight * float((rows * seqlens - rows * (rows - 1) // 2).sum())
    return area


def _at_least_causal(batch: SequenceBatch, name: str) -> np.ndarray:
    """Which sequences let every query see all keys before it, as causal and full masks do."""

    sequence, bands = batch.local_bands(name)
    alone = (np.bincount(sequence, minlength=len(batch.seqlens)) == 1)[sequence]
    seqlen, none = batch.seqlens[sequence], np.zeros(len(bands), dtype=np.int64)
    whole = np.stack([none, seqlen, none, seqlen, 1 - seqlen], axis=1)
    sees_all = np.zeros(len(batch.seqlens), dtype=bool)
    sees_all[sequence] = alone & (bands[:, :HI] == whole).all(axis=1) & (bands[:, HI] >= 0)
    return sees_all


def grid_estimate(
    grid: Grid, num_tokens: int, area: float, spec: AttentionSpec, cluster: Cluster
) -> float:
    """Predicted forward and backward seconds, in closed form: what a choice of grid is made by.

    Steps of equal compute, each under the transfers of the next; the all-to-alls stand alone.
    ``area`` is the (query, key) pairs of the whole batch under one mask.
    """
    contexts, window = grid.num_contexts, grid.window or grid.num_contexts
    rounds, tokens = contexts // window, num_tokens / contexts
    heads, kv_bytes = column_shares(grid, spec)
    inner, on = (ring_flows(grid, spec, on=on) for on in (False, True))
    both = tuple(np.concatenate(parts) for parts in zip(inner, on, strict=True))
    spread = np.repeat([1.0, 1.0 / window], [len(inner[0]), len(on[0])])
    turn = link_seconds(both[0], both[1], both[2] * spread * tokens, cluster)
    last = link_seconds(on[0], on[1], on[2] / window * tokens, cluster) if rounds > 1 else 0.0
    enter = column_flows(grid, heads * spec.q_token_bytes + kv_bytes)
    leave = column_flows(grid, heads * spec.out_token_bytes)
    around = sum(link_seconds(a, b, v * tokens, cluster) for a, b, v in (enter, leave))

    of_busiest = area * heads.max() * grid.num_columns / cluster.num_ranks
    total = 0.0
    for backward, volume in ((False, 1.0), (True, 1.0 + gradient_ratio(contexts, spec))):
        compute = float(attention_seconds(of_busiest, spec, cluster, backward=backward))
        step = compute / contexts + cluster.launch_seconds
        total += rounds * (window - 1) * max(step, volume * turn)
        total += (rounds - 1) * max(step, volume * last) + step + (1 + backward) * around
    return total
