"""What the searching strategies share: the choice of blocks, of owners, and the order of moves."""

from __future__ import annotations

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable, build_blocks, cut_evenly
from dcp.cluster import Cluster
from dcp.cost import KERNEL_TILE
from dcp.placement import Goal, Placement, refine
from dcp.placement.balance import balance_load, balance_tokens
from dcp.placement.level import level
from dcp.placement.refine import LINEAR, State, anneal
from dcp.placement.state import empty_state, recount, to_placement
from dcp.ragged import expand, split

_BLOCK = 1.10  # m blocks a rank have at most this share of its tokens, over m
_UNEVEN = 0.002  # load of the busiest rank beyond the mean that nothing is paid for
_HIDDEN = 0.5  # of a rank's attention, under which its transfers hide
DEFAULT = Goal()
_HEAVY = 2.0
_CHEAP = 0.05  # charge on uneven tokens below which their limit is charged, too
_MEMORY = 0.2  # that charge,
_NEAR = 0.7  # from this part of the way to the limit on,
_FEW = 3  # and from so many blocks a rank on
_MOST_BLOCKS = 8  # per rank
_FINE = 0.03  # largest compute block, of the mean rank's compute
_OWNERS = {"owner": 1.0, "owner_swap": 2.0}
_MOVES = 5  # a rank, off the busiest ones: more were never made to any use
_MULTIPLE = 64  # tokens by which edges move: odd lengths cost kernel tiles
_COMPUTE = {**dict.fromkeys(("row", "column", "home_row", "home_column"), 1.0), "one": 10.0}
_EVERYTHING = {
    **dict.fromkeys(("row", "column", "home_row", "home_column"), 1.0),
    **dict.fromkeys(("owner", "owner_swap", "block", "block_swap"), 0.5),
    "one": 10.0,
}
# by variant: what uneven tokens and attention weigh beside their uneven sum; what a rank whose
# links are busy for twice the mean pays for a second more
_WEIGHTS = ((0.3, 4.0), (0.1, 4.0), (1.0, 4.0), (0.3, 15.0), (1.0, 1.0))
# moves, share of the steps, heat (in scales, see improve), steepness of the charges
_STAGES = (
    (_OWNERS, 0.05, 0.0, 100.0),
    (_EVERYTHING, 0.3, 1e-3, 100.0),
    (_EVERYTHING, 0.3, 3e-4, 200.0),
    (_EVERYTHING, 0.35, 0.0, 600.0),
)


def choose_blocks(
    batch: SequenceBatch,
    spec: AttentionSpec,
    cluster: Cluster,
    *,
    block_size: int | None = None,
    max_tiles: int = 500_000,
) -> BlockTable:
    """Cut the batch so that tokens and compute can be balanced with few blocks.

    With ``m`` blocks a rank of at most ``1.1 * mean / m`` tokens, and no more than ``m``
    large blocks per rank in all, dealing the blocks out evenly balances the tokens. The smallest
    such ``m`` is taken whose compute blocks are fine enough, too.
    """
    if block_size is not None:
        return build_blocks(batch, spec, block_size=block_size)
    num_ranks = cluster.num_ranks
    mean = batch.num_tokens / num_ranks
    blocks = None
    for per_rank in range(1, _MOST_BLOCKS + 1):
        size = max(int(_BLOCK * mean / per_rank), 1)
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
    return _cut_heavy_rows(blocks, num_ranks)


