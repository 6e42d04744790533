"""Placement -> divisions: when each compute block runs and when each byte moves.

Time runs in steps ``t = 0 … num_divisions``. In step ``t`` a rank launches communication ``t + 1``,
runs division ``t`` under it, then waits for it and reduces what arrived:

- a block that division ``d`` needs first travels in communication ``d`` (division 0 is local);
- a partial result last touched in division ``d`` leaves in communication ``d + 2``, that is, in the
  step after it was made, and never waits for the end.

Forward and backward share divisions, rows and transfers; the backward pass also sends partial key
and value gradients (:data:`DKV`) home, by the same rule as partial outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from dcp.blocks import BlockTable
from dcp.cluster import Cluster
from dcp.placement import Placement
from dcp.transfers import Transfers, Uses, make_transfers

_NONE = np.zeros(0, dtype=np.int64)
MOST_DIVISIONS = 4096  # every rank takes every step: a table of steps x ranks is kept


@dataclass(frozen=True, eq=False)
class MaskSchedule:
    """Divisions and transfers of one mask. Steps go on until the last transfer.

    ``rank``, ``division``, ``q_piece``, ``kv_piece`` and ``area`` are per compute block.
    """

    num_divisions: int
    num_steps: int
    rank: np.ndarray
    division: np.ndarray
    q_piece: np.ndarray
    kv_piece: np.ndarray
    area: np.ndarray
    q_uses: Uses
    kv_uses: Uses
    transfers: Transfers


def make_schedule(
    placement: Placement,
    mask: str,
    cluster: Cluster,
    *,
    num_divisions: int = 4,
    tail: bool = False,
) -> MaskSchedule:
    """Order each rank's compute blocks of one mask in at most ``num_divisions`` divisions.

    With ``tail``, what needs other nodes comes early, and what needs none last, so that results do
    not travel when all else is done.
    """
    blocks, rank = placement.blocks, placement.rank[mask]
    q_piece, kv_piece, area = _compute_blocks(blocks, mask)
    q_uses = _uses(rank, q_piece, np.repeat(placement.owner, blocks.num_head_groups))
    kv_uses = _uses(rank, kv_piece, np.repeat(placement.owner, blocks.num_kv_groups))
    relay, followers = False, (_NONE, _NONE)
    if placement.division is not None:
        assert placement.num_divisions is not None, "fixed divisions need their number"
        division, count = placement.division[mask], placement.num_divisions
    else:
        wanted = placement.num_divisions or num_divisions
        local = not (q_uses.remote.any() or kv_uses.remote.any())
        count = 1 if local else max(2, wanted)
        relay = count > 2 and cluster.num_nodes > 1
        if relay:
            followers = _followers(placement, q_uses, kv_uses, cluster)
        division = _choose_divisions(
            rank, area, q_uses, kv_uses, followers, cluster.node_of_rank, count, tail and count > 2
        )
    q_uses, kv_uses = _spans(q_uses, division), _spans(kv_uses, division)
    transfers = make_transfers(placement, q_uses, kv_uses, followers, cluster, count, relay)
    num_steps = max(count + 1, int(transfers.step.max(initial=0)))
    return MaskSchedule(
        count, num_steps, rank, division, q_piece, kv_piece, area, q_uses, kv_uses, transfers
    )


# --------------------------------------------------------------------------- who uses what


def _compute_blocks(blocks: BlockTable, mask: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query piece, KV piece and area of every compute block."""
    tiles, groups, kv_groups = blocks.masks[mask], blocks.num_head_groups, blocks.num_kv_groups
    group = np.tile(np.arange(groups), tiles.num_tiles)
    q_piece = np.repeat(tiles.q * groups, groups) + group
    kv_piece = np.repeat(tiles.k * kv_groups, groups) + group * kv_groups // groups
    return q_piece, kv_piece, np.repeat(tiles.area, groups)


