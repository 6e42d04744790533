"""From blocks and maps to the flat arrays that the local search works on, and back."""

from __future__ import annotations

import numpy as np

from dcp.blocks import BlockTable
from dcp.cluster import Cluster
from dcp.cost import item_seconds, linear_seconds
from dcp.placement import Placement
from dcp.placement.refine import FAR, INTER, INTRA, LINEAR, NEAR, State

# a received byte costs its even share of the device links this many times: links are never even
_RECEIVED = 5.0
PASSES = 3.0  # bytes of a layer, over a forward pass's: backward, gradients travel as well


def empty_state(
    blocks: BlockTable, cluster: Cluster, *, model_width: int | None = None
) -> tuple[State, float]:
    """State with everything on rank 0 and uncounted, and the seconds of the mean rank's load:
    attention and linear layers (as wide as :func:`dcp.cost.linear_seconds` has it), forward and
    backward.

    Bytes have their prices; imbalance has none yet.
    """
    num_ranks, count = cluster.num_ranks, blocks.num_blocks
    pins, work = _compute(blocks, cluster)
    tokens = blocks.length.sum() / num_ranks
    linear = linear_seconds(float(tokens), blocks.spec, cluster, model_width=model_width)
    linear *= sum(blocks.batch.weights.values())
    seconds = max(work.sum() / num_ranks + linear, 1e-12)
    speed = cluster.speed_of_rank
    slow = speed.mean() / speed
    piece_block, in_bytes, out_bytes = _pieces(blocks)
    num_pieces = len(piece_block)
    by_piece = np.argsort(pins.ravel(), kind="stable")
    price = np.zeros(13)
    price[INTER] = PASSES / (cluster.num_nodes * cluster.inter_node_bandwidth)
    price[INTRA] = PASSES * _RECEIVED / (num_ranks * cluster.intra_node_bandwidth)
    price[LINEAR] = linear / seconds
    price[NEAR] = PASSES / (2 * cluster.intra_node_bandwidth)  # both ways at once
    price[FAR] = PASSES / (2 * cluster.device_network_bandwidth)
    state = State(
        pins=pins.astype(np.int32),
        work=work / seconds,
        members=(by_piece // 2).astype(np.int32),
        member_start=np.searchsorted(pins.ravel()[by_piece], np.arange(num_pieces + 1)),
        piece_block=piece_block,
        in_bytes=in_bytes,
        out_bytes=out_bytes,
        block_pieces=np.argsort(piece_block, kind="stable").reshape(
            count, num_pieces // max(count, 1)
        ),
        tokens=blocks.length * (num_ranks / max(blocks.length.sum(), 1)),
        node=cluster.node_of_rank,
        node_start=np.concatenate([[0], np.cumsum(cluster.node_sizes)]),
        rank=np.zeros(len(work), dtype=np.int64),
        owner=np.zeros(count, dtype=np.int64),
        count=np.zeros((num_pieces, num_ranks), dtype=np.int32),
        present=np.zeros((num_pieces, cluster.num_nodes), dtype=np.int32),
        slow=slow,
        load=np.zeros(num_ranks),
        held=np.zeros(num_ranks),
        link=np.zeros(num_ranks),
        price=price,
    )
    return state, seconds


def _compute(blocks: BlockTable, cluster: Cluster) -> tuple[np.ndarray, np.ndarray]:
    """Of every compute block: its query piece and key piece ``[V, 2]``, its weighted seconds."""
    groups, kv_groups, count = blocks.num_head_groups, blocks.num_kv_groups, blocks.num_blocks
    group = np.arange(groups)
    shared = group * kv_groups // groups
    query, key, work = [], [], []
    for index, (name, tiles) in enumerate(blocks.masks.items()):
        query.append(((index * count + tiles.q[:, None]) * groups + group).ravel())
        key.append(((index * count + tiles.k[:, None]) * kv_groups + shared).ravel())
        seconds = sum(
            item_seconds(
                tiles.area, blocks.length[tiles.q], blocks.length[tiles.k], blocks.spec, cluster,
                num_head_groups=groups, backward=backward,
            )
            for backward in (False, True)
        )  # fmt: skip
        work.append(np.repeat(blocks.batch.weights[name] * seconds, groups))
    num_query = len(blocks.masks) * count * groups
    pins = np.stack([np.concatenate(query), np.concatenate(key) + num_query], axis=1)
    return pins, np.concatenate(work)


def _pieces(blocks: BlockTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every piece: its data block, its bytes to a rank that needs it, and from such a rank."""
    spec, weights = blocks.spec, [blocks.batch.weights[name] for name in blocks.masks]
    block, size = [], []
    for parts in (blocks.num_head_groups, blocks.num_kv_groups):
        block.append(np.tile(np.repeat(np.arange(blocks.num_blocks), parts), len(weights)))
        each = [np.repeat(blocks.length * (weight / parts), parts) for weight in weights]
        size.append(np.concatenate(each))
    into = np.concatenate([size[0] * spec.q_token_bytes, size[1] * spec.kv_token_bytes])
    out = np.concatenate([size[0] * spec.out_token_bytes, 0.0 * size[1]])
    return np.concatenate(block), into, out


def recount(state: State) -> None:
    """Make counts, loads and bytes agree with ``rank`` and ``owner``."""
    num_ranks = len(state.load)
    pairs = (state.pins * np.int64(num_ranks) + state.rank[:, None]).ravel()
    state.count[:] = np.bincount(pairs, minlength=state.count.size).reshape(state.count.shape)
    used = state.count > 0
    state.present[:] = np.add.reduceat(used, state.node_start[:-1], axis=1)
    state.load[:] = np.bincount(state.rank, weights=state.work, minlength=num_ranks)
    state.held[:] = np.bincount(state.owner, weights=state.tokens, minlength=num_ranks)
    state.load[:] += state.held * state.price[LINEAR]
    state.load[:] *= state.slow
    state.held[:] *= state.slow
    home = state.owner[state.piece_block]
    away = used.copy()
    away[np.arange(len(home)), home] = False
    lead = np.zeros(used.shape, dtype=bool)
    pieces = np.arange(len(home))
    for first, end in zip(state.node_start[:-1], state.node_start[1:], strict=True):
        turned = first + (pieces[:, None] + np.arange(end - first)) % (end - first)
        leader = turned[pieces, np.argmax(used[pieces[:, None], turned], axis=1)]
        foreign = (state.node[home] != state.node[first]) & used[pieces, leader]
        lead[pieces[foreign], leader[foreign]] = True
    same = state.node == state.node[home][:, None]
    size = state.in_bytes + state.out_bytes
    seconds = away * np.where(lead, state.price[FAR], state.price[NEAR]) * size[:, None]
    state.link[:] = seconds.sum(axis=0)
    of_owner = (seconds * (same | lead)).sum(axis=1)
    state.link[:] += np.bincount(home, weights=of_owner, minlength=num_ranks)


def to_placement(state: State, blocks: BlockTable, **notes: object) -> Placement:
    """The state's two maps."""
    sizes = [tiles.num_tiles * blocks.num_head_groups for tiles in blocks.masks.values()]
    parts = np.split(state.rank, np.cumsum(sizes)[:-1])
    rank = {name: part.copy() for name, part in zip(blocks.masks, parts, strict=True)}
    return Placement(blocks, state.owner.copy(), rank, notes=notes)
