"""From blocks and maps to the flat arrays that the local search works on, and back."""

from __future__ import annotations

import numpy as np

from dcp.blocks import BlockTable
from dcp.cluster import Cluster
from dcp.cost import attention_seconds
from dcp.placement import Placement
from dcp.placement.refine import INTER, INTRA, State

# a received byte costs its even share of the device links this many times: links are never even
_RECEIVED = 5.0


def empty_state(blocks: BlockTable, cluster: Cluster) -> tuple[State, float]:
    """State with everything on rank 0 and uncounted, and the seconds of the mean rank's compute.

    Bytes have their prices; imbalance has none yet.
    """
    num_ranks, count = cluster.num_ranks, blocks.num_blocks
    pins, area = _compute(blocks)
    piece_block, in_bytes, out_bytes = _pieces(blocks)
    num_pieces = len(piece_block)
    by_piece = np.argsort(pins.ravel(), kind="stable")
    price = np.zeros(8)
    price[INTER] = 1 / (cluster.num_nodes * cluster.inter_node_bandwidth)
    price[INTRA] = _RECEIVED / (num_ranks * cluster.intra_node_bandwidth)
    state = State(
        pins=pins.astype(np.int32),
        work=area * (num_ranks / max(area.sum(), 1e-9)),
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
        rank=np.zeros(len(area), dtype=np.int64),
        owner=np.zeros(count, dtype=np.int64),
        count=np.zeros((num_pieces, num_ranks), dtype=np.int32),
        present=np.zeros((num_pieces, cluster.num_nodes), dtype=np.int32),
        load=np.zeros(num_ranks),
        held=np.zeros(num_ranks),
        recv=np.zeros(num_ranks),
        price=price,
    )
    return state, float(attention_seconds(1.0, blocks.spec, cluster) * area.sum() / num_ranks)


def _compute(blocks: BlockTable) -> tuple[np.ndarray, np.ndarray]:
    """Of every compute block: its query piece and key piece ``[V, 2]``, its weighted pairs."""
    groups, kv_groups, count = blocks.num_head_groups, blocks.num_kv_groups, blocks.num_blocks
    group = np.arange(groups)
    shared = group * kv_groups // groups
    query, key, area = [], [], []
    for index, (name, tiles) in enumerate(blocks.masks.items()):
        query.append(((index * count + tiles.q[:, None]) * groups + group).ravel())
        key.append(((index * count + tiles.k[:, None]) * kv_groups + shared).ravel())
        area.append(np.repeat(tiles.area * (blocks.batch.weights[name] / groups), groups))
    num_query = len(blocks.masks) * count * groups
    pins = np.stack([np.concatenate(query), np.concatenate(key) + num_query], axis=1)
    return pins, np.concatenate(area)


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
    home = state.owner[state.piece_block]
    away = used.copy()
    away[np.arange(len(home)), home] = False
    state.recv[:] = state.in_bytes @ away
    state.recv[:] += np.bincount(
        home, weights=state.out_bytes * away.sum(axis=1), minlength=num_ranks
    )


def to_placement(state: State, blocks: BlockTable, **notes: object) -> Placement:
    """The state's two maps."""
    sizes = [tiles.num_tiles * blocks.num_head_groups for tiles in blocks.masks.values()]
    parts = np.split(state.rank, np.cumsum(sizes)[:-1])
    rank = {name: part.copy() for name, part in zip(blocks.masks, parts, strict=True)}
    return Placement(blocks, state.owner.copy(), rank, notes=notes)
