"""Grids of ranks, contexts x head columns: what rings, head parallelism and their mixtures share.

A sequence is cut in chunks, one or two for each *context* of its grid; the ranks of a context (its
*columns*) share the context's tokens evenly. A rank computes the queries of its context for the
head groups of its column. Queries, keys and values reach the columns by an all-to-all inside the
context; then keys and values go from context to context, every column its own ring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import BlockTable, ComputeBlocks, build_blocks, cut_evenly
from dcp.placement import Placement, Route
from dcp.ragged import expand, offsets_in, split, starts


@dataclass(frozen=True, eq=False)
class Grid:
    """Ranks as contexts x columns, and the way of keys and values round the contexts.

    Attributes:
        cells: rank of each (context, column), int64 ``[C, U]``.
        zigzag: context ``c`` holds chunks ``c`` and ``2C - 1 - c`` of 2C, else chunk ``c`` of C.
        window: contexts of an inner ring, a divisor of C; None: all, one plain ring. Keys go round
            the inner ring, then one place on in the ring of inner rings, and round again.
    """

    cells: np.ndarray
    zigzag: bool = True
    window: int | None = None

    @property
    def num_contexts(self) -> int:
        return len(self.cells)

    @property
    def num_columns(self) -> int:
        return len(self.cells[0])

    @property
    def all_to_all(self) -> int:
        """Divisions before the first with work: 1 where heads change ranks."""
        return int(self.num_columns > 1)

    @property
    def chunk_context(self) -> np.ndarray:
        """Context of each chunk of a sequence, int64 ``[C]`` or ``[2C]``."""
        there = np.arange(self.num_contexts)
        if not self.zigzag or self.num_contexts == 1:
            return there
        return np.concatenate([there, there[::-1]])

    def turns(self, context: np.ndarray, key_context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turns of the outer and of the inner ring until ``context`` has the other's keys."""
        window = self.window or self.num_contexts
        outer = (context // window - key_context // window) % (self.num_contexts // window)
        return outer, (context - key_context) % window

    def before(self, context: np.ndarray, *, outer: bool) -> np.ndarray:
        """The context from which each receives keys on the outer or on the inner ring."""
        window = self.window or self.num_contexts
        inner: np.ndarray = context // window * window + (context - 1) % window
        return np.asarray((context - window) % self.num_contexts) if outer else inner


def head_groups(spec: AttentionSpec, num_columns: int) -> int:
    """Fewest head groups that can be dealt to ``num_columns`` as evenly as single heads."""

    def busiest(groups: int) -> int:
        return -(-groups // num_columns) * (spec.num_heads // groups)

    valid = [
        groups
        for groups in range(num_columns, spec.num_heads + 1)
        if spec.num_heads % groups == 0
        and (spec.num_kv_heads % groups == 0 or groups % spec.num_kv_heads == 0)
    ]
    return min(valid, key=lambda groups: (busiest(groups), groups))


def column_of_group(num_head_groups: int, num_columns: int) -> np.ndarray:
    """Column of each head group, in runs: 8 groups on 3 columns are dealt 3, 3, 2."""
    column: np.ndarray = np.arange(num_head_groups) * num_columns // num_head_groups
    return column


def padding_tokens(seqlens: np.ndarray, multiple: int) -> int:
    """Tokens that padding every sequence to a multiple would add."""
    return int((-np.asarray(seqlens) % multiple).sum())


def place_on_grid(
    batch: SequenceBatch,
    spec: AttentionSpec,
    grid: Grid,
    *,
    block_size: int | None,
    notes: Mapping[str, object],
) -> Placement:
    """As :func:`place_on_grids`, every sequence on one grid of all ranks."""
    return place_on_grids(
        batch,
        spec,
        [grid],
        np.zeros(len(batch.seqlens), dtype=np.int64),
        num_ranks=grid.cells.size,
        num_head_groups=head_groups(spec, grid.num_columns),
        block_size=block_size,
        notes=notes,
    )


def place_on_grids(
    batch: SequenceBatch,
    spec: AttentionSpec,
    grids: Sequence[Grid],
    grid_of_sequence: np.ndarray,
    *,
    num_ranks: int,
    num_head_groups: int = 1,
    block_size: int | None = None,
    notes: Mapping[str, object] | None = None,
) -> Placement:
    """Every sequence on its grid, ready to run. Chunks differ by at most one token.

    Args:
        grid_of_sequence: index into ``grids``, int64 ``[num_sequences]``.
        block_size: most tokens of a data block; None: chunks are not cut further.
    """
    lengths, context, column = _deal(batch.seqlens, grids, grid_of_sequence, block_size)
    blocks = build_blocks(batch, spec, block_lengths=lengths, num_head_groups=num_head_groups)
    grid_of_block = np.asarray(grid_of_sequence, dtype=np.int64)[blocks.sequence]
    owner = np.zeros(blocks.num_blocks, dtype=np.int64)
    lane = np.zeros(num_ranks, dtype=np.int64)
    routes = []
    for index, grid in enumerate(grids):
        mine = np.flatnonzero(grid_of_block == index)
        owner[mine] = grid.cells[context[mine], column[mine]]
        lane[grid.cells] = np.arange(grid.num_columns)
        routes.append(_route(grid, blocks, mine, context, owner))
    run = {
        name: _run(tiles, grids, grid_of_block, context, num_head_groups)
        for name, tiles in blocks.masks.items()
    }
    return Placement(
        blocks,
        owner,
        {name: rank for name, (rank, _) in run.items()},
        division={name: division for name, (_, division) in run.items()},
        num_divisions=max((g.all_to_all + g.num_contexts for g in grids), default=1),
        kv_route=join_routes(routes),
        gradients_travel=True,
        gradient_lane=lane,
        notes=dict(notes or {}),
    )


def _run(
    tiles: ComputeBlocks,
    grids: Sequence[Grid],
    grid_of_block: np.ndarray,
    context: np.ndarray,
    num_head_groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank and division of each compute block: with its queries, when its keys have come round."""
    rank, division = np.zeros((2, tiles.num_tiles, num_head_groups), dtype=np.int64)
    for index, grid in enumerate(grids):
        here = np.flatnonzero(grid_of_block[tiles.q] == index)
        q_context, k_context = context[tiles.q[here]], context[tiles.k[here]]
        columns = column_of_group(num_head_groups, grid.num_columns)
        rank[here] = grid.cells[q_context[:, None], columns]
        outer, inner = grid.turns(q_context, k_context)
        turn = outer * (grid.window or grid.num_contexts) + inner
        division[here] = (grid.all_to_all + turn)[:, None]
    return rank.reshape(-1), division.reshape(-1)


def join_routes(routes: Sequence[Route]) -> Route:
    """All hops of several routes."""
    none = np.zeros(0, dtype=np.int64)
    return Route(
        *(
            np.concatenate([none, *(getattr(route, name) for route in routes)])
            for name in Route.__dataclass_fields__
        )
    )


def cut_at(batch: SequenceBatch, edges: np.ndarray) -> list[np.ndarray]:
    """Block lengths of each sequence: the packed batch cut at ``edges`` (token indices)."""
    every = np.unique(np.concatenate([batch.offsets, edges[edges < batch.seqlens.sum()]]))
    counts = np.diff(np.searchsorted(every, batch.offsets))
    return split(np.diff(every), counts)


def deal_chunks(seqlen: Any, num_chunks: Any, chunk: np.ndarray, *, first: Any = 0) -> np.ndarray:
    """Lengths of these of ``num_chunks`` chunks; those from ``first`` on, cyclically, get a token
    more."""
    longer = (chunk - first) % num_chunks < seqlen % num_chunks
    length: np.ndarray = seqlen // num_chunks + longer
    return length


def _deal(
    seqlens: np.ndarray,
    grids: Sequence[Grid],
    grid_of_sequence: np.ndarray,
    block_size: int | None,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Block lengths of every sequence; context and column of every block."""
    sequence, stream, length = _chunks(seqlens, grids, grid_of_sequence)
    # the chunks of each (grid, context), a stream, one after the other: cut where columns change
    tokens = np.bincount(stream, weights=length, minlength=1).astype(np.int64)
    widths = np.concatenate([np.full(g.num_contexts, g.num_columns) for g in grids])
    contexts = np.concatenate([np.arange(g.num_contexts) for g in grids])
    tokens = np.append(tokens, np.zeros(len(widths) - len(tokens), dtype=np.int64))
    of_share, column = expand(widths)
    share = starts(tokens)[of_share] + tokens[of_share] * column // widths[of_share]

    in_streams = np.argsort(stream, kind="stable")
    end = np.cumsum(length[in_streams])
    begin = end - length[in_streams]
    edges = np.unique(np.concatenate([begin, share, end]))
    pieces = np.diff(edges)
    if block_size is not None and len(pieces):
        pieces = np.concatenate(cut_evenly(pieces, block_size))
    begin_of_piece = starts(pieces)
    chunk = in_streams[np.searchsorted(begin, begin_of_piece, side="right") - 1]
    piece_column = column[np.searchsorted(share, begin_of_piece, side="right") - 1]

    order = np.lexsort((begin_of_piece, chunk))
    counts = np.bincount(sequence[chunk], minlength=len(seqlens))
    return split(pieces[order], counts), contexts[stream[chunk[order]]], piece_column[order]


def _chunks(
    seqlens: np.ndarray, grids: Sequence[Grid], grid_of_sequence: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence, stream (context, counted over all grids) and length of every chunk."""
    streams = np.cumsum([0, *(grid.num_contexts for grid in grids)])
    context = [grid.chunk_context + start for grid, start in zip(grids, streams, strict=False)]
    num_chunks = np.array([len(of) for of in context])
    counts = num_chunks[grid_of_sequence]
    sequence, chunk = expand(counts)
    # the chunk that gets the first odd token: after that of the grid's sequence before
    first = offsets_in(grid_of_sequence, seqlens, len(grids)) % counts
    length = deal_chunks(seqlens[sequence], counts[sequence], chunk, first=first[sequence])
    stream = np.concatenate(context)[starts(num_chunks)[grid_of_sequence[sequence]] + chunk]
    return sequence, stream, length


def _route(
    grid: Grid, blocks: BlockTable, mine: np.ndarray, context: np.ndarray, owner: np.ndarray
) -> Route:
    """The hops of the grid's blocks: to the columns that need them, then round the contexts."""
    groups, kv_groups = blocks.num_head_groups, blocks.num_kv_groups
    columns = column_of_group(groups, grid.num_columns)
    kv_group = np.arange(groups) * kv_groups // groups
    kv_group, column = np.divmod(np.unique(kv_group * grid.num_columns + columns), grid.num_columns)
    block = np.repeat(mine, len(kv_group))
    piece = block * kv_groups + np.tile(kv_group, len(mine))
    column = np.tile(column, len(mine))
    home = context[block]

    begin = grid.cells[home, column]
    moved = owner[block] != begin
    once = np.ones(int(moved.sum()), dtype=np.int64)
    hops = [Route(piece[moved], owner[block][moved], begin[moved], once)]
    if grid.num_contexts > 1:
        target = (home + np.arange(1, grid.num_contexts)[:, None]) % grid.num_contexts
        outer, inner = grid.turns(target, home)
        on = inner == 0  # on from inner ring to inner ring, else on inside one
        source = np.where(on, grid.before(target, outer=True), grid.before(target, outer=False))
        # a turn of the inner ring is a step, one of the outer ring is under way during all of them
        window = grid.window or grid.num_contexts
        part = np.repeat(_part(context[mine], blocks.length[mine], window), len(kv_group))
        step = grid.all_to_all + outer * window + inner - on * (window - 1 - part)
        hops.append(
            Route(
                np.broadcast_to(piece, target.shape).reshape(-1),
                grid.cells[source, column].reshape(-1),
                grid.cells[target, column].reshape(-1),
                step.reshape(-1),
            )
        )
    return join_routes(hops)


def _part(context: np.ndarray, length: np.ndarray, parts: int) -> np.ndarray:
    """Which of ``parts`` equal shares of its context's tokens each block's middle lies in."""
    total = np.bincount(context, weights=length).astype(np.int64)
    before = offsets_in(context, length, len(total))
    part: np.ndarray = (2 * before + length) * parts // (2 * total[context])
    return part
