"""A batch cut into data blocks and compute blocks, as a struct of numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.checks import not_too_many
from dcp.ragged import expand, split, starts
from dcp.slices import HI, K0, K1, LO, Q0, Q1, restrict_slices, slice_area

MOST_BLOCKS = 2_000_000  # data blocks: tables by block and rank have to fit in memory
MOST_TILES = 4_000_000  # and tiles: a plan's tables take about half a kilobyte for each


@dataclass(frozen=True, eq=False)
class ComputeBlocks:
    """Compute blocks of one mask: tiles (query block x key block), each times every head group.

    A compute block is numbered ``tile * num_head_groups + group``. A tile exists exactly where the
    mask has a pair. Tiles are sorted by (query block, key block).

    Attributes:
        q, k: data blocks of each tile, int64 ``[num_tiles]``.
        area: (query, key) pairs of each tile, int64 ``[num_tiles]``.
        slice_tile: tile of each slice below, ascending, int64 ``[n]``.
        slices: the mask cut at block edges, in global token coordinates, int64 ``[n, 6]``.
    """

    q: np.ndarray
    k: np.ndarray
    area: np.ndarray
    slice_tile: np.ndarray
    slices: np.ndarray

    @property
    def num_tiles(self) -> int:
        return len(self.q)


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Data blocks and compute blocks of a batch.

    Data blocks never cross a sequence and are numbered in global token order.

    Attributes:
        batch, spec: what was cut.
        num_head_groups: head groups G; group ``g`` holds query heads ``[g * H/G, (g+1) * H/G)``.
        sequence, offset, length: of each data block: its sequence, global index of its first
            token, number of tokens (never 0); int64 ``[num_blocks]``.
        masks: compute blocks by mask name.
    """

    batch: SequenceBatch
    spec: AttentionSpec
    num_head_groups: int
    sequence: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    masks: dict[str, ComputeBlocks]

    @property
    def num_blocks(self) -> int:
        return len(self.length)

    @property
    def num_kv_groups(self) -> int:
        """Distinct KV parts: head groups finer than a KV head share that head's keys and values."""
        return min(self.num_head_groups, self.spec.num_kv_heads)

    @property
    def num_compute_blocks(self) -> int:
        return sum(tiles.num_tiles for tiles in self.masks.values()) * self.num_head_groups

    @property
    def position(self) -> np.ndarray:
        """Position of each data block's first token in its sequence, int64 ``[num_blocks]``."""
        position: np.ndarray = self.offset - self.batch.offsets[self.sequence]
        return position

    @property
    def is_cached(self) -> np.ndarray:
        """Data blocks that have keys and values only, bool ``[num_blocks]``."""
        cached: np.ndarray = self.position < self.batch.num_cached[self.sequence]
        return cached


