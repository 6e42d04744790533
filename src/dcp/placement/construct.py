"""A first placement by recursive bisection of the ranks, nodes first.

An item is what a range of ranks computes of one sequence. Each bisection packs whole items into
two halves by compute and cuts one of them, along queries or along keys, whichever costs less: the
pieces that both halves then need, and the tokens that one half would hold too many of. Data blocks
follow the half that needs them more, as far as tokens allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numba import njit

from dcp.placement.refine import INTER, INTRA, State
from dcp.ragged import split, starts

_PACKINGS = 64  # packings drawn in a bisection
_TRIED = 6  # packings whose best cut is computed exactly
_STARTS = 12  # first rows of a cut-out window tried
_CUT_WORK = 500_000  # compute blocks looked at in one search for a cut, about
_STEEP = 10.0  # price of uneven compute, in mean ranks' compute


class _Prices(NamedTuple):
    """What a cut costs, in seconds."""

    byte: float  # of a piece that both halves need
    token: float  # beyond what a half may hold
    work: float  # compute beyond ``free`` that a half gets too much of
    free: float


def construct(
    state: State, sequence: np.ndarray, *, seconds: float, slack: float, free: float, seed: int
) -> None:
    """Set every rank and owner of ``state`` afresh; it is uncounted after that.

    Args:
        sequence: sequence of each data block.
        seconds: the mean rank's compute.
        slack: tokens that a half may hold, over its share.
        free: compute that a half may have beyond its share, in shares.
    """
    rng = np.random.default_rng(seed)
    mean = state.work.sum() / len(state.load)
    state = state._replace(work=state.work / max(mean, 1e-12))
    query, key = state.piece_block[state.pins[:, 0]], state.piece_block[state.pins[:, 1]]
    by_query = np.argsort(query * len(state.owner) + key, kind="stable")
    _, counts = np.unique(sequence[query[by_query]], return_counts=True)
    items = split(by_query, counts)
    stack = [(0, len(state.load), items, np.arange(len(state.owner)))]
    while stack:
        low, high, items, blocks = stack.pop()
        if high - low == 1:
            state.rank[_joined(items)] = low
            state.owner[blocks] = low
            continue
        middle = _middle(state.node, low, high)
        speed = 1 / state.slow[low:high]
        share = float(speed[: middle - low].sum() / speed.sum())
        prices = _prices(state, low, middle, high, seconds, free)
        room = np.array([share, 1 - share]) * (slack * state.tokens[blocks].sum())
        halves = _bisect(state, items, blocks, share, room, prices, rng)
        near, far = _split_blocks(state, halves, blocks, room)
        stack.append((middle, high, halves[1], far))
        stack.append((low, middle, halves[0], near))


def _middle(node: np.ndarray, low: int, high: int) -> int:
    """Where to cut a range of ranks: at the node border nearest its middle, if it has one."""
    borders = np.flatnonzero(np.diff(node[low:high])) + low + 1
    half = (low + high) // 2
    return int(borders[np.argmin(np.abs(borders - half))]) if len(borders) else half


def _prices(state: State, low: int, middle: int, high: int, seconds: float, free: float) -> _Prices:
    crossing = state.node[low] != state.node[high - 1]
    byte = state.price[INTRA] + (state.price[INTER] if crossing else 0.0)
    per_token = (state.in_bytes.sum() + state.out_bytes.sum()) / max(state.tokens.sum(), 1e-9)
    smaller = min(middle - low, high - middle)
    return _Prices(byte, byte * per_token, _STEEP * seconds / smaller, free * smaller)


def _bisect(
    state: State,
    items: list[np.ndarray],
    blocks: np.ndarray,
    share: float,
    room: np.ndarray,
    prices: _Prices,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The items of either half: ``share`` of the compute in the first."""
    if not items:
        return [], []
    here = np.zeros(len(state.owner), dtype=np.bool_)
    here[blocks] = True
    sizes = np.array([len(item) for item in items])
    joined = _joined(items)
    work = state.work[joined[starts(sizes)]]  # thousands of short sequences have one block each
    for index in np.flatnonzero(sizes > 1).tolist():
        work[index] = state.work[items[index]].sum()
    tokens = _query_tokens(state, here, joined, np.append(0, np.cumsum(sizes)))
    cuts = []
    for whole, cut in _packings(work, tokens, share, rng):
        held = (whole * tokens).sum()
        free = room - (held, tokens.sum() - held - tokens[cut])
        by_key = _by_key(state, items[cut])
        wanted = min(max(share * work.sum() - (whole * work).sum(), 0.0), work[cut])
        found = _best_cut(state, items[cut], by_key, wanted, free, here, prices)
        cuts.append((found, whole, cut))
    found, whole, cut = min(cuts, key=lambda each: each[0][0])
    halves = (
        [item for item, first in zip(items, whole, strict=True) if first],
        [item for i, item in enumerate(items) if not whole[i] and i != cut],
    )
    inside, half = _window(state, items[cut], found)
    for side, part in ((half, items[cut][inside]), (1 - half, items[cut][~inside])):
        if len(part):
            halves[side].append(part)
    return halves


