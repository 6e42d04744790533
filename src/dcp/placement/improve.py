"""What the searching strategies share: the choice of blocks, of owners, and the order of moves."""

from __future__ import annotations

import numpy as np
from numba import njit

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable, build_blocks, cut_evenly
from dcp.cluster import Cluster
from dcp.cost import KERNEL_TILE
from dcp.placement import refine
from dcp.placement.balance import balance_load, balance_tokens
from dcp.placement.refine import INTER, INTRA, State, anneal
from dcp.placement.state import recount

TOKEN_LIMIT = 1.10  # tokens of the fullest rank over the mean's
TOLERANCE = 0.03  # compute that a finished placement may leave the busiest rank beyond the mean
_MOST_BLOCKS = 8  # per rank
_FINE = 0.03  # largest compute block, of the mean rank's compute
_OWNERS = {"owner": 1.0, "owner_swap": 2.0}
_EVERYTHING = {
    **dict.fromkeys(("row", "column"), 2.0),
    **dict.fromkeys(("owner", "owner_swap", "block", "block_swap"), 0.5),
    "one": 10.0,
}
# moves, share of the steps, heat (in scales, see improve), steepness of the charges
_STAGES = (
    (_OWNERS, 0.05, 0.0, 30.0),
    (_EVERYTHING, 0.3, 3e-3, 30.0),
    (_EVERYTHING, 0.3, 1e-3, 60.0),
    (_EVERYTHING, 0.35, 0.0, 200.0),
)
# a receiver at twice the mean pays this for a byte, in times what the busiest one would wait
_RECV_FACTOR = 3.0


def choose_blocks(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    max_tiles: int = 500_000,
) -> BlockTable:
    """Cut the batch so that tokens and compute can be balanced with few blocks.

    With ``m`` blocks a rank of at most ``TOKEN_LIMIT * mean / m`` tokens, and no more than ``m``
    large blocks per rank in all, dealing the blocks out evenly balances the tokens. The smallest
    such ``m`` is taken whose compute blocks are fine enough, too.
    """
    if block_size is not None:
        return build_blocks(batch, spec, block_size=block_size)
    num_ranks = cluster.num_ranks
    mean = batch.num_tokens / num_ranks
    blocks = None
    for per_rank in range(1, _MOST_BLOCKS + 1):
        size = max(int(TOKEN_LIMIT * mean / per_rank), 1)
        multiple = KERNEL_TILE if size >= 2 * KERNEL_TILE else 1
        size -= size % multiple
        large = np.ceil(batch.seqlens / size)[batch.seqlens > size / 2].sum()
        if large > num_ranks * per_rank and per_rank < _MOST_BLOCKS:
            continue
        lengths = cut_evenly(batch.seqlens, size, multiple=multiple)
        finer = build_blocks(batch, spec, block_lengths=lengths)
        if blocks is not None and _num_tiles(finer) > max_tiles:
            break
        blocks = finer
        if size == 1 or _fine_enough(blocks, num_ranks):
            break
    assert blocks is not None
    return blocks


def _num_tiles(blocks: BlockTable) -> int:
    return sum(tiles.num_tiles for tiles in blocks.masks.values())


def _fine_enough(blocks: BlockTable, num_ranks: int) -> bool:
    """True where the largest compute block is a small part of a rank's share."""
    weights = blocks.batch.weights
    total = sum(weights[name] * tiles.area.sum() for name, tiles in blocks.masks.items())
    largest = max(weights[name] * tiles.area.max(initial=0) for name, tiles in blocks.masks.items())
    return bool(largest * num_ranks <= _FINE * total)


def settle_owners(state: State) -> None:
    """Give each data block to the rank that saves most by it, within ``TOKEN_LIMIT``; uncounted."""
    into, out = state.in_bytes[:, None], state.out_bytes[:, None]
    saving = (state.count > 0) * ((into + out) * state.price[INTRA])
    there = (state.present > 0) * into + state.present * out
    saving += (there * state.price[INTER])[:, state.node]
    state.owner[:] = _deal(saving[state.block_pieces].sum(axis=1), state.tokens, TOKEN_LIMIT)


@njit(cache=True)
def _deal(saving: np.ndarray, tokens: np.ndarray, limit: float) -> np.ndarray:
    """Blocks to ranks, those first that would lose most by their second choice."""
    num_blocks, num_ranks = saving.shape
    regret = np.zeros(num_blocks)
    for b in range(num_blocks):
        best = second = -1.0
        for r in range(num_ranks):
            if saving[b, r] > best:
                best, second = saving[b, r], best
            elif saving[b, r] > second:
                second = saving[b, r]
        regret[b] = second - best
    held = np.zeros(num_ranks)
    owner = np.zeros(num_blocks, dtype=np.int64)
    for b in np.argsort(regret, kind="mergesort"):
        choice, emptiest = -1, 0
        for r in range(num_ranks):
            if held[r] + tokens[b] <= limit and (choice < 0 or saving[b, r] > saving[b, choice]):
                choice = r
            if held[r] < held[emptiest]:
                emptiest = r
        owner[b] = choice if choice >= 0 else emptiest
        held[owner[b]] += tokens[b]
    return owner


