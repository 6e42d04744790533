"""Balancing what the annealer leaves: the busiest rank gives away, one cheapest move at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from dcp.placement.refine import LOAD_WEIGHT, TOKEN_WEIGHT, State, move, move_cost, shift_owner

_SPARE = 8  # least loaded ranks considered besides those of the node and the owners


@njit(cache=True)
def balance_load(s: State, limit: float, most_moves: int) -> int:
    """Move compute blocks off the busiest rank until none has more than ``limit``.

    Of all moves the one is made that costs least (in bytes and busy receivers) for the excess it
    takes away. Ends early where nothing helps. Returns the number of moves.
    """
    weight = s.price[LOAD_WEIGHT]
    s.price[LOAD_WEIGHT] = 0.0
    start, members = _by_rank(s)
    moves = 0
    while moves < most_moves:
        a = int(np.argmax(s.load))
        if s.load[a] <= limit:
            break
        spare = _least(s.load, _SPARE)
        best, best_v, best_b = np.inf, -1, -1
        for i in range(start[a], start[a + 1]):
            v = members[i]
            if s.rank[v] == a and s.work[v] > 0.0:
                cost, b = _cheapest_rank(s, v, a, spare, limit)
                if cost < best:
                    best, best_v, best_b = cost, v, b
        if best_v < 0:
            break
        move(s, best_v, best_b)
        moves += 1
    s.price[LOAD_WEIGHT] = weight
    return moves


@njit(cache=True)
def _least(load: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` least loaded ranks, least first: cheaper than to sort all."""
    found = np.empty(min(count, len(load)), dtype=np.int64)
    num_found = 0
    for rank in range(len(load)):
        at = num_found
        while at > 0 and load[rank] < load[found[at - 1]]:
            at -= 1
        if at < len(found):
            num_found = min(num_found + 1, len(found))
            for i in range(num_found - 1, at, -1):
                found[i] = found[i - 1]
            found[at] = rank
    return found


@njit(cache=True)
def _by_rank(s: State) -> tuple[np.ndarray, np.ndarray]:
    """Compute blocks of each rank, as they are now: ``(start [N + 1], compute blocks)``."""
    members = np.argsort(s.rank, kind="mergesort")
    return np.searchsorted(s.rank[members], np.arange(len(s.load) + 1)), members


@njit(cache=True)
def _cheapest_rank(s: State, v: int, a: int, spare: np.ndarray, limit: float) -> tuple[float, int]:
    """The best rank for ``v`` to go to, and its cost for the excess that it takes away."""
    best, choice = np.inf, -1
    first, last = s.node_start[s.node[a]], s.node_start[s.node[a] + 1]
    here = s.work[v] * s.slow[a]
    taken = min(here, s.load[a] - limit)
    full = max(limit, s.load[a] - 0.25 * here)  # so that the busiest gets less busy
    for i in range(last - first + len(spare) + 2):
        if i < last - first:
            b = first + i
        elif i < last - first + 2:
            b = s.owner[s.piece_block[s.pins[v, i - (last - first)]]]
        else:
            b = spare[i - (last - first) - 2]
        if i >= last - first and first <= b < last:
            continue  # was looked at with the node's
        if b != a and s.load[b] + s.work[v] * s.slow[b] <= full:
            cost = move_cost(s, v, b) / taken
            if cost < best:
                best, choice = cost, b
    return best, choice


@njit(cache=True)
def balance_tokens(s: State, limit: float, most_moves: int) -> int:
    """Give data blocks of the fullest rank away until none holds more than ``limit``.

    As :func:`balance_load`: the cheapest move for the excess that it takes away, one at a time.
    """
    weight = s.price[TOKEN_WEIGHT]
    s.price[TOKEN_WEIGHT] = 0.0
    moves = 0
    while moves < most_moves:
        a = int(np.argmax(s.held))
        if s.held[a] <= limit:
            break
        block, b = _cheapest_block(s, a, limit)
        if block < 0:
            break
        shift_owner(s, block, b)
        moves += 1
    s.price[TOKEN_WEIGHT] = weight
    return moves


@njit(cache=True)
def _cheapest_block(s: State, a: int, limit: float) -> tuple[int, int]:
    """The best data block of rank ``a`` to give away, and the best rank for it; -1: none."""
    best, best_block, best_b = np.inf, -1, -1
    for each in np.flatnonzero(s.owner == a):
        block = int(each)
        size = s.tokens[block] * s.slow[a]
        full = max(limit, s.held[a] - 0.25 * size)
        for b in range(len(s.held)):
            if b != a and s.held[b] + s.tokens[block] * s.slow[b] <= full:
                cost = shift_owner(s, block, b) / min(size, s.held[a] + size - limit)
                shift_owner(s, block, a)
                if cost < best:
                    best, best_block, best_b = cost, block, b
    return best_block, best_b
