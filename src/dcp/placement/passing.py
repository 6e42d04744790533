"""Where cached and new tokens meet: at the query's owner, at the key's, or block by block.

For batches whose sequences may have cached tokens (``SequenceBatch(cached=…)``): cached data blocks
stay where they are, new tokens are shared out in zigzag. After "Context Parallelism for Scalable
Million-Token Inference" (arXiv 2411.01783), algorithms 2 to 4; the last rule is our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable, build_blocks
from dcp.cluster import Cluster
from dcp.cost import attention_seconds
from dcp.placement import Placement, Route
from dcp.placement.grids import deal_chunks

_SWEEPS = 4  # over all choices, at most; a sweep that changes nothing is the last


def place_tokens(
    batch: SequenceBatch, spec: AttentionSpec, num_ranks: int, shifts: Sequence[int]
) -> tuple[BlockTable, np.ndarray]:
    """Blocks of cached and new tokens, and the owner of each.

    A sequence's cached tokens are one block per rank that holds any. Its new tokens are cut in 2N
    chunks that differ by one token at most; chunks ``c`` and ``2N - 1 - c`` go to rank
    ``(c + shift) % N``, so that ranks have equal work under causality, and a single token's owner
    is the shift.
    """
    chunks = np.arange(2 * num_ranks)
    chunk_rank = np.minimum(chunks, chunks[::-1])
    lengths, owners = [], [np.zeros(0, dtype=np.int64)]
    cached = batch.cached if batch.cached.shape[1] else np.zeros((len(batch.seqlens), num_ranks))
    new = batch.seqlens - batch.num_cached
    for held, tokens, shift in zip(cached.astype(np.int64), new.tolist(), shifts, strict=True):
        length = np.concatenate([held, deal_chunks(tokens, 2 * num_ranks, chunks)])
        owner = np.concatenate([np.arange(num_ranks), (chunk_rank + shift) % num_ranks])
        lengths.append(length[length > 0])
        owners.append(owner[length > 0])
    blocks = build_blocks(batch, spec, block_lengths=lengths)
    return blocks, np.concatenate(owners)


def pass_kv(blocks: BlockTable, owner: np.ndarray, cluster: Cluster) -> Placement:
    """Algorithm 2: queries stay, keys and values go round the ring, N - 1 hops each."""
    return _pass_round(blocks, owner, cluster.num_ranks, queries=False)


def pass_q(blocks: BlockTable, owner: np.ndarray, cluster: Cluster) -> Placement:
    """Algorithm 3: keys and values stay, queries go round the ring; outputs and log-sum-exps come
    home in one exchange. With one new token per sequence: algorithm 4, batched decode."""
    return _pass_round(blocks, owner, cluster.num_ranks, queries=True)


def _pass_round(
    blocks: BlockTable, owner: np.ndarray, num_ranks: int, *, queries: bool
) -> Placement:
    """Compute where one side of each tile is; the other side, ``queries`` or keys, comes round."""
    at, comes = {}, {}
    for name, tiles in blocks.masks.items():
        query, key = owner[tiles.q], owner[tiles.k]
        at[name], comes[name] = (key, query) if queries else (query, key)
    moving = np.flatnonzero(~blocks.is_cached) if queries else np.arange(blocks.num_blocks)
    route = _round_the_ring(moving, owner, num_ranks)
    return Placement(
        blocks,
        owner,
        at,
        division={name: (rank - comes[name]) % num_ranks for name, rank in at.items()},
        num_divisions=num_ranks,
        kv_route=None if queries else route,
        q_route=route if queries else None,
        results_together=queries,
        gradients_travel=not queries,
    )


def pass_either(blocks: BlockTable, owner: np.ndarray, cluster: Cluster) -> Placement:
    """Each compute block at its query's or at its key's owner, and only what is needed travels.

    The compute blocks of one sequence between one owner of queries and one of keys share their
    transfers, so they are decided together. Each such group starts where it costs fewer bytes; then
    groups change sides one at a time while that lowers the time of the ranks it touches, taken as
    the longest of their compute and of their links' traffic out and in.
    """
    spec, num_ranks = blocks.spec, cluster.num_ranks
    rank = {}
    for name, tiles in blocks.masks.items():
        query, key = owner[tiles.q], owner[tiles.k]
        sequence = blocks.sequence[tiles.q]
        apart = np.flatnonzero(query != key)
        group_key = (sequence[apart] * num_ranks + query[apart]) * num_ranks + key[apart]
        groups, group = np.unique(group_key, return_inverse=True)
        ends = np.stack([groups // num_ranks % num_ranks, groups % num_ranks], axis=1)
        seconds = np.asarray(attention_seconds(tiles.area, spec, cluster))
        work = np.bincount(group, weights=seconds[apart], minlength=len(groups))
        q_tokens = _distinct(group, tiles.q[apart], blocks.length, len(groups))
        kv_tokens = _distinct(group, tiles.k[apart], blocks.length, len(groups))
        at_home = query == key
        own_work = np.bincount(query[at_home], weights=seconds[at_home], minlength=num_ranks)
        passes_q = _choose_sides(
            ends,
            work,
            own_work,
            kv_seconds=kv_tokens * spec.kv_token_bytes / cluster.ring_bandwidth,
            q_seconds=q_tokens * spec.q_token_bytes / cluster.ring_bandwidth,
            out_seconds=q_tokens * spec.out_token_bytes / cluster.ring_bandwidth,
        )
        rank[name] = query.copy()
        rank[name][apart] = np.where(passes_q[group], key[apart], query[apart])
    return Placement(blocks, owner, rank)


def _distinct(group: np.ndarray, block: np.ndarray, length: np.ndarray, count: int) -> np.ndarray:
    """Tokens of the distinct blocks of each group, int64 ``[count]``."""
    group, block = np.divmod(np.unique(group * len(length) + block), max(len(length), 1))
    return np.bincount(group, weights=length[block], minlength=count)


def _choose_sides(
    ends: np.ndarray,
    work: np.ndarray,
    own_work: np.ndarray,
    *,
    kv_seconds: np.ndarray,
    q_seconds: np.ndarray,
    out_seconds: np.ndarray,
) -> np.ndarray:
    """Groups whose queries travel to the keys, bool ``[num_groups]``.

    Args:
        ends: owner of queries and owner of keys of each group, ``[num_groups, 2]``.
        work, kv_seconds, q_seconds, out_seconds: of each group: its compute, and its keys, queries
            and outputs on a link.
        own_work: seconds of compute that each rank has anyway, ``[num_ranks]``.
    """
    side = (q_seconds + out_seconds < kv_seconds).astype(np.int64)
    # what each end of a group has to do for it, by side: compute, out, in
    nothing = np.zeros_like(work)
    for_query = np.array([[work, nothing, kv_seconds], [nothing, q_seconds, out_seconds]])
    for_key = np.array([[nothing, kv_seconds, nothing], [work, out_seconds, q_seconds]])
    load = np.stack([own_work, 0 * own_work, 0 * own_work], axis=1)
    index = np.arange(len(ends))
    np.add.at(load, ends[:, 0], for_query[side, :, index])
    np.add.at(load, ends[:, 1], for_key[side, :, index])
    _change_sides(ends, for_query, for_key, load, side)
    return np.asarray(side == 1)


@njit(cache=True)
def _change_sides(
    ends: np.ndarray, for_query: np.ndarray, for_key: np.ndarray, load: np.ndarray, side: np.ndarray
) -> None:
    """Let single groups change sides, in place, while the longer of their ends gets shorter."""
    for _ in range(_SWEEPS):
        changed = False
        for group in range(len(side)):
            query, key = ends[group]
            now, other = side[group], 1 - side[group]
            at_query = load[query] + for_query[other, :, group] - for_query[now, :, group]
            at_key = load[key] + for_key[other, :, group] - for_key[now, :, group]
            before = max(load[query].max(), load[key].max())
            after = max(at_query.max(), at_key.max())
            total = (at_query + at_key - load[query] - load[key]).sum()
            if after < before or (after == before and total < 0):
                load[query], load[key] = at_query, at_key
                side[group] = other
                changed = True
        if not changed:
            return


def _round_the_ring(block: np.ndarray, owner: np.ndarray, num_ranks: int) -> Route:
    """The pieces of these blocks from rank to rank, one hop a step, all the way but the last."""
    step = np.arange(1, num_ranks)[:, None]
    source = (owner[block] + step - 1) % num_ranks
    every, steps = np.broadcast_to(block, source.shape), np.broadcast_to(step, source.shape)
    target = (source + 1) % num_ranks
    return Route(every.reshape(-1), source.reshape(-1), target.reshape(-1), steps.reshape(-1))