def improve(
    state: State,
    seconds: float,
    cluster: Cluster,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    token_limit: float = TOKEN_LIMIT,
    token_price: float = 1.0,
) -> None:
    """Refine a counted state: owners first, then compute and owners together, cooling to greedy.

    Args:
        seconds: the mean rank's compute.
        tolerance: compute of the busiest rank beyond the mean that is not charged for in the end.
        token_limit: tokens of the fullest rank over the mean's, likewise.
        token_price: what a share of tokens beyond that costs, over one of compute.
    """
    members = max(len(state.rank) / max(len(state.piece_block), 1), 1.0)  # what a row's move takes
    steps = int(np.clip(60 * len(state.rank), 60_000, min(500_000, 4e7 / members)))
    scale = max(seconds, _busiest_receiver(state, cluster) / 2)
    random_state = _random_state(seed)
    limits = (1 + tolerance, token_limit)
    best = Best(state, seconds, cluster, strictness=30.0, limits=limits, token_price=token_price)
    best.look()
    for moves, share, heat, steep in _STAGES:
        # a soft charge is overstepped a little: compute is charged from half the tolerance on
        caps = (1 + tolerance / 2, token_limit)
        _charge(state, scale * steep, cluster, caps, token_price)
        hot = heat * scale
        anneal(state, int(steps * share), hot, 0.3 * hot, _mix(moves), random_state)
        best.look()
    best.restore()
    balance_tokens(state, token_limit, 4 * len(state.held))
    best.look()
    balance_load(state, 1 + tolerance, 20 * len(state.load))
    best.look()
    best.restore()


def improve_owners(state: State, seconds: float, cluster: Cluster, *, seed: int = 0) -> None:
    """Refine the owners alone, quickly."""
    scale = max(seconds, _busiest_receiver(state, cluster) / 2)
    _charge(state, 30.0 * scale, cluster, (1 + TOLERANCE / 2, TOKEN_LIMIT))
    steps = min(4000 + 20 * len(state.owner), 200_000)
    anneal(state, steps, 0.0, 0.0, _mix(_OWNERS), _random_state(seed))


class Best:
    """The best of the placements that one state goes through.

    Args:
        seconds: the mean rank's compute.
        strictness: what compute and tokens beyond the limits weigh.
        limits: the busiest rank's compute and the fullest rank's tokens, over the mean's.
        token_price: what tokens beyond the limit weigh, over compute.

    ``score`` is that of the best: seconds of a forward pass, and a charge for imbalance.
    """

    def __init__(
        self,
        state: State,
        seconds: float,
        cluster: Cluster,
        *,
        strictness: float,
        limits: tuple[float, float] = (1 + TOLERANCE, TOKEN_LIMIT),
        token_price: float = 1.0,
    ) -> None:
        self.state, self.seconds, self.cluster = state, seconds, cluster
        self.strictness, self.limits, self.token_price = strictness, limits, token_price
        self.score = np.inf
        self.rank, self.owner = state.rank.copy(), state.owner.copy()

    def look(self) -> None:
        """Keep the state as it is now if it is the best so far."""
        score = self._score()
        if score < self.score:
            self.score = score
            self.rank, self.owner = self.state.rank.copy(), self.state.owner.copy()

    def restore(self) -> None:
        """Bring the best back, counted."""
        self.state.rank[:], self.state.owner[:] = self.rank, self.owner
        recount(self.state)

    def _score(self) -> float:
        """Seconds: the bound, all bytes over all device links, and a charge for imbalance."""
        state, bandwidth = self.state, self.cluster.intra_node_bandwidth
        pieces = np.arange(len(state.piece_block))
        home = state.node[state.owner[state.piece_block]]
        foreign = (state.present > 0).sum(axis=1) - (state.present[pieces, home] > 0)
        outward = state.present.sum(axis=1) - state.present[pieces, home]
        crossing = (foreign * state.in_bytes + outward * state.out_bytes).sum()
        moving = crossing * state.price[INTER]
        moving += (state.recv.max() + state.recv.mean()) / bandwidth
        bound = self.seconds * state.load.max() + moving
        most_load, most_tokens = self.limits
        over = max(state.load.max() - most_load, 0.0)
        over += self.token_price * max(state.held.max() - most_tokens, 0.0)
        return float(bound + self.strictness * over * max(self.seconds, bound / 2))


def _busiest_receiver(state: State, cluster: Cluster) -> float:
    return float(state.recv.max(initial=0.0)) / cluster.intra_node_bandwidth


def _charge(
    state: State,
    steep: float,
    cluster: Cluster,
    caps: tuple[float, float],
    token_price: float = 1.0,
) -> None:
    """Set what ranks cost beyond ``caps`` of compute and tokens, over the mean's, and beyond the
    mean of the received bytes as they are now."""
    held = (state.in_bytes + state.out_bytes).sum() / len(state.load)
    mean = max(float(state.recv.mean()), 0.1 * held, 1.0)
    busy = _RECV_FACTOR / (cluster.intra_node_bandwidth * mean)
    state.price[refine.LOAD_CAP :] = (caps[0], steep, caps[1], steep * token_price, mean, busy)


def _random_state(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1 << 62, 1).astype(np.uint64)


def _mix(chances: dict[str, float]) -> np.ndarray:
    """Cumulative chances in 1/1024 of the kinds of move named in :mod:`dcp.placement.refine`."""
    each = np.zeros(refine.NUM_KINDS)
    for name, chance in chances.items():
        each[getattr(refine, name.upper())] = chance
    edges: np.ndarray = np.floor(np.cumsum(each) / each.sum() * 1024).astype(np.int64)
    edges[np.flatnonzero(each)[-1] :] = 1024
    return edges
