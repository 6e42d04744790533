"""Documents dealt to the micro-batches of a step: nothing lost, none too full, none slow."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcp
from dcp.cost import sequence_seconds
from dcp.data import DCPDataLoader
from dcp.data.batching import BatchesFrom, TokenBudgetBatches
from dcp.data.dealing import deal, dealing
from dcp.data.groups import batches_of

SPEC = dcp.AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
CLUSTER = dcp.Cluster(devices_per_node=4)
lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=40)


def squares(pieces):
    return 10.0 + (pieces[:, 2] - pieces[:, 1]) ** 2


def taken(batches, micro_batches, *, epoch=0, position=0, count=None, seconds=squares):
    places = BatchesFrom(
        batches,
        epoch=epoch,
        position=position,
        deal=dealing(micro_batches, batches.tokens_per_batch, seconds, batches),
    )
    return [next(places) for _ in range(places.num_batches if count is None else count)]


@given(lengths_strategy, st.integers(1, 5), st.integers(0, 2), st.none() | st.integers(1, 45))
def test_every_token_comes_once_an_epoch_within_the_budget(lengths, count, epoch, longest):
    batches = TokenBudgetBatches(np.array(lengths), 45, max_seqlen=longest, over_long="split")
    steps = taken(batches, count, epoch=epoch)
    assert len(steps) % count == 0
    assert [place.last for place in steps] == [False] * (len(steps) - 1) + [True]
    seen = [np.zeros(n, dtype=int) for n in lengths]
    documents = set()
    for place in steps:
        assert len(place.pieces)
        assert (place.pieces[:, 2] - place.pieces[:, 1]).sum() <= 45
        for document, start, stop in place.pieces.tolist():
            seen[document][start:stop] += 1
            documents.add(document)
    assert all((times == 1).all() for times in seen)
    assert documents == set(range(len(lengths)))


@given(lengths_strategy, st.integers(2, 4))
def test_the_documents_of_a_step_stay_those_of_its_batches(lengths, count):
    batches = TokenBudgetBatches(np.array(lengths), 45)
    given_pieces = list(batches.epoch(0))
    steps = [place.pieces for place in taken(batches, count)]
    for first in range(0, len(steps), count):
        before = np.concatenate(given_pieces[first : first + count])
        after = np.concatenate(steps[first : first + count])
        after = after[(after[:, 2] > after[:, 1]) | (np.isin(after[:, 0], empty(lengths)))]
        assert {*map(tuple, before.tolist())} == {*map(tuple, after.tolist())}


def empty(lengths):
    return np.flatnonzero(np.array(lengths) == 0)


@given(lengths_strategy, st.integers(0, 20))
def test_dealt_batches_resume_within_a_step(lengths, skip):
    batches = TokenBudgetBatches(np.array(lengths), 45, seed=7)
    whole = taken(batches, 3, count=skip + 4)
    rest = taken(batches, 3, epoch=whole[skip].epoch, position=whole[skip].position, count=4)
    for one, other in zip(whole[skip:], rest, strict=True):
        assert (one.epoch, one.position, one.last) == (other.epoch, other.position, other.last)
        assert (one.pieces == other.pieces).all()


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=7),
    st.integers(1, 3),
    st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
def test_the_slowest_is_near_the_best_deal_and_never_slower_than_given(tokens, count, start):
    tokens = np.array(tokens)
    seconds, before = tokens.astype(float) ** 2, np.array(start)[: len(tokens)] % count
    budget = int(np.bincount(before, tokens, count).max())
    dealt = deal(seconds, tokens, before, count=count, tokens_per_batch=budget)
    slowest = np.bincount(dealt, seconds, count).max()
    assert np.bincount(dealt, tokens, count).max() <= budget
    assert slowest <= np.bincount(before, seconds, count).max()
    best = min(
        np.bincount(of, seconds, count).max()
        for of in map(np.array, product(range(count), repeat=len(tokens)))
        if np.bincount(of, tokens, count).max() <= budget
    )
    assert slowest <= 4 / 3 * best


def test_micro_batches_take_equally_long_as_planned():
    lengths = np.random.default_rng(1).lognormal(8, 1.3, 400).astype(int).clip(max=49152)

    def seconds(pieces):
        return sequence_seconds(dcp.SequenceBatch(pieces[:, 2] - pieces[:, 1]), SPEC, CLUSTER)

    batches = TokenBudgetBatches(lengths, 131072)
    slowness = {}
    for name, count in (("packed", 1), ("dealt", 4)):
        planned = []
        for place in taken(batches, count, seconds=seconds)[:8]:
            seqlens = place.pieces[:, 2] - place.pieces[:, 1]
            plan = dcp.plan(dcp.SequenceBatch(seqlens), SPEC, CLUSTER, strategy="zigzag")
            planned.append(plan.stats.layer_seconds)
        steps = np.array(planned).reshape(2, 4)
        slowness[name] = (steps.max(axis=1) / steps.mean(axis=1)).max()
    assert slowness["packed"] > 1.25
    assert slowness["dealt"] < 1.05


def test_seconds_of_a_sequence_are_those_of_its_attention_and_its_linear_layers():
    seqlens = [1000, 10, 0]
    masks = {"full": "causal", "local": "sliding_window:window=4"}
    both = dcp.SequenceBatch(seqlens, masks, weights={"full": 1, "local": 3})
    found = sequence_seconds(both, SPEC, CLUSTER, model_width=512)
    each = [
        sequence_seconds(dcp.SequenceBatch(seqlens, mask), SPEC, CLUSTER, model_width=512)
        for mask in masks.values()
    ]
    assert found == pytest.approx((each[0] + 3 * each[1]) / 4)
    one = dcp.plan(
        dcp.SequenceBatch(seqlens[:1]), SPEC, dcp.Cluster(devices_per_node=1), model_width=512
    )
    assert each[0][0] == pytest.approx(one.stats.layer_seconds, rel=0.2)
    assert found[2] == 0


@given(lengths_strategy, st.integers(2, 4))
def test_groups_stay_together(lengths, count):
    lengths = np.array(lengths) % 8
    groups = np.arange(len(lengths)) // 3
    batches = batches_of(lengths, groups, tokens_per_batch=24)
    where = {}
    for number, place in enumerate(taken(batches, count)):
        for document, start, stop in place.pieces.tolist():
            if stop > start:
                where.setdefault(groups[document], set()).add(number)
    assert all(len(numbers) == 1 for numbers in where.values())


@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_the_loader_deals_by_masks_and_resumes(kind):
    lengths = [40, 3, 38, 5, 30, 9, 2, 31, 8, 7, 33, 12, 6]
    documents = [np.full(n, number) for number, n in enumerate(lengths)]

    def mask_fn(seqlens, samples):  # of most documents a token sees but itself
        return [
            dcp.AttnMask.causal(n) if n > 30 else dcp.AttnMask.documents([1] * n) for n in seqlens
        ]

    def loader():
        return DCPDataLoader(
            documents if kind == "indexed" else iterable(documents),
            mask_fn,
            spec=SPEC,
            tokens_per_batch=100,
            micro_batches=2,
            num_workers=0,
            plan_options={"model_width": 1},
        )

    with loader() as whole:
        batches = [(batch, whole.state_dict()) for _ in range(2) for batch, _ in whole]
    steps = list(zip(batches[::2], batches[1::2], strict=True))
    for one, other in steps:
        kept = [sum(n > 30 for n in sizes(batch)) for batch, _ in (one, other)]
        assert abs(kept[0] - kept[1]) <= 1
    epoch = [b.tokens.tolist() for b, _ in batches if b.epoch == 0]
    assert sorted(np.concatenate(epoch)) == sorted(np.concatenate(documents))
    with loader() as resumed:
        resumed.load_state_dict(batches[0][1])
        again = next(iter(resumed))[0]
        assert again.tokens.tolist() == batches[1][0].tokens.tolist()
    with loader() as other, pytest.raises(ValueError, match="micro_batches was 3 and is 2"):
        other.load_state_dict(batches[0][1] | {"micro_batches": 3})


def sizes(batch):
    return [stop - start for _, start, stop in batch.pieces.tolist()]


class iterable:
    def __init__(self, documents):
        self.documents = documents

    def __iter__(self):
        return iter(self.documents)


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_refused(count):
    with pytest.raises(ValueError, match="micro_batches must be a whole number, 1 or more"):
        dealing(count, 10, squares)


def test_nothing_changes_with_one_micro_batch_a_step():
    batches = TokenBudgetBatches(np.array([5, 9, 3, 8, 1]), 10)
    for place, pieces in zip(taken(batches, 1), batches.epoch(0), strict=True):
        assert (place.pieces == pieces).all()
