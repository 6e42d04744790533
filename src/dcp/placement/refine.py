"""Compiled local search over a placement: the moves, and an annealer that picks among them.

A compute block has two pins, a **piece** each: its query block's part (queries in, a partial
output back) and its key block's part (keys and values in). With the number of compute blocks that
need a piece on each rank and in each node at hand, the change that any single move makes is known
in constant time. Everything larger (a row of compute blocks, a data block with its row, a swap) is
a run of single moves, undone where the sum does not pay.

The cost is in seconds of a layer, forward and backward: bytes between nodes over all node links,
bytes received over all device links, and steep charges for ranks beyond their share of load, tokens
or received bytes. A rank's load is its attention and its linear layers. A piece needed by several
ranks of a foreign node crosses the link once, and so do their partial results, summed there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

# rows of State.price
INTER, INTRA, LOAD_CAP, LOAD_WEIGHT, TOKEN_CAP, TOKEN_WEIGHT, LINK_CAP, LINK_WEIGHT = range(8)
WORK_CAP, WORK_WEIGHT, LINEAR, NEAR, FAR = range(8, 13)
# kinds of move, as indices of the annealer's mix
ONE, ROW, COLUMN, HOME_ROW, HOME_COLUMN, OWNER, OWNER_SWAP, BLOCK, BLOCK_SWAP = range(9)
NUM_KINDS = 9


class State(NamedTuple):
    """A placement as flat arrays. Compute blocks of all masks and head groups count as one list.

    Pieces: query parts of every (mask, data block, head group), then key parts of every (mask,
    data block, KV group). ``V`` compute blocks, ``P`` pieces, ``B`` data blocks, ``N`` ranks.
    """

    pins: np.ndarray  # [V, 2] query piece, key piece
    work: np.ndarray  # [V] seconds, in mean ranks' loads
    members: np.ndarray  # compute blocks of each piece, one piece after another
    member_start: np.ndarray  # [P + 1]
    piece_block: np.ndarray  # [P]
    in_bytes: np.ndarray  # [P] to every rank that needs the piece
    out_bytes: np.ndarray  # [P] from every rank that needs the piece
    block_pieces: np.ndarray  # pieces of each block [B, pieces]
    tokens: np.ndarray  # [B] share of the mean rank's tokens
    node: np.ndarray  # [N]
    node_start: np.ndarray  # [nodes + 1] first rank of each node
    rank: np.ndarray  # [V] changes
    owner: np.ndarray  # [B] changes
    count: np.ndarray  # type: ignore[assignment]  # [P, N] compute blocks on each rank that need the piece
    present: np.ndarray  # [P, nodes] ranks of each node that need the piece
    slow: np.ndarray  # [N] the mean rank's speed over the rank's
    load: np.ndarray  # [N] time of attention and linear layers, in mean ranks' loads
    held: np.ndarray  # [N] tokens, in mean ranks; a slow rank's count for more
    link: np.ndarray  # [N] seconds that its bytes, in and out, take on its own links
    price: np.ndarray  # [13] see the names above; LINEAR: load of a mean rank's tokens; NEAR, FAR:
    # seconds of a byte on a rank's link inside its node and to others


@njit(cache=True)
def _random(seed: np.ndarray, bound: int) -> int:
    """Next integer below ``bound`` (xorshift; the whole state is ``seed[0]``)."""
    x = seed[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    seed[0] = x
    return int(np.int64((x >> np.uint64(11)) % np.uint64(bound)))


@njit(cache=True)
def _over(value: float, change: float, cap: float, weight: float) -> float:
    """Change of the charge ``weight * max(0, value - cap) ** 2`` when ``value`` changes."""
    before = max(0.0, value - cap)
    after = max(0.0, value + change - cap)
    return weight * (after * after - before * before)


@njit(cache=True)
def _pin_cost(s: State, piece: int, r: int, sign: int, others: int) -> float:
    """Cost of ``piece`` beginning (+1) or ceasing (-1) to be needed on rank ``r``.

    ``others`` counts the further ranks of that node which need it at that moment.
    """
    owner = s.owner[s.piece_block[piece]]
    if r == owner:
        return 0.0
    size = s.in_bytes[piece] + s.out_bytes[piece]
    cost: float = sign * s.price[INTRA] * size
    if s.node[r] != s.node[owner] and others == 0:
        cost += sign * s.price[INTER] * size
    cap, weight = s.price[LINK_CAP], s.price[LINK_WEIGHT]
    if weight > 0.0:
        at_rank, at_owner, led, at_led = _link_changes(s, piece, r, owner)
        cost += _over(s.link[r], sign * at_rank, cap, weight)
        cost += _over(s.link[owner], sign * at_owner, cap, weight)
        if led >= 0:
            cost += _over(s.link[led], sign * at_led, cap, weight)
    return cost


@njit(cache=True)
def _leader(s: State, piece: int, n: int, skip: int) -> int:
    """The rank of node ``n`` that fetches ``piece`` for all of it but ``skip``; -1: none needs it.

    Its first one from another rank on for each piece, so that none does it all.
    """
    first, size = s.node_start[n], s.node_start[n + 1] - s.node_start[n]
    for i in range(size):
        r = first + (piece + i) % size
        if r != skip and s.count[piece, r] > 0:
            return int(r)
    return -1


@njit(cache=True)
def _link_changes(s: State, piece: int, r: int, owner: int) -> tuple[float, float, int, float]:
    """Seconds on the links of ``r``, of the owner and of a third rank if ``r`` needs ``piece``."""
    size = s.in_bytes[piece] + s.out_bytes[piece]
    near, far = s.price[NEAR] * size, s.price[FAR] * size
    n = s.node[r]
    if n == s.node[owner]:
        return near, near, -1, 0.0
    led = _leader(s, piece, n, r)
    if led < 0:
        return far, far, -1, 0.0
    nodes = s.node_start[n + 1] - s.node_start[n]
    start = s.node_start[n] + piece % nodes
    if (r - start) % nodes < (led - start) % nodes:
        return far, 0.0, led, near - far
    return near, 0.0, -1, 0.0


@njit(cache=True)
def _carry(s: State, piece: int, r: int, owner: int, sign: int) -> None:
    """``piece`` begins (+1) or ceases (-1) to travel between ``owner`` and rank ``r``."""
    if r != owner:
        at_rank, at_owner, led, at_led = _link_changes(s, piece, r, owner)
        s.link[r] += sign * at_rank
        s.link[owner] += sign * at_owner
        if led >= 0:
            s.link[led] += sign * at_led


@njit(cache=True)
def move_cost(s: State, v: int, b: int) -> float:
    """Cost of running compute block ``v`` on rank ``b`` instead of where it runs."""
    a = s.rank[v]
    less, more = -s.work[v] * s.slow[a], s.work[v] * s.slow[b]
    cost = _over(s.load[a], less, s.price[LOAD_CAP], s.price[LOAD_WEIGHT])
    cost += _over(s.load[b], more, s.price[LOAD_CAP], s.price[LOAD_WEIGHT])
    cap, weight = s.price[WORK_CAP], s.price[WORK_WEIGHT]
    cost += _over(s.load[a] - s.price[LINEAR] * s.held[a], less, cap, weight)
    cost += _over(s.load[b] - s.price[LINEAR] * s.held[b], more, cap, weight)
    for pin in range(2):
        piece = s.pins[v, pin]
        leaves = s.count[piece, a] == 1
        if leaves:
            cost += _pin_cost(s, piece, a, -1, s.present[piece, s.node[a]] - 1)
        if s.count[piece, b] == 0:
            gone = 1 if leaves and s.node[a] == s.node[b] else 0
            cost += _pin_cost(s, piece, b, 1, s.present[piece, s.node[b]] - gone)
    return cost


@njit(cache=True)
def move(s: State, v: int, b: int) -> None:
    """Run compute block ``v`` on rank ``b``."""
    a = s.rank[v]
    s.rank[v] = b
    s.load[a] -= s.work[v] * s.slow[a]
    s.load[b] += s.work[v] * s.slow[b]
    for pin in range(2):
        piece = s.pins[v, pin]
        owner = s.owner[s.piece_block[piece]]
        s.count[piece, a] -= 1
        if s.count[piece, a] == 0:
            s.present[piece, s.node[a]] -= 1
            _carry(s, piece, a, owner, -1)
        if s.count[piece, b] == 0:
            s.present[piece, s.node[b]] += 1
            _carry(s, piece, b, owner, 1)
        s.count[piece, b] += 1


@njit(cache=True)
def shift_owner(s: State, block: int, b: int) -> float:
    """Give data block ``block`` to rank ``b``; returns the cost of doing so."""
    a = s.owner[block]
    if a == b:
        return 0.0
    less, more = s.tokens[block] * s.slow[a], s.tokens[block] * s.slow[b]
    cost: float = _over(s.held[a], -less, s.price[TOKEN_CAP], s.price[TOKEN_WEIGHT])
    cost += _over(s.held[b], more, s.price[TOKEN_CAP], s.price[TOKEN_WEIGHT])
    linear = s.price[LINEAR]
    cost += _over(s.load[a], -less * linear, s.price[LOAD_CAP], s.price[LOAD_WEIGHT])
    cost += _over(s.load[b], more * linear, s.price[LOAD_CAP], s.price[LOAD_WEIGHT])
    s.held[a] -= less
    s.held[b] += more
    s.load[a] -= less * linear
    s.load[b] += more * linear
    s.owner[block] = b
    node_a, node_b = s.node[a], s.node[b]
    cap, weight = s.price[LINK_CAP], s.price[LINK_WEIGHT]
    for piece in s.block_pieces[block]:
        into, out = s.in_bytes[piece], s.out_bytes[piece]
        at_a, at_b = s.count[piece, a] > 0, s.count[piece, b] > 0
        cost += s.price[INTRA] * (into + out) * (np.int64(at_a) - np.int64(at_b))
        if node_a != node_b:
            there, here = s.present[piece, node_a], s.present[piece, node_b]
            crossing = (into + out) * (np.int64(there > 0) - np.int64(here > 0))
            cost += s.price[INTER] * crossing
        if weight > 0.0:
            cost -= _link_charge(s, piece, a, b, cap, weight)
        _carry_all(s, piece, a, -1)
        _carry_all(s, piece, b, 1)
        if weight > 0.0:
            cost += _link_charge(s, piece, a, b, cap, weight)
    return cost


@njit(cache=True)
def _link_charge(s: State, piece: int, a: int, b: int, cap: float, weight: float) -> float:
    """What the links of ``a``, ``b`` and all ranks that need ``piece`` are charged now."""
    total = 0.0
    for n in range(s.present.shape[1]):
        if s.present[piece, n] == 0 and n != s.node[a] and n != s.node[b]:
            continue
        for r in range(s.node_start[n], s.node_start[n + 1]):
            if r in (a, b) or s.count[piece, r] > 0:
                over = max(0.0, s.link[r] - cap)
                total += weight * over * over
    return total


@njit(cache=True)
def _carry_all(s: State, piece: int, owner: int, sign: int) -> None:
    """``piece`` begins (+1) or ceases (-1) to travel between ``owner`` and all who need it."""
    size = s.in_bytes[piece] + s.out_bytes[piece]
    near, far = sign * s.price[NEAR] * size, sign * s.price[FAR] * size
    for n in range(s.present.shape[1]):
        if s.present[piece, n] == 0:
            continue
        led = -1
        if n != s.node[owner]:
            led = _leader(s, piece, n, -1)
            s.link[owner] += far
        for r in range(s.node_start[n], s.node_start[n + 1]):
            if s.count[piece, r] > 0 and r != owner:
                s.link[r] += far if r == led else near
                if led < 0:
                    s.link[owner] += near


@njit(cache=True)
def _shift_members(
    s: State, first: int, last: int, a: int, b: int, moved: np.ndarray, num_moved: int
) -> tuple[float, int]:
    """Move those of ``members[first:last]`` on rank ``a`` to ``b``: cost, number moved."""
    cost = 0.0
    for i in range(first, last):
        v = s.members[i]
        if s.rank[v] == a:
            cost += move_cost(s, v, b)
            move(s, v, b)
            moved[num_moved] = v
            num_moved += 1
    return cost, num_moved


@njit(cache=True)
def _shift_block(
    s: State, block: int, b: int, moved: np.ndarray, num_moved: int
) -> tuple[float, int]:
    """Give ``block`` and its owner's compute on its queries to rank ``b``."""
    a = s.owner[block]
    cost = shift_owner(s, block, b)
    for piece in s.block_pieces[block]:
        if s.out_bytes[piece] > 0:
            first, last = s.member_start[piece], s.member_start[piece + 1]
            more, num_moved = _shift_members(s, first, last, a, b, moved, num_moved)
            cost += more
    return cost, num_moved


