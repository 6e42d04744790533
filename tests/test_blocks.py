"""Blocks: every unmasked pair lies in exactly one tile, and no tile is empty."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.blocks import build_blocks, cut_evenly
from dcp.masks import AttnMask
from dcp.ragged import expand

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16)


@st.composite
def batches(draw):
    """A few short sequences with any masks, regular or random."""
    seqlens = draw(st.lists(st.integers(0, 20), max_size=5))
    makers = [
        AttnMask.causal,
        AttnMask.full,
        lambda n: AttnMask.streaming(n, sink=2, window=5),
        lambda n: AttnMask.causal_blockwise(n, block=3, local_blocks=1),
        AttnMask.shared_question,
        lambda n: AttnMask.documents([n // 3, n - n // 3]),
    ]
    masks = []
    for n in seqlens:
        kind = draw(st.integers(0, len(makers)))
        if kind == len(makers):
            picture = np.array(draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n)))
            picture = picture.reshape(n, n).astype(bool)
            masks.append(mask_of(picture))
        else:
            masks.append(makers[kind](n))
    return SequenceBatch(seqlens=seqlens, masks=masks)


def mask_of(picture):
    n = len(picture)
    return AttnMask.from_mask_mod(lambda b, h, q, kv: picture[np.asarray(q), np.asarray(kv)], n, n)


def global_picture(batch, name):
    """Boolean ``[tokens, tokens]`` of the whole batch, from the masks' own pictures."""
    picture = np.zeros((batch.num_tokens,) * 2, dtype=bool)
    for start, mask in zip(batch.offsets[:-1], batch.masks[name], strict=True):
        picture[start : start + mask.q_len, start : start + mask.k_len] = mask.to_dense()
    return picture


def assert_tiles_cover(table):
    """Count every pair of every tile's slices; check them against the masks' pictures."""
    owner = np.repeat(np.arange(table.num_blocks), table.length)  # data block of each token
    for name, tiles in table.masks.items():
        count = np.zeros((table.batch.num_tokens,) * 2, dtype=int)
        area = np.zeros(tiles.num_tiles, dtype=np.int64)
        for tile, (q0, q1, k0, k1, lo, hi) in zip(tiles.slice_tile, tiles.slices, strict=True):
            for q in range(q0, q1):
                keys = [k for k in range(k0, k1) if lo <= k - q <= hi]
                assert (owner[keys] == tiles.k[tile]).all()
                assert not keys or owner[q] == tiles.q[tile]
                count[q, keys] += 1
                area[tile] += len(keys)
        np.testing.assert_array_equal(count, global_picture(table.batch, name))
        np.testing.assert_array_equal(area, tiles.area)
        assert (tiles.area > 0).all(), "a tile without a pair"
        key = tiles.q * max(table.num_blocks, 1) + tiles.k
        assert (np.diff(key) > 0).all(), "tiles in order, each once"
        assert (np.diff(tiles.slice_tile) >= 0).all()


@given(batches(), st.integers(1, 25))
def test_every_pair_is_in_exactly_one_tile(batch, block_size):
    table = build_blocks(batch, SPEC, block_size=block_size)
    assert_tiles_cover(table)
    assert table.length.sum() == batch.num_tokens
    assert (table.length > 0).all()
    assert (table.length <= block_size).all()
    assert table.num_compute_blocks == table.masks["default"].num_tiles


@given(batches(), st.data())
def test_any_cut_will_do(batch, data):
    cuts = []
    for n in batch.seqlens.tolist():
        marks = data.draw(st.sets(st.integers(1, n - 1))) if n > 1 else set()
        cuts.append(np.diff([0, *sorted(marks), n]) if n else np.zeros(0, dtype=np.int64))
    table = build_blocks(batch, SPEC, block_lengths=cuts)
    assert_tiles_cover(table)
    np.testing.assert_array_equal(table.length, np.concatenate([*cuts, []]))