def _cut_heavy_rows(blocks: BlockTable, num_ranks: int) -> BlockTable:
    """Cut data blocks whose queries have more compute than two ranks' shares (few queries that see
    every key), down to a kernel's tile, so that several ranks and cards can serve them."""
    weights = blocks.batch.weights
    row = np.zeros(blocks.num_blocks)
    for name, tiles in blocks.masks.items():
        row += weights[name] * np.bincount(tiles.q, tiles.area, minlength=blocks.num_blocks)
    share = row * num_ranks / max(row.sum(), 1.0)
    parts = np.where(share > _HEAVY, np.minimum(share, blocks.length // KERNEL_TILE), 1)
    if (parts <= 1).all():
        return blocks
    of, index = expand(np.maximum(parts, 1).astype(np.int64))
    size = -(-blocks.length // (KERNEL_TILE * np.maximum(parts, 1).astype(np.int64))) * KERNEL_TILE
    start, end = (np.minimum(at * size[of], blocks.length[of]) for at in (index, index + 1))
    keep = end > start
    counts = np.bincount(blocks.sequence[of][keep], minlength=len(blocks.batch.seqlens))
    lengths = split((end - start)[keep], counts)
    return build_blocks(blocks.batch, blocks.spec, block_lengths=lengths)


def _num_tiles(blocks: BlockTable) -> int:
    return sum(tiles.num_tiles for tiles in blocks.masks.values())


def _fine_enough(blocks: BlockTable, num_ranks: int) -> bool:
    """True where the largest compute block is a small part of a rank's share."""
    weights = blocks.batch.weights
    total = sum(weights[name] * tiles.area.sum() for name, tiles in blocks.masks.items())
    largest = max(weights[name] * tiles.area.max(initial=0) for name, tiles in blocks.masks.items())
    return bool(largest * num_ranks <= _FINE * total)


def improve(
    state: State, seconds: float, cluster: Cluster, *, seed: int = 0, goal: Goal = DEFAULT
) -> None:
    """Refine a counted state: owners first, then compute and owners together, cooling to greedy.

    Args:
        seconds: the mean rank's load.
    """
    steps = _steps(state)
    random_state = _random_state(seed)
    best = Best(state, seconds, goal=goal)
    best.look()
    for moves, share, heat, steep in _STAGES:
        _charge(state, seconds * steep, goal)
        hot = heat * seconds
        anneal(state, int(steps * share), hot, 0.3 * hot, _mix(moves), random_state)
        best.look()
    best.restore()
    balance_tokens(state, goal.token_limit, 4 * len(state.held))
    best.look()
    balance_load(state, 1 + _free(goal), _MOVES * len(state.load))
    best.look()
    best.restore()


def finish(
    placement: Placement, cluster: Cluster, *, seed: int = 0, goal: Goal = DEFAULT
) -> Placement:
    """Move the blocks' edges until tokens are level, then settle compute anew."""
    levelled = level(placement, cluster, multiple=_MULTIPLE)
    if levelled is placement:
        return placement
    blocks = levelled.blocks
    state, seconds = empty_state(blocks, cluster, model_width=goal.model_width)
    state.owner[:], state.rank[:] = levelled.owner, np.concatenate(list(levelled.rank.values()))
    recount(state)
    best = Best(state, seconds, goal=goal)
    best.look()
    steps, random_state = _steps(state) // 4, _random_state(seed)
    for steep in (200.0, 600.0):
        _charge(state, seconds * steep, goal)
        anneal(state, steps // 2, 0.0, 0.0, _mix(_COMPUTE), random_state)
        best.look()
    balance_load(state, 1 + _free(goal), _MOVES * len(state.load))
    best.look()
    best.restore()
    return to_placement(state, blocks, **placement.notes)


def _steps(state: State) -> int:
    members = max(len(state.rank) / max(len(state.piece_block), 1), 1.0)  # what a row's move takes
    return int(np.clip(30 * len(state.rank), 30_000, min(250_000, 2e7 / members)))


def improve_owners(state: State, seconds: float, *, seed: int = 0, goal: Goal = DEFAULT) -> None:
    """Refine the owners alone, quickly."""
    _charge(state, 100.0 * seconds, goal)
    steps = min(4000 + 20 * len(state.owner), 200_000)
    anneal(state, steps, 0.0, 0.0, _mix(_OWNERS), _random_state(seed))


def _free(goal: Goal) -> float:
    return _UNEVEN if goal.tolerance is None else goal.tolerance


class Best:
    """The best of the placements that one state goes through.

    Args:
        seconds: the mean rank's load.
        lenient: towards imbalance, which later search removes.

    ``score`` is that of the best: about the seconds of a layer.
    """

    def __init__(
        self, state: State, seconds: float, *, goal: Goal = DEFAULT, lenient: bool = False
    ) -> None:
        self.state, self.seconds, self.goal, self.lenient = state, seconds, goal, lenient
        self.score = np.inf
        self.rank, self.owner = state.rank.copy(), state.owner.copy()

    def look(self) -> None:
        """Keep the state as it is now if it is the best so far."""
        score = estimate(self.state, self.seconds, self.goal, lenient=self.lenient)
        if score < self.score:
            self.score = score
            self.rank, self.owner = self.state.rank.copy(), self.state.owner.copy()

    def restore(self) -> None:
        """Bring the best back, counted."""
        self.state.rank[:], self.state.owner[:] = self.rank, self.owner
        recount(self.state)


def estimate(state: State, seconds: float, goal: Goal, *, lenient: bool = False) -> float:
    """About the seconds of a layer: of the busiest rank with what its links do not hide, a little
    for all bytes, and a charge for tokens that do not fit and load beyond what is asked for."""
    attention = state.load - state.held * state.price[LINEAR]
    exposed = np.maximum(state.link - _HIDDEN * seconds * attention, 0.0)
    if lenient:
        bound = seconds * (0.75 + 0.25 * state.load.max()) + exposed.mean()
    else:
        bound = float((seconds * state.load + exposed).max())
    over = max(state.held.max() - goal.token_limit, 0.0)
    if goal.tolerance is not None:
        over += max(state.load.max() - 1 - goal.tolerance, 0.0)
    return float(bound + state.link.mean() / 2 + 30 * over * seconds)


def _charge(state: State, steep: float, goal: Goal) -> None:
    """Set what ranks cost beyond their share of load, of tokens and of attention, each in seconds,
    and for links that are busier than the mean's.

    Load alone would do if ranks did not wait for each other: one with many tokens reaches its
    attention late, and those that need its keys with it.
    """
    free, linear = _free(goal) / 2, state.price[LINEAR]  # a soft charge is overstepped a little
    skew, links = _WEIGHTS[goal.variant % len(_WEIGHTS)]
    mean = max(float(state.link.mean()), 1e-9)
    # where linear layers cost next to nothing, tokens are dear only near their limit; a few large
    # blocks could not move under such a charge
    coarse = len(state.owner) < _FEW * len(state.held)
    memory = 0.0 if coarse else max(1 - skew * linear**2 / _CHEAP, 0.0)
    held = 1 + free + memory * _NEAR * (goal.token_limit - 1)
    state.price[refine.LOAD_CAP : refine.LINEAR] = (
        1 + free, steep, held, steep * max(skew * linear**2, _MEMORY * memory), mean, links / mean,
        (1 + free) * (1 - linear), steep * skew,
    )  # fmt: skip


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
