"""Masks against rules written down anew as loops, and against themselves in other forms."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp.masks import NAMED_MASKS, AttnMask, named_mask
from dcp.slices import KINDS, restrict_slices, shift_slices, tighten

LENGTHS = [0, 1, 2, 3, 7, 16, 33, 64, 129]


def dense(q_len, k_len, rule):
    """The mask of ``rule(query, key)``, pair by pair."""
    out = np.zeros((q_len, k_len), dtype=bool)
    for q in range(q_len):
        for k in range(k_len):
            out[q, k] = rule(q, k)
    return out


def assert_is(mask, expected):
    """The mask's picture, area and slices all say ``expected``."""
    assert (mask.q_len, mask.k_len) == expected.shape
    np.testing.assert_array_equal(mask.to_dense(), expected)
    assert mask.area == expected.sum()
    covered = np.zeros(expected.shape, dtype=int)
    for piece in mask.slices:
        covered += slice_rule(expected.shape, *piece)
    np.testing.assert_array_equal(covered, expected)


def restricted(mask, q0, q1, k0, k1):
    """The mask of some queries and keys, renumbered from 0: how blocks are cut."""
    cut = tighten(restrict_slices(mask.bands, q0, q1, k0, k1))
    return AttnMask(q1 - q0, k1 - k0, shift_slices(cut, -q0, -k0))


def slice_rule(shape, q0, q1, k0, k1, kind):
    """One slice, from the words: causal is aligned bottom right, inv_causal top left."""
    below = kind in ("causal", "bi_causal")
    above = kind in ("inv_causal", "bi_causal")

    def rule(q, k):
        inside = q0 <= q < q1 and k0 <= k < k1
        return (
            inside
            and (not below or k1 - 1 - k >= q1 - 1 - q)  # the last query reaches the last key
            and (not above or k - k0 >= q - q0)  # the first query reaches the first key
        )

    return dense(*shape, rule)


# --------------------------------------------------------------------------- constructors


@pytest.mark.parametrize("n", LENGTHS)
def test_full_and_causal(n):
    assert_is(AttnMask.full(n), dense(n, n, lambda q, k: True))
    assert_is(AttnMask.causal(n), dense(n, n, lambda q, k: k <= q))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("window", [1, 2, 5, 64, 200])
def test_sliding_window(n, window):
    expected = dense(n, n, lambda q, k: q - window < k <= q)
    assert_is(AttnMask.sliding_window(n, window), expected)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("prefix", [0, 1, 10, 500])
def test_prefix_lm(n, prefix):
    expected = dense(n, n, lambda q, k: k <= q or (q < prefix and k < prefix))
    assert_is(AttnMask.prefix_lm(n, prefix), expected)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (1, 1), (3, 5), (40, 8), (64, 4096)])
def test_streaming(n, sink, window):
    expected = dense(n, n, lambda q, k: k <= q and (k < sink or k > q - window))
    assert_is(AttnMask.streaming(n, sink=sink, window=window), expected)


@pytest.mark.parametrize("n", [*LENGTHS, 32, 48])
@pytest.mark.parametrize(("block", "local"), [(1, 0), (1, 3), (4, 2), (16, 1), (16, 2), (256, 2)])
def test_causal_blockwise(n, block, local):
    num_blocks = -(-n // block)

    def rule(q, k):
        if k > q:
            return False
        if q // block in (0, num_blocks - 1):  # the sink block and the last one: plainly causal
            return True
        return k < block or k >= q - local * block

    assert_is(AttnMask.causal_blockwise(n, block=block, local_blocks=local), dense(n, n, rule))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("fraction", "answers"), [(0.2, 4), (0.0, 1), (1.0, 3), (0.5, 50)])
