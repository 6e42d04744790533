"""Windows and chunks over a sharded cache: each new token sees what its position says, no more."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp import AttnMask
from dcp.inference import CachedAttention, KVCache, plan_turn
from dcp.inference.reach import Reach, reach_of, turn_mask
from dcp.plans import Plan
from tests.oracle import dense_attention
from tests.symbolic import check_plan
from tests.test_inference import PLACED, SPEC, cluster_of, tensors_of

REACHES = st.one_of(
    st.builds(Reach, window=st.integers(1, 12)), st.builds(Reach, chunk=st.integers(1, 12))
)


@st.composite
def turns(draw):
    """Reach, ranks, the rank of each token so far, and the number of new ones."""
    num_ranks = draw(st.integers(1, 4))
    owner = draw(st.lists(st.integers(0, num_ranks - 1), max_size=30))
    return draw(REACHES), num_ranks, np.array(owner, dtype=np.int64), draw(st.integers(1, 20))


@given(turn=turns(), strategy=st.sampled_from(PLACED))
def test_what_new_tokens_see_is_what_their_positions_say(turn, strategy):
    reach, num_ranks, owner, new = turn
    past = len(owner)
    first = reach.first(past)
    mask = turn_mask(reach, past, owner[first:], new)
    held = np.bincount(owner[first:], minlength=num_ranks)
    if isinstance(mask, str):
        mask = AttnMask.causal(int(held.sum()) + new, int(held.sum()))
    kept = np.arange(first, past)
    keys = np.concatenate(
        [*(kept[owner[first:] == r] for r in range(num_ranks)), past + np.arange(new)]
    )
    query = past + np.arange(new)
    begin = np.array([reach.first(int(each)) for each in query])
    wanted = (keys <= query[:, None]) & (keys >= begin[:, None])
    assert np.array_equal(mask.to_dense(), wanted)
    assert mask.area == wanted.sum()  # no pair twice
    a_plan = plan_turn([new], [held], SPEC, cluster_of(num_ranks), strategy=strategy, masks=[mask])
    check_plan(Plan.from_bytes(a_plan.to_bytes()), "default", wanted, seed=0)


LAYERS = [Reach(window=7), Reach(), Reach(chunk=5)]
SCRIPT = [
    ("pass_kv", {"a": 33, "b": 5}),
    *[("pass_q", {"a": 1, "b": 1})] * 9,
    ("pass_q", {"a": 12, "b": 2, "c": 8}),
    *[("pass_q", {"c": 1, "a": 1})] * 6,
    ("planned", {"a": 3, "b": 20}),
    ("pass_either", {"c": 11, "a": 2}),
    ("pass_kv", {"a": 1, "b": 1, "c": 1}),
]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_layers_that_differ_equal_dense_attention_in_every_turn(num_ranks):
    caches = [
        KVCache(
            SPEC,
            num_layers=3,
            num_pages=40,
            window_pages=26,
            page_size=4,
            reach=LAYERS,
            rank=rank,
            num_ranks=num_ranks,
        )
        for rank in range(num_ranks)
    ]
    attention, worst = CachedAttention(caches), 0.0
    for step, (strategy, turn) in enumerate(SCRIPT):
        names, new = list(turn), list(turn.values())
        cached = caches[0].held(names).sum(axis=1).tolist()
        shifts = [step + index for index in range(len(names))]
        cluster = cluster_of(num_ranks)
        plans = attention.plans(names, new, cluster, strategy=strategy, shifts=shifts)
        attention.begin(plans, names)
        for layer, reach in enumerate(LAYERS):
            q, kv, wanted = [], [], []
            for name, count, before in zip(names, new, cached, strict=True):
                every_q, every_kv = tensors_of(name)
                query, key = (
                    torch.arange(before, before + count)[:, None],
                    torch.arange(before + count),
                )
                begin = torch.tensor([reach.first(each) for each in query.flatten().tolist()])[
                    :, None
                ]
                q.append(every_q[before : before + count])
                kv.append(every_kv[before : before + count])
                mask = (begin <= key) & (key <= query)
                wanted.append(
                    dense_attention(q[-1], *every_kv[: before + count].unbind(1), mask)[0]
                )
            found = attention.attention(layer, torch.cat(q), torch.cat(kv))
            worst = max(worst, float((found - torch.cat(wanted)).abs().max()))
    assert worst < 1e-10


def test_how_far_back_is_read_from_a_masks_name():
    assert reach_of("causal") == Reach()
    assert reach_of("sliding_window:window=9") == Reach(window=9)
    assert reach_of("chunked:chunk=9") == Reach(chunk=9)
    assert [Reach(window=3).first(p) for p in (0, 2, 3)] == [0, 0, 1]
    assert [Reach(chunk=3).first(p) for p in (2, 3, 5)] == [0, 3, 3]
    with pytest.raises(ValueError, match="mask 'streaming' cannot be served"):
        reach_of("streaming")
    with pytest.raises(ValueError, match="window must be 1 or more, got 0"):
        Reach(window=0)
    with pytest.raises(ValueError, match="window=2 and chunk=3: give one"):
        Reach(window=2, chunk=3)
