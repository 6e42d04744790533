"""Streams: every token once an epoch, resumed at any place, on any number of ranks."""

import json
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from dcp.data.batching import TokenBudgetBatches
from tests.loading import LENGTHS, AtOnce, documents_of, drain, loader_of

STREAM = LENGTHS * 3  # 27 documents
DOCUMENTS = documents_of(STREAM)
WINDOW = 7


class Stream:
    """A stream of documents; notes what was asked of it."""

    def __init__(self, documents=DOCUMENTS, *, broken=None):
        self.documents, self.broken = documents, broken
        self.epochs, self.given = [], 0

    def __iter__(self):
        for number, document in enumerate(self.documents):
            if number == self.broken:
                raise OSError(f"shard of document {number} is gone")
            self.given += 1
            yield document

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class Stateful(Stream):
    """One that can continue by a state of its own; ``late`` by one document, as some are."""

    def __init__(self, documents=DOCUMENTS, *, late=0):
        super().__init__(documents)
        self.position, self.late = 0, late

    def __iter__(self):
        begin, self.position = self.position, 0
        for number in range(begin, len(self.documents)):
            self.position = number + 1
            self.given += 1
            yield self.documents[number]
        self.position = 0

    def state_dict(self):
        return {"position": self.position - self.late * (self.position > 0)}

    def load_state_dict(self, state):
        self.position = state["position"]


def stream_loader(stream=None, **options):
    options = {"stream_window": WINDOW} | options
    return loader_of(Stream() if stream is None else stream, **options)


def rows(batch):
    return batch.epoch, batch.index, batch.tokens.tolist(), batch.labels.tolist()


def take(loader, count):
    """The next batches, across epochs."""
    found = []
    while len(found) < count:
        for batch, _ in loader:
            found.append((rows(batch), json.loads(json.dumps(loader.state_dict()))))
            if len(found) == count:
                break
    return found


def by_the_rule(epoch, *, window=WINDOW, **options):
    """Documents of each batch: windows one after the other, each packed as an indexed dataset."""
    for number, first in enumerate(range(0, len(STREAM), window)):
        lengths = np.array(STREAM[first : first + window])
        batches = TokenBudgetBatches(lengths, 64, over_long="split", **options)
        for pieces in batches.epoch(epoch, number):
            yield [token for d, start, stop in pieces for token in DOCUMENTS[first + d][start:stop]]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("options", [{}, {"seed": None}, {"bucket_window": 4}])
def test_each_token_once_an_epoch_in_the_order_of_its_window(options, prefetch):
    stream = Stream()
    loader = stream_loader(stream, prefetch=prefetch, **options)
    for epoch in range(3):
        found = [sorted(tokens) for tokens, *_ in drain(loader)]
        assert found == [sorted(tokens) for tokens in by_the_rule(epoch, **options)]
        assert sorted(token for tokens in found for token in tokens) == sorted(
            np.concatenate(DOCUMENTS).tolist()
        )
    assert stream.epochs[:3] == [0, 1, 2]
    loader.close()


def test_labels_and_positions_are_those_of_an_indexed_dataset():
    """A window that holds all documents, in their own order, is that dataset."""
    stream = stream_loader(stream_window=100, seed=None)
    assert drain(stream) == drain(loader_of(DOCUMENTS, seed=None))


def test_seeds_and_epochs_shuffle_each_window():
    first, second = stream_loader(seed=1), stream_loader(seed=2)
    orders = [drain(first), drain(first), drain(second)]
    assert len({json.dumps(order) for order in orders}) == 3
    assert drain(stream_loader(seed=1)) == orders[0]


def test_ordered_packing_leaves_out_what_is_not_full():
    loader = stream_loader(packing="ordered")
    whole = [sorted(tokens) for tokens, *_ in drain(loader)]
    assert whole == [sorted(tokens) for tokens in by_the_rule(0, packing="ordered")]
    assert all(len(tokens) >= 48 for tokens in whole)
    with pytest.raises(ValueError, match="no batch of epoch 0 is full enough: lower tokens"):
        next(iter(stream_loader(Stream(documents_of([3, 4])), packing="ordered")))


# --------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", [Stream, Stateful])
@pytest.mark.parametrize("packing", ["first_fit", "ordered"])
def test_resuming_at_every_place_goes_on_with_the_next_batch(kind, packing):
    whole = take(stream_loader(kind(), packing=packing), 24)
    assert {epoch for (epoch, *_), _ in whole} >= {0, 1}
    again = stream_loader(kind(), packing=packing)
    for done, (_, state) in enumerate(whole[:-3], start=1):
        fresh = stream_loader(kind(), packing=packing) if done % 5 == 0 else again
        fresh.load_state_dict(state)
        assert fresh.state_dict() == state
        assert take(fresh, 3) == whole[done : done + 3]