@njit(cache=True)
def _target(s: State, v: int, seed: np.ndarray) -> int:
    """A rank that may want compute block ``v``: one that has one of its pieces, or a neighbour."""
    piece = s.pins[v, _random(seed, 2)]
    choice = _random(seed, 16)
    if choice < 6:
        return int(s.owner[s.piece_block[piece]])
    if choice < 13:
        start = s.member_start[piece]
        return int(s.rank[s.members[start + _random(seed, s.member_start[piece + 1] - start)]])
    if choice < 15:
        node = s.node[s.rank[v]]
        first = int(s.node_start[node])
        return first + _random(seed, s.node_start[node + 1] - first)
    return _random(seed, len(s.load))


@njit(cache=True)
def _accept(cost: float, heat: float, seed: np.ndarray) -> bool:
    if cost <= 0.0:
        return True
    if heat <= 0.0 or cost > 20.0 * heat:
        return False
    return bool(_random(seed, 1 << 30) < np.exp(-cost / heat) * (1 << 30))


@njit(cache=True)
def _try_one(s: State, v: int, b: int, heat: float, seed: np.ndarray) -> float:
    cost = move_cost(s, v, b)
    if _accept(cost, heat, seed):
        move(s, v, b)
        return cost
    return 0.0


@njit(cache=True)
def _try_group(
    s: State, kind: int, v: int, b: int, heat: float, seed: np.ndarray, moved: np.ndarray
) -> float:
    """Try the move ``kind`` around compute block ``v`` towards rank ``b``."""
    a = s.rank[v]
    piece = s.pins[v, 1 if kind == COLUMN else 0]
    if kind in (ROW, COLUMN):
        first, last = s.member_start[piece], s.member_start[piece + 1]
        if _random(seed, 2):  # a part of the row
            one, two = _random(seed, last - first + 1), _random(seed, last - first + 1)
            first, last = first + min(one, two), first + max(one, two)
        cost, num_moved = _shift_members(s, first, last, a, b, moved, 0)
        if _accept(cost, heat, seed):
            return cost
        for i in range(num_moved):
            move(s, moved[i], a)
        return 0.0
    block = s.piece_block[s.pins[v, _random(seed, 2)]]
    return _try_blocks(s, kind, block, b, heat, seed, moved)


