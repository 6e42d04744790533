"""Pages that sequences share, or that nobody can see any more: what is kept is always right."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp import AttentionSpec
from dcp.inference import KVCache
from dcp.inference.reach import Reach
from tests.test_inference import spread

SPEC = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=2, dtype="float64")
REACH = [Reach(), Reach(window=6), Reach(chunk=5), Reach()]


class Told:
    """A cache whose rows hold what was written, beside a plain record of what each sequence said.

    A token's key is a number of its own, so that a row that belongs to another is seen.
    """

    def __init__(self, num_ranks, rank, **options):
        options = {"num_pages": 9, "page_size": 3, "reach": REACH} | options
        self.cache = KVCache(
            SPEC, num_layers=len(options["reach"]), rank=rank, num_ranks=num_ranks, **options
        )
        self.said: dict[str, list[tuple[int, float]]] = {}  # owner and key of each token

    def extend(self, name, owner, first):
        rows = self.cache.extend([name], [owner])
        tokens = [(rank, float(first + i)) for i, rank in enumerate(owner)]
        mine = torch.tensor([key for rank, key in tokens if rank == self.cache.rank])
        for pool, kind in zip(self.cache.pools, self.cache.layers, strict=True):
            pool[torch.from_numpy(rows[kind])] = mine.double()[:, None, None, None]
        self.said[name] = [*self.said.get(name, []), *tokens]

    def share(self, from_, to, count):
        self.cache.share(from_, to, num_tokens=count)
        self.said[to] = self.said[from_][:count]

    def check(self):
        """All that the next token of any sequence may see is there, in the order of positions."""
        cache = self.cache
        assert set(cache.sequences) == set(self.said)
        for name, tokens in self.said.items():
            for pool, kind in zip(cache.pools, cache.layers, strict=True):
                reach = cache.kinds[kind]
                wanted = tokens[reach.first(len(tokens)) :]
                mine = [key for rank, key in wanted if rank == cache.rank]
                rows = torch.from_numpy(cache.rows([name], kind))
                kept = pool[rows][:, 0, 0, 0].tolist()
                assert kept[len(kept) - len(mine) :] == mine
                counts = np.bincount([rank for rank, _ in wanted], minlength=cache.num_ranks)
                assert cache.seen([name], kind)[0].tolist() == counts.tolist()


def used_pages(cache, kind):
    """Pages of each rank that any table names."""
    tables = [cache.known(name).tables[kind].pages for name in cache.sequences]
    return [len({page for of in tables for page in of[rank]}) for rank in range(cache.num_ranks)]


@st.composite
def steps(draw):
    num_ranks = draw(st.integers(1, 3))
    ranks = st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=9)
    names = st.sampled_from("abcd")
    step = st.one_of(
        st.tuples(st.just("extend"), names, ranks),
        st.tuples(st.just("share"), names, names, st.integers(1, 12)),
        st.tuples(st.just("evict"), names),
        st.tuples(st.just("extent")),
        st.tuples(st.just("undo")),
        st.tuples(st.just("settle")),
        st.tuples(st.just("disk")),
    )
    return num_ranks, draw(st.lists(step, max_size=25))


@settings(max_examples=200)
@given(told=steps())
def test_whatever_happens_each_sequence_finds_its_own_tokens(told, tmp_path_factory):
    num_ranks, script = told
    path = tmp_path_factory.getbasetemp() / "cache"
    told = [Told(num_ranks, rank) for rank in range(num_ranks)]
    before = None
    for number, (what, *options) in enumerate(script):
        refused = []
        for each in told:
            cache, (name, *rest) = each.cache, options or ["a"]
            said = dict(each.said)
            try:
                if what == "extend":
                    each.extend(name, rest[0], 100 * number)
                elif what == "share":
                    each.share(name, *rest)
                elif what == "evict":
                    cache.evict(name)
                    del each.said[name]
                elif what == "disk":
                    cache.save(path)
                    each.cache = KVCache.load(path)
                    assert (each.cache.free_pages >= cache.free_pages).all()
                refused.append(None)
            except ValueError as error:
                refused.append(str(error))
                each.said = said
        assert len(set(refused)) == 1  # alike on all ranks
        if what == "extent":
            before = [(each.cache.extent(), dict(each.said)) for each in told]
        elif what == "undo" and before is not None:
            for each, (extent, said) in zip(told, before, strict=True):
                each.cache.undo(extent)
                each.said = dict(said)
        elif what == "disk":
            before = None  # another cache
        elif what == "settle":
            before = None
            for each in told:
                each.cache.settle()
        for each in told:
            each.check()
        books = [[used_pages(each.cache, kind) for kind in range(3)] for each in told]
        assert all(of == books[0] for of in books)
    for each in told:
        for name in list(each.said):
            each.cache.evict(name)
        each.cache.settle()
        assert each.cache.free_pages.tolist() == [9] * num_ranks


def test_full_pages_are_shared_and_the_last_one_is_copied():
    told = Told(2, 1, num_pages=8, reach=[Reach()])
    told.extend("a", spread([[7, 8]])[0], 1)
    assert told.cache.free_pages.tolist() == [5, 5]  # of 3 tokens each
    told.share("a", "b", 15)
    assert told.cache.free_pages.tolist() == [4, 4]
    told.share("a", "c", 13)  # 7 and 6: two full pages on either rank, one token more on one
    assert told.cache.free_pages.tolist() == [3, 4]
    for name in "abc":
        told.extend(name, [1] * 4, 100 * ord(name))
        told.check()
    told.cache.evict("a")
    del told.said["a"]
    told.check()
    told.cache.evict("b")
    assert told.cache.free_pages.tolist() == [5, 4]
    with pytest.raises(ValueError, match="'c' is in the cache already"):
        told.cache.share("c", "c", num_tokens=1)
    with pytest.raises(ValueError, match="num_tokens must be 17 or less, got 18"):
        told.cache.share("c", "d", num_tokens=18)


def test_windows_keep_no_more_than_they_need_and_say_what_they_have_forgotten():
    told = Told(1, 0, num_pages=4, reach=[Reach(window=6)])  # room for 12 tokens
    told.cache.extent()
    for token in range(100):
        told.extend("a", [0], token)
        told.check()
        assert used_pages(told.cache, 0)[0] <= 3
    assert not told.cache.keeps("a", 50)
    with pytest.raises(ValueError, match="forgotten what a sequence of its first 50 tokens"):
        told.share("a", "b", 50)
    told.cache.evict("a")
    del told.said["a"]
    told.extend("s", [0] * 5, 0)
    assert told.cache.keeps("s", 5)
    told.share("s", "b", 5)
    told.check()