def test_shared_question(n, fraction, answers):
    question = int(n * fraction)
    size = (n - question) // answers

    def answer_of(token):
        return min((token - question) // size, answers - 1) if size else answers - 1

    def rule(q, k):
        return k <= q and (k < question or answer_of(q) == answer_of(k))

    mask = AttnMask.shared_question(n, question_fraction=fraction, num_answers=answers)
    assert_is(mask, dense(n, n, rule))


@pytest.mark.parametrize("lengths", [[], [0], [5], [1, 0, 7, 1, 30], [3] * 10])
def test_documents(lengths):
    document = np.repeat(np.arange(len(lengths)), lengths)
    n = sum(lengths)
    expected = dense(n, n, lambda q, k: k <= q and document[q] == document[k])
    assert_is(AttnMask.documents(lengths), expected)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("text", "image"), [([], 4), ([6], 4), ([3, 5, 2], 4), ([0, 0, 0], 3), ([4, 4], 0), ([0, 9], 7)]
)
def test_modality(text, image, alone):
    runs = []  # (start, end, is an image)
    for index, length in enumerate(text):
        for size, is_image in ((image if index else 0, True), (length, False)):
            start = runs[-1][1] if runs else 0
            runs.append((start, start + size, is_image))
    n = runs[-1][1] if runs else 0

    def rule(q, k):
        start, end, is_image = next(run for run in runs if run[0] <= q < run[1])
        if not is_image:
            return k <= q
        return (start if alone else 0) <= k < end

    mask = AttnMask.modality(text, image_size=image, image_sees_only_itself=alone)
    assert_is(mask, dense(n, n, rule))


def test_names_reach_the_constructors():
    assert named_mask("causal", 9) == AttnMask.causal(9)
    assert named_mask("streaming", 90, sink=3, window=7) == AttnMask.streaming(90, 3, 7)
    for name in ("full", "causal", "streaming", "causal_blockwise", "shared_question"):
        assert NAMED_MASKS[name](0).area == 0


# --------------------------------------------------------------------------- other forms


@st.composite
def masks(draw, max_len=14):
    """Any mask at all, from a random picture."""
    q_len, k_len = draw(st.integers(0, max_len)), draw(st.integers(0, max_len))
    bits = draw(st.binary(min_size=q_len * k_len, max_size=q_len * k_len))
    picture = np.frombuffer(bits, dtype=np.uint8).reshape(q_len, k_len) % 2 == 1
    return AttnMask.from_mask_mod(lambda b, h, q, kv: picture[np.asarray(q), np.asarray(kv)],
                                  q_len, k_len), picture  # fmt: skip


@st.composite
def slices(draw, max_len=24):
    q_len, k_len = draw(st.integers(0, max_len)), draw(st.integers(0, max_len))
    q0, q1 = sorted(draw(st.tuples(st.integers(0, q_len), st.integers(0, q_len))))
    k0, k1 = sorted(draw(st.tuples(st.integers(0, k_len), st.integers(0, k_len))))
    return q_len, k_len, (q0, q1, k0, k1, draw(st.sampled_from(KINDS)))


@given(slices())
def test_one_slice(given_slice):
    q_len, k_len, piece = given_slice
    assert_is(AttnMask.from_slices(q_len, k_len, [piece]), slice_rule((q_len, k_len), *piece))


@given(masks())
def test_any_picture_and_its_slices(mask_and_picture):
    mask, picture = mask_and_picture
    assert_is(mask, picture)
    again = AttnMask.from_slices(mask.q_len, mask.k_len, mask.slices)
    np.testing.assert_array_equal(again.to_dense(), picture)


@given(masks(), st.data())
def test_restrict(mask_and_picture, data):
    mask, picture = mask_and_picture
    q0, q1 = sorted(data.draw(st.tuples(*[st.integers(0, mask.q_len)] * 2)))
    k0, k1 = sorted(data.draw(st.tuples(*[st.integers(0, mask.k_len)] * 2)))
    assert_is(restricted(mask, q0, q1, k0, k1), picture[q0:q1, k0:k1])


@given(st.sampled_from(sorted(NAMED_MASKS)), st.integers(0, 70), st.data())
def test_restrict_of_named_masks(name, n, data):
    parameters = {"sliding_window": {"window": 9}, "streaming": {"sink": 4, "window": 11},
                  "causal_blockwise": {"block": 8}, "prefix_lm": {"prefix": 13}}  # fmt: skip
    mask = named_mask(name, n, **parameters.get(name, {}))
    q0, q1 = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    k0, k1 = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    assert_is(restricted(mask, q0, q1, k0, k1), mask.to_dense()[q0:q1, k0:k1])


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 5), st.data())
def test_from_ranges_is_a_union(q_len, k_len, num_ranges, data):
    bound = st.integers(0, k_len)
    flat = data.draw(st.lists(bound, min_size=q_len * num_ranges * 2,
                              max_size=q_len * num_ranges * 2))  # fmt: skip
    ranges = np.array(flat, dtype=np.int32).reshape(q_len, num_ranges, 2)
    expected = dense(q_len, k_len, lambda q, k: any(a <= k < b for a, b in ranges[q]))
    assert_is(AttnMask.from_ranges(ranges, k_len=k_len), expected)