@njit(cache=True)
def _try_home(
    s: State, kind: int, v: int, heat: float, seed: np.ndarray, moved: np.ndarray, came: np.ndarray
) -> float:
    """Try to run all of a row whose keys the owner of ``v``'s keys has there, or all of a column
    whose queries the owner of ``v``'s queries has."""
    line = 0 if kind == HOME_ROW else 1
    piece, b = s.pins[v, line], s.owner[s.piece_block[s.pins[v, 1 - line]]]
    cost, num_moved = 0.0, 0
    for i in range(s.member_start[piece], s.member_start[piece + 1]):
        w = s.members[i]
        if s.rank[w] != b and s.owner[s.piece_block[s.pins[w, 1 - line]]] == b:
            cost += move_cost(s, w, b)
            moved[num_moved], came[num_moved] = w, s.rank[w]
            move(s, w, b)
            num_moved += 1
    if _accept(cost, heat, seed):
        return cost
    for i in range(num_moved - 1, -1, -1):
        move(s, moved[i], came[i])
    return 0.0


@njit(cache=True)
def _try_blocks(
    s: State, kind: int, block: int, b: int, heat: float, seed: np.ndarray, moved: np.ndarray
) -> float:
    """Try to give ``block`` to rank ``b``, alone or with its row, in exchange or not."""
    a = s.owner[block]
    if a == b:
        return 0.0
    other = -1
    if kind in (OWNER_SWAP, BLOCK_SWAP):
        other = _block_of(s, b, seed)
        if other < 0:
            return 0.0
    with_rows = kind in (BLOCK, BLOCK_SWAP)
    cost, first = _give(s, block, b, with_rows, moved, 0)
    second = first
    if other >= 0:
        more, second = _give(s, other, a, with_rows, moved, first)
        cost += more
    if _accept(cost, heat, seed):
        return cost
    for i in range(first, second):
        move(s, moved[i], b)
    for i in range(first):
        move(s, moved[i], a)
    if other >= 0:
        shift_owner(s, other, b)
    shift_owner(s, block, a)
    return 0.0