def _by_key(state: State, item: np.ndarray) -> np.ndarray:
    """The item's compute blocks in the order of their keys."""
    return item[np.argsort(state.pins[item, 1], kind="stable")]


def _window(
    state: State, item: np.ndarray, cut: tuple[float, int, int, int, int]
) -> tuple[np.ndarray, int]:
    """Which of the item's compute blocks (in their order, by query) a cut takes, for which half."""
    _, along_keys, start, end, half = cut
    if along_keys:
        taken = _by_key(state, item)[start:end]
        return np.isin(item, taken, assume_unique=True), half
    inside = np.zeros(len(item), dtype=bool)
    inside[start:end] = True
    return inside, half


def _joined(items: list[np.ndarray]) -> np.ndarray:
    """The compute blocks of all items, item after item."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *items])


@njit(cache=True)
def _query_tokens(s: State, here: np.ndarray, joined: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Tokens of the data blocks marked ``here`` whose queries each item has (in their order)."""
    totals = np.zeros(len(start) - 1)
    for item in range(len(totals)):
        last = -1
        for v in joined[start[item] : start[item + 1]]:
            block = s.piece_block[s.pins[v, 0]]
            if block != last and here[block]:
                totals[item] += s.tokens[block]
            last = block
    return totals


def _packings(
    work: np.ndarray, tokens: np.ndarray, share: float, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, int]]:
    """Likely good packings: flags of the items whole in the first half, and the item to cut."""
    n = len(work)
    noise = rng.random((_PACKINGS if n > 1 else 1, n))
    order = np.argsort(noise, axis=1)
    order[::2] = np.argsort(-work * (0.25 + noise[::2]), axis=1)
    target = share * work.sum()
    filled = np.cumsum(work[order], axis=1)
    at = np.minimum((filled < target * (1 - 1e-9)).sum(axis=1), n - 1)
    cut = order[np.arange(len(order)), at]
    whole = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(whole, order, np.arange(n) < at[:, None], axis=1)
    part = (target - (whole * work).sum(axis=1)) / np.maximum(work[cut], 1e-12)
    # a guess of the cost, in tokens: those held too many, and those of the item that is cut
    over = np.abs((whole * tokens).sum(axis=1) + part * tokens[cut] - share * tokens.sum())
    guess = np.maximum(over - 0.25 * tokens[cut], 0.0)
    guess += 0.3 * tokens[cut] * np.clip(4 * np.minimum(part, 1 - part), 0.0, 1.0)
    seen = set()
    for row in np.argsort(guess, kind="stable"):
        name = (whole[row].tobytes(), int(cut[row]))
        if name not in seen:
            seen.add(name)
            yield whole[row], int(cut[row])
        if len(seen) == _TRIED:
            return


