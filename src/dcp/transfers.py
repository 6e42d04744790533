"""What moves when: inputs to those who compute, partial results home.

A piece that several ranks of a foreign node need crosses once; partial results for one owner are
summed inside a node before they cross.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from dcp.cluster import Cluster
from dcp.placement import Placement, Route
from dcp.ragged import starts

# The four buffers of a rank. Q: queries (backward: also dO, lse, delta); OUT: outputs with lse
# (backward: dQ); DKV is used by the backward pass alone.
Q, KV, OUT, DKV = range(4)

_FIRST = 2.0  # times as dear is the first communication: little is computed meanwhile


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


def make_transfers(
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