def test_several_masks_share_the_data_blocks():
    batch = SequenceBatch(
        [100, 0, 37],
        {"global": "causal", "local": [AttnMask.sliding_window(n, 10) for n in (100, 0, 37)]},
        weights={"local": 3},
    )
    table = build_blocks(batch, SPEC, block_size=16, num_head_groups=2)
    assert_tiles_cover(table)
    assert table.masks["local"].num_tiles < table.masks["global"].num_tiles
    tiles = sum(mask.num_tiles for mask in table.masks.values())
    assert table.num_compute_blocks == 2 * tiles
    assert batch.weights == {"global": 1.0, "local": 3.0}


@pytest.mark.parametrize("seqlens", [[], [0], [0, 0, 0], [1], [0, 1, 0], [1] * 7])
@pytest.mark.parametrize("block_size", [1, 8, 4096])
def test_degenerate_lengths(seqlens, block_size):
    table = build_blocks(SequenceBatch(seqlens), SPEC, block_size=block_size)
    assert table.num_blocks == sum(seqlens)
    assert table.masks["default"].num_tiles == sum(seqlens)
    assert_tiles_cover(table)


def test_a_mask_that_sees_nothing_has_no_tile():
    empty = AttnMask.from_slices(40, 40, [])
    table = build_blocks(SequenceBatch([40], [empty]), SPEC, block_size=8)
    assert table.num_blocks == 5
    assert table.num_compute_blocks == 0


def test_blocks_know_their_place():
    table = build_blocks(SequenceBatch([10, 0, 5]), SPEC, block_size=4)
    assert table.sequence.tolist() == [0, 0, 0, 2, 2]
    assert table.offset.tolist() == [0, 3, 6, 10, 12]
    assert table.length.tolist() == [3, 3, 4, 2, 3]
    assert table.position.tolist() == [0, 3, 6, 0, 2]


@given(st.lists(st.integers(0, 1000), max_size=6), st.integers(1, 300))
def test_cut_evenly(seqlens, block_size):
    for seqlen, lengths in zip(seqlens, cut_evenly(np.array(seqlens), block_size), strict=True):
        assert lengths.sum() == seqlen
        assert len(lengths) == -(-seqlen // block_size)
        assert seqlen == 0 or lengths.max() - lengths.min() <= 1


@given(st.lists(st.integers(0, 5), max_size=8))
def test_expand(counts):
    run, index = expand(np.array(counts, dtype=np.int64))
    pairs = [(r, i) for r, count in enumerate(counts) for i in range(count)]
    assert list(zip(run.tolist(), index.tolist(), strict=True)) == pairs


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_head_groups(groups):
    table = build_blocks(SequenceBatch([9]), SPEC, block_size=4, num_head_groups=groups)
    assert table.num_kv_groups == min(groups, 2)
    assert table.num_compute_blocks == groups * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceBatch([3, -1]), "-1"),
        (lambda: SequenceBatch([3, 4], [AttnMask.causal(3)]), "1 masks for 2 sequences"),
        (lambda: SequenceBatch([3], [AttnMask.causal(4)]), "4 x 4, the sequence has 3 tokens"),
        (lambda: SequenceBatch([3, 3], AttnMask.causal(3)), "1 masks for 2 sequences"),
        (lambda: SequenceBatch([3], {}), "empty"),
        (lambda: SequenceBatch([3], weights={"local": 1}), "local"),
        (lambda: SequenceBatch([3], "casual"), "casual"),
        (lambda: AttentionSpec(num_heads=8, num_kv_heads=3, head_dim=4), "num_kv_heads=3"),
        (lambda: AttentionSpec(num_heads=0, num_kv_heads=1, head_dim=4), "num_heads"),
        (lambda: AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=4, dtype="int8"), "'int8'"),
        (lambda: build_blocks(SequenceBatch([3]), SPEC), "block_size"),
        (lambda: build_blocks(SequenceBatch([3]), SPEC, block_size=0), "block_size"),
        (
            lambda: build_blocks(SequenceBatch([3]), SPEC, block_size=1, num_head_groups=3),
            "num_head_groups=3",
        ),
    ],
)
def test_user_errors_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