def cut_evenly(seqlens: np.ndarray, block_size: int, *, multiple: int = 1) -> list[np.ndarray]:
    """Each sequence in about ``ceil(seqlen / block_size)`` nearly equal blocks.

    Cuts lie at multiples of ``multiple`` tokens (a kernel's tile; it divides ``block_size``), so
    that only a sequence's last block has another length. With 1, lengths differ by at most one.
    Returns the block lengths of every sequence. An empty sequence has no block.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be 1 or more, got {block_size}")
    seqlens = np.asarray(seqlens, dtype=np.int64)
    counts = (-(-seqlens // block_size)).astype(np.int64)
    check_blocks(int(counts.sum()))
    sequence, index = expand(counts)
    seqlen, count = seqlens[sequence], counts[sequence]
    start, end = (
        np.minimum(-(-(at * seqlen // count) // multiple) * multiple, seqlen)
        for at in (index, index + 1)
    )
    keep = end > start
    counts = np.bincount(sequence[keep], minlength=len(seqlens))
    return split((end - start)[keep], counts)


def build_blocks(
    batch: SequenceBatch,
    spec: AttentionSpec,
    *,
    block_size: int | None = None,
    block_lengths: Sequence[np.ndarray] | None = None,
    num_head_groups: int = 1,
) -> BlockTable:
    """Cut ``batch`` into blocks of about ``block_size`` tokens, or of the lengths given.

    Args:
        block_lengths: block lengths of each sequence (they sum to its seqlen, each 1 or more). A
            block is cached as a whole or not at all.
        num_head_groups: divides ``num_heads``, and divides or is divided by ``num_kv_heads``.
    """
    groups, kv_heads = num_head_groups, spec.num_kv_heads
    if groups < 1 or spec.num_heads % groups or (kv_heads % groups and groups % kv_heads):
        raise ValueError(
            f"num_head_groups={groups} does not fit {spec.num_heads} heads in {kv_heads} KV heads"
        )
    if block_lengths is None:
        if block_size is None:
            raise ValueError("give block_size or block_lengths")
        block_lengths = cut_evenly(batch.seqlens, block_size)
    counts = np.array([len(lengths) for lengths in block_lengths], dtype=np.int64)
    length = np.concatenate([*block_lengths, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    sequence, _ = expand(counts)
    tokens = np.bincount(sequence, weights=length, minlength=len(counts))
    assert np.array_equal(tokens, batch.seqlens), "blocks miss tokens"
    assert (length > 0).all(), "empty data block"
    offset = starts(length)
    tiles = {name: _tiles(batch.global_bands(name), offset, length) for name in batch.mask_names}
    table = BlockTable(batch, spec, groups, sequence, offset, length, tiles)
    cached = length[table.is_cached].sum()
    assert cached == batch.cached.sum(), "a block is cached in part"
    return table


def _tiles(bands: np.ndarray, offset: np.ndarray, length: np.ndarray) -> ComputeBlocks:
    """Cut slices (global coordinates) at block edges: first at query blocks, then at key blocks."""
    end = offset + length
    run, q = _met(bands[:, Q0], bands[:, Q1], offset, end)
    rows = restrict_slices(bands[run], offset[q], end[q], bands[run, K0], bands[run, K1])
    # the keys that this strip of the band reaches
    rows[:, K0] = np.maximum(rows[:, K0], rows[:, Q0] + rows[:, LO])
    rows[:, K1] = np.minimum(rows[:, K1], rows[:, Q1] + rows[:, HI])
    keep = rows[:, K0] < rows[:, K1]
    q, rows = q[keep], rows[keep]

    run, k = _met(rows[:, K0], rows[:, K1], offset, end)
    q = q[run]
    slices = restrict_slices(rows[run], offset[q], end[q], offset[k], end[k])
    area = slice_area(slices)
    keep = area > 0
    key = (q * len(offset) + k)[keep]
    slices, area = slices[keep], area[keep]

    order = np.argsort(key, kind="stable")
    tile_key, tile_of_slice = np.unique(key[order], return_inverse=True)
    tile_area = np.bincount(tile_of_slice, weights=area[order], minlength=len(tile_key))
    return ComputeBlocks(
        q=tile_key // max(len(offset), 1),
        k=tile_key % max(len(offset), 1),
        area=tile_area.astype(np.int64),
        slice_tile=tile_of_slice.astype(np.int64),
        slices=slices[order],
    )


def _met(
    start: np.ndarray, stop: np.ndarray, offset: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The blocks that each range of tokens meets: range and block of every meeting."""
    first = np.searchsorted(end, start, side="right")
    counts = np.searchsorted(offset, stop, side="left") - first
    remedy = "give a larger block_size, smaller batches or a mask of fewer slices"
    not_too_many("parts of a mask", int(counts.sum()), MOST_TILES, remedy)
    run, index = expand(counts)
    return run, first[run] + index


def check_blocks(count: int) -> None:
    """Refuse more data blocks than can be planned, before any is made."""
    not_too_many("data blocks", count, MOST_BLOCKS, "give a larger block_size or smaller batches")