@given(st.integers(1, 40), st.integers(0, 12), st.integers(1, 12))
def test_from_ranges_of_overlapping_ranges(n, sink, window):
    q = np.arange(n)
    both = [[np.zeros(n, int), np.minimum(sink, q + 1)], [np.maximum(q - window + 1, 0), q + 1]]
    ranges = np.transpose(both, (2, 0, 1))
    np.testing.assert_array_equal(
        AttnMask.from_ranges(ranges).to_dense(), AttnMask.streaming(n, sink, window).to_dense()
    )


def test_from_ranges_reads_torch_tensors_and_single_ranges():
    torch = pytest.importorskip("torch")
    ranges = torch.tensor([[0, 1], [0, 2], [1, 3]])
    assert AttnMask.from_ranges(ranges).to_dense().tolist() == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]


def test_from_mask_mod_has_the_signature_of_flex_attention():
    def window_or_sink(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & ((q_idx - kv_idx < 4) | (kv_idx < 2))

    mask = AttnMask.from_mask_mod(window_or_sink, 3000, 3000)
    np.testing.assert_array_equal(mask.to_dense(), AttnMask.streaming(3000, 2, 4).to_dense())
    assert len(mask.bands) <= 8, "regular masks stay small"
    assert AttnMask.from_mask_mod(lambda b, h, q, kv: q * 0 == 0, 3, 5).area == 15


# --------------------------------------------------------------------------- user errors


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("two", KINDS)
def test_overlapping_slices_raise_and_touching_ones_do_not(one, two):
    a, b = (0, 5, 0, 5, one), (3, 9, 2, 8, two)
    shared = slice_rule((9, 9), *a) & slice_rule((9, 9), *b)
    if shared.any():
        with pytest.raises(ValueError, match="overlap"):
            AttnMask.from_slices(9, 9, [a, b])
    else:
        AttnMask.from_slices(9, 9, [a, b])
    AttnMask.from_slices(9, 9, [(0, 5, 0, 5, one), (5, 9, 0, 5, two), (0, 5, 5, 9, two)])


def test_many_slices_are_checked_fast_and_to_the_last_pair():
    rows = [(q, q + 1, 0, q + 1, "full") for q in range(20_000)]
    columns = [(0, 2000, k, k + 1, "full") for k in range(2000)]  # two million pairs to compare
    began = time.process_time()
    assert AttnMask.from_slices(20_000, 20_000, rows).area == AttnMask.causal(20_000).area
    AttnMask.from_slices(2000, 2000, columns)
    assert time.process_time() - began < 0.6
    with pytest.raises(ValueError, match=r"overlap: \(19998, .* and \(19999, 20000, 5, 6\)"):
        AttnMask.from_slices(20_000, 20_000, [*rows[:19_998], (19_998, 20_000, 0, 9, "full"), (19_999, 20_000, 5, 6, "full")])  # fmt: skip  # noqa: E501
    with pytest.raises(ValueError, match="overlap"):
        AttnMask.from_slices(2000, 2001, [*columns, (1999, 2000, 1999, 2001, "full")])


@given(st.lists(slices(max_len=10), max_size=4))
def test_from_slices_raises_exactly_for_overlaps(given_slices):
    pieces = [piece for *_, piece in given_slices]
    count = sum((slice_rule((10, 10), *piece).astype(int) for piece in pieces), np.zeros((10, 10)))
    if (count > 1).any():
        with pytest.raises(ValueError, match="overlap"):
            AttnMask.from_slices(10, 10, pieces)
    else:
        assert_is(AttnMask.from_slices(10, 10, pieces), count == 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttnMask.causal(-1), "-1"),
        (lambda: AttnMask.full(-3), "-3"),
        (lambda: AttnMask.sliding_window(8, 0), "window must be 1 or more, got 0"),
        (lambda: AttnMask.prefix_lm(8, -2), "prefix must be 0 or more, got -2"),
        (lambda: AttnMask.streaming(8, sink=-1), "sink must be 0 or more, got -1"),
        (lambda: AttnMask.causal_blockwise(8, block=0), "block must be 1 or more, got 0"),
        (lambda: AttnMask.shared_question(8, question_fraction=1.5), "1.5"),
        (lambda: AttnMask.shared_question(8, num_answers=0), "num_answers"),
        (lambda: AttnMask.documents([4, -1]), "-1"),
        (lambda: AttnMask.modality([4, 4], image_size=-2), "image_size"),
        (lambda: AttnMask.from_slices(4, 4, [(0, 5, 0, 4, "full")]), "outside 4 queries x 4 keys"),
        (lambda: AttnMask.from_slices(4, 4, [(0, 2, -1, 4, "full")]), "outside"),
        (lambda: AttnMask.from_slices(4, 4, [(3, 2, 0, 4, "full")]), "outside"),
        (lambda: AttnMask.from_slices(4, 4, [(0, 2, 0, 4, "diagonal")]), "'diagonal'"),
        (lambda: AttnMask.from_ranges(np.array([[0, 3], [0, 1]])), r"query 0 .* \[0, 2\)"),
        (lambda: AttnMask.from_ranges(np.array([[0, 1], [-1, 1]])), "query 1"),
        (lambda: AttnMask.from_ranges(np.zeros((4, 2))), "float64"),
        (lambda: AttnMask.from_ranges(np.zeros((4, 3), int)), r"\(4, 1, 3\)"),
        (lambda: named_mask("casual", 4), "'casual' is not one of full, causal"),
        (lambda: named_mask("streaming", 4, windows=3), "windows"),
    ],
)
def test_user_errors_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------- as values


