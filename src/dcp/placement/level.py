"""Cuts where they help: edges between neighbouring blocks move until all ranks hold their share.

Where two neighbouring data blocks of a sequence belong to two ranks, the edge between them can
carry tokens from one rank to the other. So surplus flows over such edges, through other ranks if
need be, to where tokens lack.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dcp.blocks import BlockTable, build_blocks
from dcp.cluster import Cluster
from dcp.placement import Placement
from dcp.ragged import split

MULTIPLE = 64  # tokens by which edges move: odd lengths cost kernel tiles


def level(placement: Placement, cluster: Cluster, *, multiple: int = MULTIPLE) -> Placement:
    """The same owners and ranks over blocks whose edges have moved; the same placement where
    nothing can or need move."""
    blocks, owner = placement.blocks, placement.owner
    length = blocks.length.copy()
    same = blocks.sequence[1:] == blocks.sequence[:-1]
    edges = np.flatnonzero(same & (owner[1:] != owner[:-1]))
    least = np.minimum(length, np.maximum(length // 2, multiple))
    held = np.bincount(owner, weights=length, minlength=cluster.num_ranks).astype(np.int64)
    speed = cluster.speed_of_rank
    wanted = length.sum() * (speed / speed.sum())
    if not len(edges) or not _flow(length, least, owner, edges, held, wanted, multiple):
        return placement
    counts = np.bincount(blocks.sequence, minlength=len(blocks.batch.seqlens))
    cut = build_blocks(
        blocks.batch,
        blocks.spec,
        block_lengths=split(length, counts),
        num_head_groups=blocks.num_head_groups,
    )
    rank = {name: _carried_over(blocks, cut, name, placement) for name in blocks.masks}
    return Placement(cut, owner, rank, notes=placement.notes)


def _carried_over(old: BlockTable, new: BlockTable, mask: str, placement: Placement) -> np.ndarray:
    """The rank of every new tile: of the old one between the same blocks, or its queries' owner."""
    before, after = old.masks[mask], new.masks[mask]
    rank = placement.rank[mask].reshape(-1, old.num_head_groups)
    known, wanted = (tiles.q * old.num_blocks + tiles.k for tiles in (before, after))
    at = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
    found = known[at] == wanted if len(known) else np.zeros(len(wanted), dtype=bool)
    carried = np.repeat(placement.owner[after.q][:, None], old.num_head_groups, axis=1)
    carried[found] = rank[at[found]]
    return carried.ravel()


@njit(cache=True)
def _flow(
    length: np.ndarray,
    least: np.ndarray,
    owner: np.ndarray,
    edges: np.ndarray,
    held: np.ndarray,
    wanted: np.ndarray,
    multiple: int,
) -> int:
    """Move ``edges`` (block ``e`` against ``e + 1``); returns how many flows that took.

    Each goes from the fullest rank by the fewest edges to one that lacks tokens.
    """
    num_ranks = len(held)
    stuck = np.zeros(num_ranks, dtype=np.bool_)
    came_by = np.empty(num_ranks, dtype=np.int64)
    queue = np.empty(num_ranks, dtype=np.int64)
    flows = 0
    while flows < 8 * num_ranks:
        source = -1
        for r in range(num_ranks):
            if (
                not stuck[r]
                and held[r] - wanted[r] > multiple / 2
                and (source < 0 or held[r] - wanted[r] > held[source] - wanted[source])
            ):
                source = r
        if source < 0:
            break
        target = _search(
            length, least, owner, edges, held, wanted, multiple, source, came_by, queue
        )
        if target < 0:
            stuck[source] = True
            continue
        amount = min(held[source] - wanted[source], wanted[target] - held[target])
        at = target
        while at != source:
            e, away = _edge(edges, came_by[at])
            giving = e if away else e + 1
            amount = min(amount, length[giving] - least[giving])
            at = owner[giving]
        steps = max(int(amount / multiple + 0.5), 1) * multiple
        at = target
        while at != source:
            e, away = _edge(edges, came_by[at])
            giving, taking = (e, e + 1) if away else (e + 1, e)
            length[giving] -= steps
            length[taking] += steps
            at = owner[giving]
        held[source] -= steps
        held[target] += steps
        flows += 1
    return flows


@njit(cache=True)
def _edge(edges: np.ndarray, code: int) -> tuple[int, bool]:
    """The edge of a search's step, and whether tokens go to the later block."""
    return edges[code // 2], code % 2 == 1


@njit(cache=True)
def _search(
    length: np.ndarray,
    least: np.ndarray,
    owner: np.ndarray,
    edges: np.ndarray,
    held: np.ndarray,
    wanted: np.ndarray,
    multiple: int,
    source: int,
    came_by: np.ndarray,
    queue: np.ndarray,
) -> int:
    """The nearest rank that lacks tokens and the way to it, by breadth; -1: none."""
    came_by[:] = -1
    came_by[source] = -2
    queue[0] = source
    first, last = 0, 1
    while first < last:
        r = queue[first]
        first += 1
        for i in range(len(edges)):
            e = edges[i]
            for away in range(2):
                giving, taking = (e, e + 1) if away else (e + 1, e)
                to = owner[taking]
                if owner[giving] != r or came_by[to] != -1:
                    continue
                if length[giving] - least[giving] < multiple:
                    continue
                came_by[to] = 2 * i + away
                if wanted[to] - held[to] > multiple / 2:
                    return int(to)
                queue[last] = to
                last += 1
    return -1