def _uses(rank: np.ndarray, piece: np.ndarray, owner: np.ndarray) -> Uses:
    num_pieces = max(len(owner), 1)
    key, index = np.unique(rank * num_pieces + piece, return_inverse=True)
    none = np.zeros(len(key), dtype=np.int64)
    return Uses(key // num_pieces, key % num_pieces, owner[key % num_pieces], none, none, index)


def _spans(uses: Uses, division: np.ndarray) -> Uses:
    """The same uses with the divisions between which they lie."""
    first = np.full(len(uses.rank), np.iinfo(np.int64).max)
    last = np.zeros(len(uses.rank), dtype=np.int64)
    np.minimum.at(first, uses.index, division)
    np.maximum.at(last, uses.index, division)
    return Uses(uses.rank, uses.piece, uses.owner, first, last, uses.index)


# --------------------------------------------------------------------------- when it runs


def _choose_divisions(
    rank: np.ndarray,
    area: np.ndarray,
    q_uses: Uses,
    kv_uses: Uses,
    followers: tuple[np.ndarray, np.ndarray],
    node: np.ndarray,
    count: int,
    tail: bool,
) -> np.ndarray:
    """Divisions of equal compute on each rank, transfers spread evenly over them.

    Blocks that need nothing from elsewhere fill division 0 up to its fair share and what the
    others leave free; the rest is cut in order of arrival into divisions 1, 2, …: pieces of
    remote queries first (their outputs must travel home), then by distance round the ring of
    ranks, so that no owner has to serve every rank at once.
    """
    num_ranks = len(node)
    early = [_earliest(*each) for each in zip((q_uses, kv_uses), followers, strict=True)]
    arrival = [
        _arrival_order(uses, earliest, node, first=first)
        for uses, earliest, first in zip((q_uses, kv_uses), early, (0, 1), strict=True)
    ]
    earliest = np.maximum(early[0][q_uses.index], early[1][kv_uses.index])
    order = np.maximum(arrival[0][q_uses.index], arrival[1][kv_uses.index])
    own_query = ~q_uses.remote[q_uses.index]

    if tail:
        crosses = np.maximum(*(_crossing(uses, node)[uses.index] for uses in (q_uses, kv_uses)))
        return _inside_last(rank, area, earliest, order, crosses, own_query, num_ranks, count)
    is_local = earliest == 0
    total = np.bincount(rank, weights=area, minlength=num_ranks)
    remote = np.bincount(rank, weights=np.where(is_local, 0, area), minlength=num_ranks)
    share = total / count
    remote_share = np.maximum(remote / max(count - 1, 1), 1e-9)
    local_share = np.maximum(share - remote / max(count - 1, 1), 1e-9)
    sequence = np.lexsort((order, ~is_local, rank))  # each rank: local blocks, then by arrival
    middle = _middles(area, rank, sequence, total)
    ahead = 1 + np.maximum(middle - (total - remote)[rank], 0) // remote_share[rank]
    behind = 1 + np.maximum(middle - share[rank], 0) // local_share[rank]
    spare = np.where(middle < share[rank], 0, behind)
    division = np.where(is_local, spare, np.maximum(ahead, earliest))
    return np.minimum(division, count - 1).astype(np.int64)


def _inside_last(
    rank: np.ndarray,
    area: np.ndarray,
    earliest: np.ndarray,
    order: np.ndarray,
    crosses: np.ndarray,
    own_query: np.ndarray,
    num_ranks: int,
    count: int,
) -> np.ndarray:
    """Divisions that end with what has the shortest way, so that few results travel uncovered.

    A share of local blocks comes first, then a share of those that need the own node, then all
    that need other nodes (``crosses``), then the rest of the own node's, last the rest of the local
    ones.
    """
    is_local = earliest == 0
    total = np.bincount(rank, weights=area, minlength=num_ranks)
    local = np.bincount(rank, weights=np.where(is_local, area, 0), minlength=num_ranks)
    head = np.minimum(local, total / count)
    after = (total - head) / max(count - 1, 1)
    middle = _middles(area, rank, np.lexsort((order, crosses, ~is_local, rank)), total)
    phase = np.where(is_local, 0, np.where(crosses, 2, 1))
    phase[(phase == 1) & (middle - local[rank] > after[rank])] = 3
    phase[is_local & (middle > head[rank])] = 4

    sequence = np.lexsort((order, (phase == 3) & own_query, phase, rank))
    middle = _middles(area, rank, sequence, total)
    head = np.bincount(rank, weights=np.where(phase == 0, area, 0), minlength=num_ranks)
    rest = np.maximum((total - head) / max(count - 1, 1), 1e-9)
    ahead = 1 + np.maximum(middle - head[rank], 0) // rest[rank]
    division = np.where(phase == 0, 0, np.maximum(ahead, earliest))
    return np.minimum(division, count - 1).astype(np.int64)


def _crossing(uses: Uses, node: np.ndarray) -> np.ndarray:
    """Uses of a piece from another node."""
    crossing: np.ndarray = node[uses.rank] != node[uses.owner]
    return crossing


def _middles(
    area: np.ndarray, rank: np.ndarray, sequence: np.ndarray, total: np.ndarray
) -> np.ndarray:
    """The middle of each compute block in its rank's work, done in this sequence."""
    middle = np.empty(len(rank))
    start = np.concatenate([[0], np.cumsum(total)])[rank[sequence]]
    middle[sequence] = np.cumsum(area[sequence]) - area[sequence] / 2 - start
    return middle


def _earliest(uses: Uses, followers: np.ndarray) -> np.ndarray:
    """First division in which each use can run: 0 local, 1 remote, 2 passed on inside a node."""
    earliest = uses.remote.astype(np.int64)
    earliest[followers] = 2
    return earliest


def _followers(
    placement: Placement, q_uses: Uses, kv_uses: Uses, cluster: Cluster
) -> tuple[np.ndarray, np.ndarray]:
    """Of queries and of keys: uses of a piece from another node that a rank of the same node, the
    leader, fetches for all: the one whose network card has least to fetch so far."""
    spec, blocks, node = placement.blocks.spec, placement.blocks, cluster.node_of_rank
    sides = (
        (q_uses, spec.q_token_bytes, blocks.num_head_groups),
        (kv_uses, spec.kv_token_bytes, blocks.num_kv_groups),
    )
    load, found = np.zeros(cluster.num_ranks), []
    for uses, token_bytes, groups in sides:
        crosses = np.flatnonzero(node[uses.rank] != node[uses.owner])
        key = uses.piece[crosses] * cluster.num_nodes + node[uses.rank[crosses]]
        size = blocks.length[uses.piece[crosses] // groups] * (token_bytes / groups)
        several = np.bincount(key)[key]
        order = np.lexsort((key, -size, several > 1))  # no choice first, then the largest
        is_follower = np.zeros(len(crosses), dtype=bool)
        is_follower[order] = _follow(key[order], uses.rank[crosses[order]], size[order], load)
        found.append(crosses[is_follower])
    return found[0], found[1]


@njit(cache=True)
def _follow(key: np.ndarray, rank: np.ndarray, size: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Which of the uses in each run of equal ``key`` do not lead; ``load`` grows by what does."""
    follows = np.ones(len(key), dtype=np.bool_)
    first = 0
    while first < len(key):
        end, leader = first + 1, first
        while end < len(key) and key[end] == key[first]:
            if load[rank[end]] < load[rank[leader]]:
                leader = end
            end += 1
        follows[leader] = False
        load[rank[leader]] += size[leader]
        first = end
    return follows


def _arrival_order(uses: Uses, earliest: np.ndarray, node: np.ndarray, *, first: int) -> np.ndarray:
    """Sort key of each use's arrival: what the own node has first, relays last, queries first, then
    by ring distance: from the rank or, for what comes from another node, from the node."""
    num_ranks, inside = len(node), node[uses.rank] == node[uses.owner]
    here = np.where(inside, uses.rank, np.searchsorted(node, node)[uses.rank])
    distance = (uses.owner - here) % num_ranks
    earliest = 2 * earliest - inside
    widest = max(int(uses.piece.max(initial=0)) + 1, 1)
    key: np.ndarray = ((earliest * 2 + first) * num_ranks + distance) * widest + uses.piece
    return key