def test_masks_are_values():
    assert AttnMask.causal(50) == AttnMask.causal(50) != AttnMask.causal(51)
    assert len({AttnMask.causal(50), AttnMask.causal(50), AttnMask.full(50)}) == 2
    pieces = [(0, 2, 0, 2, "full"), (2, 4, 2, 4, "causal")]
    assert AttnMask.from_slices(4, 4, pieces) == AttnMask.from_slices(4, 4, pieces[::-1])
    with pytest.raises(ValueError, match="read-only"):
        AttnMask.causal(5).bands[0, 0] = 1
    assert repr(AttnMask.causal(4)) == "AttnMask(4 x 4, 1 slices, area 10)"


def test_draw():
    assert AttnMask.causal(4).draw(width=4) == "█░··\n███░"
    assert AttnMask.full(8).draw(width=4) == "████\n████"
    assert AttnMask.full(0).draw() is not None
    picture = AttnMask.streaming(131_072).draw(width=64).splitlines()
    assert len(picture) == 32
    assert {len(line) for line in picture} == {64}


def ranges_of_131072():
    q = np.arange(131_072)
    return np.stack([np.maximum(q - 4095, 0), q + 1], axis=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttnMask.full(131_072),
        lambda: AttnMask.causal(131_072),
        lambda: AttnMask.sliding_window(131_072, 4096),
        lambda: AttnMask.streaming(131_072),
        lambda: AttnMask.causal_blockwise(131_072),
        lambda: AttnMask.shared_question(131_072),
        lambda: AttnMask.prefix_lm(131_072, 1000),
        lambda: AttnMask.documents([128] * 1024),
        lambda: AttnMask.modality([128] * 512 + [512], image_size=127),
        lambda: AttnMask.from_ranges(ranges_of_131072()),
        lambda: AttnMask.from_slices(
            131_072, 131_072, [(i, i + 128, i, i + 128, "causal") for i in range(0, 131_072, 128)]
        ),
    ],
)
def test_long_masks_are_made_fast(make):
    """The promise is 50 ms; the check allows for a busy machine."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        mask = make()
        seconds.append(time.perf_counter() - start)
    assert mask.q_len == 131_072
    assert min(seconds) < 0.15
