"""Masks at the edges of what may be asked for: right values, or one line that names the value."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp.masks import MOST_TOKENS, AttnMask, named_mask
from dcp.slices import restrict_slices, slice_area

HUGE = MOST_TOKENS
HEADS = np.tri(6, dtype=bool)[None].repeat(12, 0)  # of 12 heads, the last one sees less
HEADS[11, 5, 0] = False


@pytest.mark.parametrize(
    ("mask", "area"),
    [
        (AttnMask.full(HUGE), HUGE**2),
        (AttnMask.causal(HUGE), HUGE * (HUGE + 1) // 2),
        (AttnMask.sliding_window(8, sys.maxsize), 36),
        (AttnMask.sliding_window(8, 10**30), 36),
        (AttnMask.sliding_window(HUGE, 3), 3 * HUGE - 3),
        (AttnMask.streaming(8, sink=sys.maxsize, window=1), 36),
        (AttnMask.streaming(8, sink=2, window=sys.maxsize), 36),
        (AttnMask.prefix_lm(8, 2**70), 64),
        (AttnMask.causal_blockwise(8, block=2**40, local_blocks=2**40), 36),
        (AttnMask.causal_blockwise(8, block=2, local_blocks=2**62), 36),
        (AttnMask.documents(np.array([2, 3], dtype=np.uint64)), 9),
        (AttnMask.causal(np.int32(4)), 10),
    ],
)
def test_areas_are_exact_however_large_a_parameter_is(mask, area):
    assert mask.area == area


@given(
    st.sampled_from(["window", "streaming", "prefix"]),
    st.integers(1, HUGE),
    st.integers(0, HUGE - 8),
    st.integers(0, HUGE - 8),
)
def test_far_pairs_follow_the_rule(kind, size, q0, distance):
    """Eight queries and eight keys, anywhere in the longest sequence, pair by pair."""
    mask, rule = {
        "window": (AttnMask.sliding_window(HUGE, size), lambda q, k: q - size < k <= q),
        "streaming": (AttnMask.streaming(HUGE, 9, size),
            lambda q, k: k <= q and (k < 9 or k > q - size)),
        "prefix": (AttnMask.prefix_lm(HUGE, size), lambda q, k: k <= q or max(q, k) < size),
    }[kind]  # fmt: skip
    for k0 in {max(q0 - distance, 0), max(q0 - size - 3, 0), q0, min(q0 + 3, HUGE - 8)}:
        cut = restrict_slices(mask.bands, q0, q0 + 8, k0, k0 + 8)
        want = sum(rule(q, k) for q in range(q0, q0 + 8) for k in range(k0, k0 + 8))
        assert slice_area(cut).sum() == want


@pytest.mark.parametrize("wrong", [True, 3.7, 3.0, "3", None, float("nan"), -1, [3]])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("seqlen", AttnMask.full),
        ("seqlen", AttnMask.streaming),
        ("cached", lambda v: AttnMask.causal(8, v)),
        ("window", lambda v: AttnMask.sliding_window(8, v)),
        ("prefix", lambda v: AttnMask.prefix_lm(8, v)),
        ("sink", lambda v: AttnMask.streaming(8, sink=v)),
        ("block", lambda v: AttnMask.causal_blockwise(8, block=v)),
        ("local_blocks", lambda v: AttnMask.causal_blockwise(8, local_blocks=v)),
        ("num_answers", lambda v: AttnMask.shared_question(8, num_answers=v)),
        ("document lengths", lambda v: AttnMask.documents([4, v])),
        ("answers", lambda v: AttnMask.shared_prompt(4, [v])),
        ("prompt", lambda v: AttnMask.shared_prompt(v, [4])),
        ("text_lengths", lambda v: AttnMask.modality([v], 4)),
        ("image_size", lambda v: AttnMask.modality([4], v)),
        ("q_len", lambda v: AttnMask.from_slices(v, 4, [])),
        ("slice", lambda v: AttnMask.from_slices(4, 4, [(0, v, 0, 4, "full")])),
        ("width", lambda v: AttnMask.full(4).draw(width=v)),
    ],
)
def test_what_is_no_whole_number_is_refused_by_name(name, make, wrong):
    with pytest.raises(ValueError, match=name) as refusal:
        make(wrong)
    assert str(wrong) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AttnMask.full(2**31), "seqlen must be 2147483647 or less, got 2147483648"),
        (lambda: AttnMask.documents([2**30] * 3), "the tokens of document lengths must be 2147483"),
        (lambda: AttnMask.documents("35"), "must be a list of whole numbers, got '35'"),
        (lambda: AttnMask.shared_question(10**9, num_answers=10**8), "too many"),
        (lambda: AttnMask.full(HUGE).to_dense(), "too many"),
        (lambda: AttnMask.full(4).draw(width=0), "width must be 1 or more, got 0"),
        (lambda: AttnMask.from_ranges([[0, 1], [2]]), "ranges must be integers"),
        (lambda: AttnMask.from_slices(4, 4, [(0, 1, 2)]), "a slice is"),
        (lambda: named_mask("streaming:sink=1e3", 9), "sink must be a whole number, got 1000.0"),
        (lambda: named_mask("streaming:sink=1,sink=2", 9), "sink is given twice"),
        (lambda: named_mask("streaming:sink=1", 9, sink=2), "sink is given twice"),
        (lambda: named_mask("streaming:sinks=1", 9), "'sinks'; it takes sink, window"),
        (lambda: named_mask("sliding_window", 9), "'window'; it takes window"),
        (lambda: named_mask(None, 9), "must be a string, got None"),
        (lambda: named_mask("shared_question:question_fraction=nan", 9), "finite number, got nan"),
        (lambda: AttnMask.from_ranges([[0, 1]], segments=[(1, 0)]), "must begin at token 0"),
        (lambda: AttnMask.from_ranges([[0, 1]], segments=[(0, 0), (1, 0)]), "within 1 tokens"),
        (lambda: AttnMask.from_ranges([[0, 1]], segments=[(0, -1)]), "position -1"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError) as refusal:
        make()
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("mask", "segments"),
    [
        (AttnMask.causal(5), [[0, 0]]),
        (AttnMask.causal(5, 2), [[0, 0]]),
        (AttnMask.documents([2, 0, 3]), [[0, 0], [2, 0]]),
        (AttnMask.documents([0, 0]), [[0, 0]]),
        (AttnMask.shared_prompt(3, [2, 0, 4]), [[0, 0], [3, 3], [5, 3]]),
        (AttnMask.shared_prompt(3, [0, 4]), [[0, 0]]),
        (AttnMask.shared_prompt(0, [2, 4]), [[0, 0], [2, 0]]),
        (AttnMask.shared_question(10, 0.2, 2), [[0, 0], [2, 2], [6, 2]]),
        (AttnMask.from_slices(4, 4, [], segments=[(0, 0), (2, 7)]), [[0, 0], [2, 7]]),
    ],
)
def test_segments(mask, segments):
    assert mask.segments.tolist() == segments
    with pytest.raises(ValueError, match="read-only"):
        mask.segments[0, 0] = 1


def test_masks_of_other_segments_are_not_equal():
    packed = AttnMask.documents([2, 3])
    slices = [(0, 2, 0, 2, "causal"), (2, 5, 2, 5, "causal")]
    assert AttnMask.from_slices(5, 5, slices) != packed
    again = AttnMask.from_slices(5, 5, slices, segments=packed.segments)
    assert again == packed
    assert hash(again) == hash(packed)


@pytest.mark.parametrize(
    ("fn", "heads"),
    [
        (lambda b, h, q, kv: (kv <= q) & ((h == 0) | (kv > 0)), "heads 0 and 1 differ"),
        (lambda b, h, q, kv: (kv <= q) & ((h != 77) | (kv > 0)), "heads 0 and 77 differ"),
        (lambda b, h, q, kv: kv <= q + (1 if h == 3 else 0), "heads 0 and 3 differ"),
        (
            lambda b, h, q, kv: HEADS[np.asarray(h), q, kv],
            "heads 0 and 11 differ at query 5, key 0",
        ),
        (lambda b, h, q, kv: (kv <= q) & (b != 5), "batches 0 and 5 differ at query 0, key 0"),
        (lambda b, h, q, kv: (kv <= q) & (b * h == 0), "heads 0 and 2 in batches 0 and 1"),
    ],
)
def test_a_function_of_the_head_or_batch_is_refused(fn, heads):
    with pytest.raises(ValueError, match=heads):
        AttnMask.from_mask_mod(fn, 6, 6)
    assert AttnMask.from_mask_mod(fn, 6, 6, head=0, batch=0).area == 21


def test_one_head_and_the_number_of_heads():
    def table(b, h, q, kv):
        return HEADS[np.asarray(h), q, kv]

    assert AttnMask.from_mask_mod(table, 6, 6, head=11).area == 20
    assert AttnMask.from_mask_mod(table, 6, 6, num_heads=11).area == 21
    with pytest.raises(ValueError, match=r"mask_mod raised IndexError for batch 0, head 12"):
        AttnMask.from_mask_mod(table, 6, 6, num_heads=13)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda *_: None, r"returned NoneType \(None\)"),
        (lambda b, h, q, kv: (q - kv) * 1.0, "returned float32 scores"),
        (lambda *_: float("nan"), r"returned float scores \(nan\)"),
        (lambda *_: "yes", r"returned str \('yes'\)"),
        (lambda b, h, q, kv: q - kv, "returned the integer"),
        (lambda b, h, q, kv: (q >= kv)[:2], r"returned shape \(2, 6\) for 4 queries x 6 keys"),
        (lambda b, h, q, kv: (q >= 0)[:, 0], r"returned shape \(4,\)"),
        (lambda *_: 1 // 0, "mask_mod raised ZeroDivisionError for batch 0, head 0, queries"),
        (7, "a mask_mod is a function"),
    ],
)
def test_what_a_function_returns_is_checked(fn, said):
    with pytest.raises(ValueError, match=said):
        AttnMask.from_mask_mod(fn, 4, 6)
    assert AttnMask.from_mask_mod(lambda b, h, q, kv: (kv <= q) * 1, 4, 6).area == 10
    assert AttnMask.from_mask_mod(lambda *_: True, 4, 6).area == 24