def test_a_stream_with_a_state_of_its_own_is_not_read_again():
    whole = take(stream_loader(Stateful(), prefetch=0), 9)
    state = whole[-1][1]
    assert state["stream"]["window"] >= 2
    for kind, skipped in ((Stateful, 0), (Stream, state["stream"]["document"])):
        stream = kind()
        loader = stream_loader(stream, prefetch=0)
        before = stream.given
        loader.load_state_dict(state)
        assert stream.given - before == skipped + WINDOW + 1  # the window, and a look at the next


def test_what_does_not_continue_is_refused():
    place = take(stream_loader(), 9)[-1][1]
    late = take(stream_loader(Stateful(late=1)), 9)[-1][1]

    def refused(match, stream, state, **options):
        with pytest.raises(ValueError, match=match):
            stream_loader(stream, **options).load_state_dict(state)

    refused("by its own state_dict the stream gives other documents", Stateful(late=1), late)
    refused("by reading it again the stream gives other documents", Stream(DOCUMENTS[::-1]), place)
    refused("epoch 0 of the stream has 9 documents, and 14 were", Stream(DOCUMENTS[:9]), place)
    refused("stream_window was 7 and is 8", None, place, stream_window=8)
    refused("is no place in a stream", None, place | {"stream": {"window": 1}})
    with pytest.raises(ValueError, match="the data was a stream and is no stream"):
        loader_of(DOCUMENTS).load_state_dict(place)
    with pytest.raises(ValueError, match="the data was no stream and is a stream"):
        stream_loader().load_state_dict(loader_of(DOCUMENTS).state_dict())
    damaged = place | {"stream": place["stream"] | {"taken": 50}}
    loader = stream_loader()
    loader.load_state_dict(damaged)
    with pytest.raises(ValueError, match="cannot resume behind batch 50 of"):
        next(iter(loader))


# --------------------------------------------------------------------------- kinds of streams


def test_torch_streams_and_their_loaders_are_streams():
    class Torch(IterableDataset):
        def __iter__(self):
            return iter([{"input_ids": document} for document in DOCUMENTS])

    wanted = drain(stream_loader())
    assert drain(stream_loader(Torch())) == wanted
    assert drain(stream_loader(DataLoader(Torch(), batch_size=None))) == wanted


def test_an_endless_stream_is_read_no_further_than_needed():
    def endless():
        number = 0
        while True:
            given.append(number)
            yield np.full(10, number)
            number += 1

    given = []
    loader = stream_loader(endless(), look_ahead=2, planning_pool=AtOnce(), prefetch=0)
    found = take(loader, 40)
    assert {epoch for (epoch, *_), _ in found} == {0}
    seen = [token for (_, _, tokens, _), _ in found for token in tokens]
    assert len(seen) == 10 * len(set(seen))  # none twice
    assert len(given) - len(set(seen)) <= 3 * WINDOW + 1
    assert len(loader._stream._windows) <= 3  # what is held does not grow


def test_a_generator_lasts_one_epoch():
    loader = stream_loader(document for document in DOCUMENTS)
    assert len(drain(loader)) == len(list(by_the_rule(0)))
    with pytest.raises(ValueError, match="a generator, can be read only once"):
        drain(loader)


def test_a_stream_has_no_length():
    loader = stream_loader()
    with pytest.raises(TypeError, match="a stream does not tell how many batches"):
        len(loader)
    with pytest.raises(ValueError, match="cannot be had again"):
        loader.sequence_batch(0, 0)
    assert len(list(loader)) == len(list(by_the_rule(0)))


def test_mask_functions_see_the_samples_of_a_stream():
    def mask_fn(seqlens, samples):
        assert [len(sample) for sample in samples] == seqlens
        return ["full"] * len(seqlens)

    assert drain(stream_loader(mask_fn=mask_fn)) == drain(stream_loader())


class Reused(Stream):
    def __iter__(self):
        buffer = np.zeros(5, dtype=np.int64)
        for number in range(20):
            buffer[:] = number
            yield buffer