@njit(cache=True)
def _best_cut(
    s: State,
    by_query: np.ndarray,
    by_key: np.ndarray,
    wanted: float,
    room: np.ndarray,
    here: np.ndarray,
    prices: _Prices,
) -> tuple[float, int, int, int, int]:
    """The cheapest way to give the first half ``wanted`` compute of an item.

    A cut takes a window ``[start, end)`` of the item's compute blocks ordered by query, or one of
    the ends of their order by key.

    Args:
        room: tokens that either half can still take.

    Returns ``(cost, along_keys, start, end, half)``: the window goes to ``half``.
    """
    mark = np.zeros(len(s.piece_block), dtype=np.int8)
    seen = np.zeros(len(s.owner), dtype=np.int8)
    n = len(by_query)
    starts = max(1, min(_STARTS, _CUT_WORK // (8 * n)))
    best = (np.inf, 0, 0, 0, 0)
    for along_keys in range(2):
        order = by_key if along_keys else by_query
        cum = _cumulative(s.work, order)
        line = s.pins[order, along_keys]
        edges = np.append(0, np.flatnonzero(line[1:] != line[:-1]) + 1)
        step = len(edges) if along_keys else (len(edges) + starts - 1) // starts
        for half in range(2):
            part = wanted if half == 0 else cum[n] - wanted
            for start in edges[::step]:
                if cum[start] + part > cum[n] * (1 + 1e-9):
                    break
                for end in _ends(cum, edges, start, part):
                    off = abs(cum[end] - cum[start] - part) - prices.free
                    cost = max(0.0, off) * prices.work
                    if end < start or cost >= best[0]:
                        continue
                    shared, inside, outside = _evaluate(s, order, start, end, here, mark, seen)
                    over = max(0.0, inside - room[half]) + max(0.0, outside - room[1 - half])
                    cost += shared * prices.byte + over * prices.token
                    if cost < best[0]:
                        best = (cost, along_keys, start, end, half)
    return best


@njit(cache=True)
def _cumulative(work: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Compute before each of the compute blocks of ``order``, and of all: ``[n + 1]``."""
    cum = np.zeros(len(order) + 1)
    for i in range(len(order)):
        cum[i + 1] = cum[i] + work[order[i]]
    return cum


@njit(cache=True)
def _ends(cum: np.ndarray, edges: np.ndarray, start: int, part: float) -> tuple[int, int, int]:
    """Where a window from ``start`` may end: with just ``part`` compute, and at the edges of lines
    on either side of that, where a cut costs less."""
    n = len(cum) - 1
    exact = min(np.searchsorted(cum, cum[start] + part), n)
    if exact > start and 2 * (cum[start] + part) < cum[exact] + cum[exact - 1]:
        exact -= 1
    at = np.searchsorted(edges, exact, side="right")
    return exact, edges[at - 1], edges[at] if at < len(edges) else n


@njit(cache=True)
def _evaluate(
    s: State,
    order: np.ndarray,
    start: int,
    end: int,
    here: np.ndarray,
    mark: np.ndarray,
    seen: np.ndarray,
) -> tuple[float, float, float]:
    """Cut ``order`` into ``[start, end)`` and the rest.

    Returns the bytes of the pieces that both need, and the tokens whose queries only the first and
    only the second needs, of the data blocks marked ``here``. ``mark`` (int8 ``[P]``) and ``seen``
    (int8 ``[B]``) are all zero, and left so.
    """
    shared = inside = outside = 0.0
    for i in range(len(order)):
        side = 1 if start <= i < end else 2
        for pin in range(2):
            piece = s.pins[order[i], pin]
            if mark[piece] != 3 and mark[piece] | side == 3:
                shared += s.in_bytes[piece] + s.out_bytes[piece]
            mark[piece] |= side
            if pin == 0:
                seen[s.piece_block[piece]] |= side
    for i in range(len(order)):
        query, key = s.pins[order[i]]
        block = s.piece_block[query]
        if here[block]:
            if seen[block] == 1:
                inside += s.tokens[block]
            elif seen[block] == 2:
                outside += s.tokens[block]
        mark[query] = mark[key] = seen[block] = 0
    return shared, inside, outside


def _split_blocks(
    state: State,
    halves: tuple[list[np.ndarray], list[np.ndarray]],
    blocks: np.ndarray,
    room: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Data blocks to the half that needs them more, within its room for tokens."""
    need = np.zeros((2, len(state.piece_block)))
    for half in range(2):
        need[half, state.pins[_joined(halves[half])]] = 1.0
    pieces = state.block_pieces[blocks]
    gain = ((need[0] - need[1]) * (state.in_bytes + state.out_bytes))[pieces].sum(axis=1)
    tokens = state.tokens[blocks]
    order = np.argsort(-gain / np.maximum(tokens, 1e-12), kind="stable")
    middle = np.cumsum(tokens[order]) - tokens[order] / 2
    fewest, most = np.searchsorted(middle, (tokens.sum() - room[1], room[0]))
    count = int(np.clip((gain > 0).sum(), fewest, max(fewest, most)))
    return blocks[order[:count]], blocks[order[count:]]
