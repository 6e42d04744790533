"""From blocks and maps to the flat arrays that the local search works on, and back."""

from __future__ import annotations

import numpy as np

from dcp.blocks import BlockTable
from dcp.cluster import Cluster
from dcp.cost import attention_seconds
from dcp.placement import Placement
from dcp.placement.refine import State

# a received byte costs its even share of the device links this many times: links are never even
_RECEIVED = 5.0


def empty_state(blocks: BlockTable, cluster: Cluster) -> tuple[State, float]:
    """State with everything on rank 0 and uncounted, and the seconds of the mean rank's compute.

    Bytes have their prices; imbalance has none yet.
    """
    batch, spec, num_ranks = blocks.batch, blocks.spec, cluster.num_ranks
    groups, kv_groups, count = blocks.num_head_groups, blocks.num_kv_groups, blocks.num_blocks
    group = np.arange(groups)
    query, key, area, query_size, key_size = [], [], [], [], []
    for index, (name, tiles) in enumerate(blocks.masks.items()):
        weight = batch.weights[name]
        query.append(((index * count + tiles.q[:, None]) * groups + group).ravel())
        shared = group * kv_groups // groups
        key.append(((index * count + tiles.k[:, None]) * kv_groups + shared).ravel())
        area.append(np.repeat(tiles.area * (weight / groups), groups))
        query_size.append(np.repeat(blocks.length * (weight / groups), groups))
        key_size.append(np.repeat(blocks.length * (weight / kv_groups), kv_groups))
    masks = len(blocks.masks)
    num_query = masks * count * groups
    pins = np.stack([np.concatenate(query), np.concatenate(key) + num_query], axis=1)
    work = np.concatenate(area)
    size = [np.concatenate(query_size), np.concatenate(key_size)]
    piece_block = np.concatenate(
        [
            np.tile(np.repeat(np.arange(count), groups), masks),
            np.tile(np.repeat(np.arange(count), kv_groups), masks),
        ]
    )
    num_pieces = len(piece_block)
    by_piece = np.argsort(pins.ravel(), kind="stable")
    seconds = attention_seconds(1.0, spec, cluster) * work.sum() / num_ranks
    state = State(
        pins=pins.astype(np.int32),
        work=work * (num_ranks / max(work.sum(), 1e-9)),
        members=(by_piece // 2).astype(np.int32),
        member_start=np.searchsorted(pins.ravel()[by_piece], np.arange(num_pieces + 1)),
        piece_block=piece_block,
        in_bytes=np.concatenate([size[0] * spec.q_token_bytes, size[1] * spec.kv_token_bytes]),
        out_bytes=np.concatenate([size[0] * spec.out_token_bytes, 0.0 * size[1]]),
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
        load=np.zeros(num_ranks),
        held=np.zeros(num_ranks),
        recv=np.zeros(num_ranks),
        price=np.zeros(8),
    )
    state.price[:2] = (
        1 / (cluster.num_nodes * cluster.inter_node_bandwidth),
        _RECEIVED / (num_ranks * cluster.intra_node_bandwidth),
    )
    return state, seconds


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