@pytest.mark.parametrize(
    ("match", "stream", "options"),
    [
        ("the stream is empty: epoch 0", Stream([]), {}),
        ("document 1 has no 'input_ids', it has text",
         Stream([np.arange(3), {"text": "abc"}]), {}),
        ("input_ids of document 0 must be a vector of integers, got float64",
         Stream([np.zeros((2, 3))]), {}),
        ("document 0 of the stream has changed since it was given: yield a copy", Reused(), {}),
        ("stream_window must be 1 document or more, got 0", Stream(), {"stream_window": 0}),
        ("stream_window must be 1 document or more, got 2.5", Stream(), {"stream_window": 2.5}),
        ("packing must be", Stream(), {"packing": "tetris"}),
        ("document 10 has 70 tokens, more than tokens_per_batch=64",
         Stream(documents_of([3] * 10 + [70])), {"over_long": "raise"}),
    ],
)  # fmt: skip
def test_streams_that_are_refused(match, stream, options):
    with pytest.raises(ValueError, match=match):
        drain(stream_loader(stream, **options))


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_failing_stream_fails_the_batch_that_needs_it(prefetch):
    """Batches of the windows before are given; none of the broken one, which has to be whole."""
    loader = stream_loader(Stream(broken=2 * WINDOW + 3), prefetch=prefetch)
    found = []
    with pytest.raises(OSError, match="shard of document 17 is gone"):
        for batch, _ in loader:
            found.append(sorted(batch.tokens.tolist()))
    wanted = [sorted(tokens) for tokens in by_the_rule(0)]
    count = sum(1 for tokens in wanted if tokens and min(tokens) // 1000 < 2 * WINDOW)
    assert found == wanted[: len(found)]
    assert len(found) == count
    assert loader.state_dict()["position"] == len(found)


# --------------------------------------------------------------------------- several ranks


def on_each_rank(skip, state, planning_ranks, count):
    with stream_loader(
        Stateful(), group=torch.distributed.group.WORLD, planning_ranks=planning_ranks
    ) as loader:
        if state is not None:
            loader.load_state_dict(state)
        return take(loader, count)


def joined(results):
    """Each batch with the tokens of all ranks together, in an order without ranks."""
    for parts in zip(*results, strict=True):
        states = [state for _, state in parts]
        assert all(state == states[0] for state in states)
        pairs = sorted(pair for (_, _, *columns), _ in parts for pair in zip(*columns, strict=True))
        yield parts[0][0][:2], pairs


@pytest.mark.parametrize(("world", "planning_ranks"), [(2, (0,)), (3, (2, 0))])
def test_ranks_share_a_stream_and_go_on_in_another_number(gloo_pool, world, planning_ranks):
    alone = take(stream_loader(), 16)
    wanted = list(joined([alone]))
    results = gloo_pool(world).run(on_each_rank, 0, None, planning_ranks, 16)
    assert list(joined(results)) == wanted
    for done in (3, 7, 11):  # from one rank's state to several, and back
        several = gloo_pool(world).run(on_each_rank, 0, alone[done - 1][1], planning_ranks, 4)
        assert list(joined(several)) == wanted[done : done + 4]
        one = stream_loader()
        one.load_state_dict(results[1][done - 1][1])
        assert list(joined([take(one, 4)])) == wanted[done : done + 4]


def differing_on_each_rank(how):
    rank = torch.distributed.get_rank()
    documents = documents_of([10] * 30)
    if rank == 1 and how == "content":
        documents[9] = documents[9] + 1
    broken = {"all broken": 9, "planner broken": 9 if rank == 0 else None}.get(how)
    options = {"group": torch.distributed.group.WORLD, "plan_options": {"strategy": "zigzag"}}
    with stream_loader(Stream(documents, broken=broken), **options) as loader:
        count = 0
        try:
            for _ in loader:
                count += 1
        except Exception as error:
            return count, f"{type(error).__name__}: {error}"
    return count, None


def test_every_rank_hears_of_a_failing_stream_at_the_same_batch(gloo_pool):
    for how in ("all broken", "planner broken"):
        (first, own), (second, other) = gloo_pool(2).run(differing_on_each_rank, how)
        assert first == second == 2  # 70 tokens of the first window in batches of 64
        assert own == "OSError: shard of document 9 is gone"
        assert "could not plan: OSError: shard of document 9 is gone" in other


def test_ranks_that_read_other_streams_are_found_out(gloo_pool):
    (whole, _), (count, message) = gloo_pool(2).run(differing_on_each_rank, "content")
    assert (whole, count) == (9, 2)
    assert "rank 1 reads another stream than the rank that planned" in message
    assert "documents 7 to 13 differ; every rank must iterate all" in message


def test_reading_ends_with_the_loader():
    before = set(threading.enumerate())
    with stream_loader() as loader:
        next(iter(loader))
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