@njit(cache=True)
def _block_of(s: State, r: int, seed: np.ndarray) -> int:
    """A random data block of rank ``r``, -1 where 64 guesses find none."""
    for _ in range(64):
        guess = _random(seed, len(s.owner))
        if s.owner[guess] == r:
            return guess
    return -1


@njit(cache=True)
def _give(
    s: State, block: int, b: int, with_row: bool, moved: np.ndarray, num_moved: int
) -> tuple[float, int]:
    """Give ``block`` to rank ``b``, alone or with its row: cost, number moved."""
    if with_row:
        return _shift_block(s, block, b, moved, num_moved)
    return shift_owner(s, block, b), num_moved


@njit(cache=True)
def anneal(
    s: State, steps: int, hot: float, cold: float, mix: np.ndarray, random_state: np.ndarray
) -> float:
    """Try ``steps`` moves while the heat falls from ``hot`` to ``cold`` seconds.

    Args:
        mix: cumulative chances in 1/1024 of each kind of move.
        random_state: uint64 ``[1]``, not zero, changes.

    Returns the change of the cost.
    """
    if len(s.rank) == 0 or len(s.load) < 2:
        return 0.0
    moved = np.empty(len(s.rank), dtype=np.int64)
    came = np.empty(len(s.rank), dtype=np.int64)
    total = 0.0
    heat, fall = hot, 1.0
    if hot > 0.0 and steps > 64:
        fall = (max(cold, 1e-6 * hot) / hot) ** (64.0 / steps)
    for step in range(steps):
        if step % 64 == 63:
            heat *= fall
        v = _random(random_state, len(s.rank))
        b = _target(s, v, random_state)
        chance = _random(random_state, 1024)
        kind = 0
        while mix[kind] <= chance:
            kind += 1
        if kind == ONE:
            if b != s.rank[v]:
                total += _try_one(s, v, b, heat, random_state)
        elif kind in (HOME_ROW, HOME_COLUMN):
            total += _try_home(s, kind, v, heat, random_state, moved, came)
        elif kind >= OWNER or b != s.rank[v]:
            total += _try_group(s, kind, v, b, heat, random_state, moved)
    return total
