"""A context-parallel degree for each sequence: every one rings in a group of its own size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.placement import Placement
from dcp.placement.floors import area_seconds, sequence_areas
from dcp.placement.grids import Grid, place_on_grids
from dcp.ragged import starts

SLACK = 1.05  # towards a perfectly even load, when a target is chosen
MEMORY = 2.0  # most tokens of a rank, in mean ranks' tokens


@dataclass(frozen=True)
class Group:
    """``degree`` ranks in a row, from ``first`` on."""

    first: int
    degree: int

    @property
    def ranks(self) -> slice:
        return slice(self.first, self.first + self.degree)


def groups(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """Megatron's dynamic context parallelism: power-of-two degrees, the least that fits a rank.

    A sequence gets the smallest power of two that leaves no rank more of its tokens than the mean
    rank holds, and goes, most work first, to the aligned group with the least ``s^2 / degree``.
    """
    return _place(batch, spec, cluster, _megatron(batch, spec, cluster), block_size)


def flexible_groups(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """FlexSP-like (arXiv 2412.01523): the ranks are cut in groups of any sizes, for this batch.

    The original solves a mixed-integer program; here the shortest time is found for which packing
    the sequences, longest first, into groups just large enough needs no more ranks than there are,
    and no rank holds more than twice the mean rank's tokens.
    """
    return _place(batch, spec, cluster, _flexible(batch, spec, cluster), block_size)


def data_centric(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, *, block_size: int | None = None
) -> Placement:
    """Data-centric parallelism inside a batch (VideoSys): degrees that even out predicted times.

    Each sequence gets the power of two, inside a node where it fits, whose predicted time comes
    nearest to the batch's mean per rank; groups are laid out by descending degree.
    """
    return _place(batch, spec, cluster, _data_centric(batch, spec, cluster), block_size)


def floor_seconds(name: str, batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> float:
    """The mean rank of the busiest group: what is computed only by ranks inside it."""
    rules = {"groups": _megatron, "flexible_groups": _flexible, "data_centric": _data_centric}
    group_of = rules[name](batch, spec, cluster)
    first = np.array([group.first for group in group_of])
    end = np.array([group.first + group.degree for group in group_of])
    areas = sequence_areas(batch)
    busiest = 0.0
    for group in set(group_of):
        inside = (first >= group.first) & (end <= group.first + group.degree)
        busiest = max(busiest, float((areas * inside).sum()) / group.degree)
    return area_seconds(busiest, spec, cluster)


# --------------------------------------------------------------------------- the three rules


def _megatron(batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> list[Group]:
    most = max(-(-batch.num_tokens // cluster.num_ranks), 1)
    powers = _powers_of_two(cluster.num_ranks)
    degrees = [
        next((power for power in powers if seqlen <= power * most), powers[-1])
        for seqlen in batch.seqlens.tolist()
    ]
    return _deal(degrees, batch.seqlens.astype(float) ** 2, cluster)


def _data_centric(batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> list[Group]:
    areas, seconds = sequence_areas(batch), _ring_seconds(batch, spec, cluster)
    powers = _powers_of_two(cluster.num_ranks)
    inside = sum(power <= cluster.node_sizes.max() for power in powers)
    target = SLACK * area_seconds(areas.sum() / cluster.num_ranks, spec, cluster)
    degrees = []
    for times in seconds[:, np.array(powers) - 1]:
        fits = inside if times[:inside].min() <= 2 * target else len(powers)
        degrees.append(powers[int(np.abs(times[:fits] - target).argmin())])
    return _deal(degrees, areas, cluster)


def _flexible(batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> list[Group]:
    """Bisection on the logarithm of the time that every group must keep to."""
    areas, seconds = sequence_areas(batch), _ring_seconds(batch, spec, cluster)
    low = area_seconds(areas.sum() / cluster.num_ranks, spec, cluster)
    high = seconds[:, 0].sum()
    best = [Group(0, cluster.num_ranks)] * len(areas)
    for _ in range(12):
        middle = (low * high) ** 0.5
        found = _pack(batch.seqlens, seconds, middle, cluster.num_ranks)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _pack(
    seqlens: np.ndarray, seconds: np.ndarray, target: float, num_ranks: int
) -> list[Group] | None:
    """Each sequence in the fullest group that can still take it, or in a new one; None: no room."""
    most = max(MEMORY * seqlens.sum() / num_ranks, 1)
    degree = np.zeros(num_ranks, dtype=np.int64)  # of each group made
    filled, held = np.zeros((2, num_ranks))  # its seconds and tokens
    made = 0
    place_of = np.zeros(len(seqlens), dtype=np.int64)
    for index in np.argsort(-seconds[:, 0], kind="stable").tolist():
        so_far = slice(0, made)
        then = filled[so_far] + seconds[index, degree[so_far] - 1]
        fits = (then <= target) & (held[so_far] + seqlens[index] <= most * degree[so_far])
        if fits.any():
            place = int(np.where(fits, then, -1.0).argmax())
        else:
            free = np.arange(1, num_ranks - degree.sum() + 1)
            enough = (seconds[index, free - 1] <= target) & (seqlens[index] <= most * free)
            if not enough.any():
                return None
            place, made = made, made + 1
            degree[place] = free[enough.argmax()]
        filled[place] += seconds[index, degree[place] - 1]
        held[place] += seqlens[index]
        place_of[index] = place
    first = starts(degree)
    return [Group(int(first[place]), int(degree[place])) for place in place_of]


# --------------------------------------------------------------------------- what they share


def _deal(degrees: Sequence[int], work: np.ndarray, cluster: Cluster) -> list[Group]:
    """Largest degree first, then most work: to the aligned group whose busiest rank has least."""
    load = np.zeros(cluster.num_ranks)
    group_of = [Group(0, 1)] * len(degrees)
    for index in np.lexsort((-work, -np.asarray(degrees, dtype=np.int64))).tolist():
        degree = degrees[index]
        aligned = load[: cluster.num_ranks // degree * degree].reshape(-1, degree)
        group = Group(int(aligned.max(axis=1).argmin()) * degree, degree)
        load[group.ranks] += work[index] / degree
        group_of[index] = group
    return group_of


def _ring_seconds(batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster) -> np.ndarray:
    """Predicted seconds of every sequence on a ring of every degree (from 1 on, ``[n, N]``): the
    slower of compute and links."""
    degree = np.arange(1, cluster.num_ranks + 1)
    compute = area_seconds(1.0, spec, cluster) * sequence_areas(batch)
    weight = 3.0 * sum(batch.weights.values())  # forward, backward, and gradients on their way
    moved = weight * spec.kv_token_bytes * batch.seqlens
    inside = degree <= cluster.node_sizes.max()
    rate = np.where(inside, cluster.intra_node_bandwidth, cluster.inter_node_bandwidth)
    return np.maximum(compute[:, None] / degree, moved[:, None] * ((degree - 1) / degree / rate))


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _place(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    group_of: list[Group],
    block_size: int | None,
) -> Placement:
    """Every sequence in zigzag over its group; originals pad each to twice its degree."""
    distinct = sorted(set(group_of), key=lambda group: (group.first, group.degree))
    grids = [Grid(np.arange(cluster.num_ranks)[g.ranks][:, None]) for g in distinct]
    index_of = {group: index for index, group in enumerate(distinct)}
    degrees = np.array([group.degree for group in group_of], dtype=np.int64)
    padding = (-batch.seqlens % (2 * degrees)) * (degrees > 1)
    sizes, counts = np.unique(degrees, return_counts=True)
    return place_on_grids(
        batch,
        spec,
        grids or [Grid(np.zeros((1, 1), dtype=np.int64))],
        np.array([index_of[group] for group in group_of], dtype=np.int64),
        num_ranks=cluster.num_ranks,
        block_size=block_size,
        notes={
            "degrees": {str(d): int(n) for d, n in zip(sizes, counts, strict=True)},
            "padding_tokens": int(padding.sum()),
        },
    )
