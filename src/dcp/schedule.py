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
from dcp.placement import Placement, Route
from dcp.ragged import starts

# The four buffers of a rank. Q: queries (backward: also dO, lse, delta); OUT: outputs with lse
# (backward: dQ); DKV is used by the backward pass alone.
Q, KV, OUT, DKV = range(4)

_NONE = np.zeros(0, dtype=np.int64)
_FIRST = 2.0  # times as dear is the first communication: little is computed meanwhile
MOST_DIVISIONS = 4096  # every rank takes every step: a table of steps x ranks is kept


@dataclass(frozen=True, eq=False)
class Transfers:
    """Every transfer of one mask: int64 arrays of equal length.

    A *piece* is one data block of one head group: ``block * groups + group``, where the groups of
    KV and DKV pieces are the ``num_kv_groups``.
    """

    buffer: np.ndarray
    piece: np.ndarray
    source: np.ndarray
    target: np.ndarray
    step: np.ndarray

    def __len__(self) -> int:
        return len(self.piece)

    def __getitem__(self, index: np.ndarray) -> Transfers:
        return Transfers(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @classmethod
    def concat(cls, parts: list[Transfers]) -> Transfers:
        names = cls.__dataclass_fields__
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


@dataclass(frozen=True, eq=False)
class Uses:
    """The distinct (rank, piece) pairs of one side of the compute blocks, sorted by that pair.

    ``first`` and ``last`` are the divisions between which the rank works on the piece; ``index``
    gives each compute block's entry; ``owner`` the rank that holds the piece.
    """

    rank: np.ndarray
    piece: np.ndarray
    owner: np.ndarray
    first: np.ndarray
    last: np.ndarray
    index: np.ndarray

    @property
    def remote(self) -> np.ndarray:
        remote: np.ndarray = self.rank != self.owner
        return remote


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
    transfers = _transfers(placement, q_uses, kv_uses, followers, cluster, count, relay)
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


# --------------------------------------------------------------------------- what moves when


def _transfers(
    placement: Placement,
    q_uses: Uses,
    kv_uses: Uses,
    followers: tuple[np.ndarray, np.ndarray],
    cluster: Cluster,
    count: int,
    relay: bool,
) -> Transfers:
    """Inputs, partial outputs and partial gradients of a mask in ``count`` divisions."""
    sides = (
        (KV, kv_uses, followers[1], placement.kv_route),
        (Q, q_uses, followers[0], placement.q_route),
    )
    busy = np.zeros((2, count + 1, cluster.num_ranks))
    inputs = [
        _inputs(buffer, uses, each, cluster, relay, _bytes(placement, buffer), busy)
        if route is None
        else _routed(buffer, route)
        for buffer, uses, each, route in sides
    ]
    results = _outputs(OUT, q_uses, cluster, relay)
    if placement.results_together:
        results.step[:] = count + 1
    if placement.gradients_travel:
        one_lane = np.zeros(cluster.num_ranks, dtype=np.int64)
        lane = one_lane if placement.gradient_lane is None else placement.gradient_lane
        gradients = _travelling(DKV, kv_uses, lane)
    else:
        gradients = _outputs(DKV, kv_uses, cluster, relay)
    return Transfers.concat([*inputs, results, gradients])


def _routed(buffer: int, route: Route) -> Transfers:
    """The hops that a strategy fixed."""
    kind = np.full(len(route.piece), buffer)
    return Transfers(kind, route.piece, route.source, route.target, route.step)


def _inputs(
    buffer: int,
    uses: Uses,
    followers: np.ndarray,
    cluster: Cluster,
    relay: bool,
    piece_bytes: np.ndarray,
    busy: np.ndarray,
) -> Transfers:
    """Each remote use is fetched from its owner.

    With ``relay``, one rank of a foreign node leads: it fetches a piece for all of them, from the
    node that got it before, so that the owner's link does not carry every copy.
    """
    source, step = uses.owner.copy(), uses.first.copy()
    if relay:
        node = cluster.node_of_rank
        key = uses.piece * cluster.num_nodes + node[uses.rank]
        crosses = node[uses.rank] != node[uses.owner]
        crosses[followers] = False
        leaders = np.flatnonzero(crosses)
        leaders = leaders[np.argsort(key[leaders])]
        of = leaders[np.searchsorted(key[leaders], key[followers])]
        source[followers] = uses.rank[of]
        np.minimum.at(step, of, uses.first[followers] - 1)
        due = leaders[np.lexsort((-piece_bytes[uses.piece[leaders]], step[leaders]))]
        step[due] = _spread(
            step[due], uses.owner[due], uses.rank[due], piece_bytes[uses.piece[due]], busy
        )
        leaders = leaders[np.lexsort((step[leaders], uses.piece[leaders]))]
        when = uses.piece[leaders] * (int(step.max(initial=0)) + 1) + step[leaders]
        before = np.searchsorted(when, when) - 1  # the last one with an earlier step
        chained = (before >= 0) & (uses.piece[leaders[before]] == uses.piece[leaders])
        source[leaders[chained]] = uses.rank[leaders[before[chained]]]
    remote = np.flatnonzero(uses.remote)
    kind = np.full(len(remote), buffer)
    return Transfers(kind, uses.piece[remote], source[remote], uses.rank[remote], step[remote])


def _bytes(placement: Placement, buffer: int) -> np.ndarray:
    """Bytes of every piece of queries or of keys and values."""
    blocks, spec = placement.blocks, placement.blocks.spec
    groups, token_bytes = (
        (blocks.num_kv_groups, spec.kv_token_bytes)
        if buffer == KV
        else (blocks.num_head_groups, spec.q_token_bytes)
    )
    return np.repeat(blocks.length, groups) * (token_bytes / groups)


@njit(cache=True)
def _spread(
    due: np.ndarray, source: np.ndarray, target: np.ndarray, size: np.ndarray, busy: np.ndarray
) -> np.ndarray:
    """Communication of each transfer, in order of when it is due: the last one, unless the network
    cards have less to do in one before. ``busy`` ``[out and in, communication, rank]`` grows."""
    step = due.copy()
    for i in range(len(due)):
        best = np.inf
        for t in range(due[i], 0, -1):
            load = max(busy[0, t, source[i]], busy[1, t, target[i]]) + size[i]
            load *= _FIRST if t == 1 else 1.0
            if load < best - 1e-9:
                best, step[i] = load, t
        busy[0, step[i], source[i]] += size[i]
        busy[1, step[i], target[i]] += size[i]
    return step


def _outputs(buffer: int, uses: Uses, cluster: Cluster, relay: bool) -> Transfers:
    """Each partial result goes home in the step after it was last touched.

    With ``relay``, those of one foreign node are first summed on the rank of it that is last to
    touch the piece, so that they cross between nodes once.
    """
    node = cluster.node_of_rank
    of = np.flatnonzero(uses.remote)
    rank, piece, owner = uses.rank[of], uses.piece[of], uses.owner[of]
    target, step = owner.copy(), uses.last[of] + 2
    crosses = np.flatnonzero(node[rank] != node[owner]) if relay else np.zeros(0, dtype=np.int64)
    if len(crosses):
        key = piece[crosses] * cluster.num_nodes + node[rank[crosses]]
        turn = (rank[crosses] + piece[crosses]) % int(cluster.node_sizes.max())
        order = np.lexsort((turn, uses.last[of[crosses]], key))
        crosses, key = crosses[order], key[order]
        _, group = np.unique(key, return_inverse=True)
        leader = crosses[np.append(np.flatnonzero(np.diff(group)), len(group) - 1)][group]
        givers = crosses != leader
        giver, leader = crosses[givers], leader[givers]
        target[giver] = rank[leader]
        step[giver] = np.maximum(step[giver], uses.first[of[leader]] + 1)
        np.maximum.at(step, leader, step[giver] + 1)
    return Transfers(np.full(len(of), buffer), piece, rank, target, step)


def _travelling(buffer: int, uses: Uses, lane: np.ndarray) -> Transfers:
    """Partial results summed from rank to rank: each adds its own and passes on, last to the owner.

    The ranks of a piece and lane follow each other by division, those of one division in a turn
    that differs from piece to piece. A rank passes on once its own last division is over and what
    it was passed has been added.
    """
    of = np.flatnonzero(uses.remote)
    size = np.bincount(lane)
    place = np.argsort(np.argsort(lane, kind="stable")) - starts(size)[lane]
    turn = (place[uses.rank] + uses.piece) % size[lane[uses.rank]]
    chain = uses.piece * len(size) + lane[uses.rank]
    of = of[np.lexsort((turn[of], uses.first[of], chain[of]))]
    rank, piece, owner, chain = uses.rank[of], uses.piece[of], uses.owner[of], chain[of]
    is_last = np.append(chain[1:] != chain[:-1], True)[: len(of)]
    target = np.where(is_last, owner, np.append(rank[1:], 0)[: len(of)])
    step = uses.last[of] + 2
    if len(of):
        place = np.arange(len(of)) - np.searchsorted(chain, chain)  # in the chain
        for here in range(int(place.max()) + 1):
            giving = np.flatnonzero((place == here) & ~is_last)
            step[giving] = np.maximum(step[giving], uses.first[of[giving + 1]] + 1)
            step[giving + 1] = np.maximum(step[giving + 1], step[giving] + 1)
    return Transfers(np.full(len(of), buffer), piece, rank, target, step)
