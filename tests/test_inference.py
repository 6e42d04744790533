"""Turns over a sharded cache: equal to dense attention, as costly as their formulas, balanced."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dcp import AttentionSpec, AttnMask, Cluster, SequenceBatch, plan
from dcp.batch import LSE_BYTES
from dcp.inference import CachedAttention, KVCache, plan_turn
from dcp.inference.attention import new_owners, new_tokens
from dcp.plans import Plan
from dcp.stats import balance
from dcp.tables import Item, Move
from dcp.transfers import KV, OUT, Q
from dcp.wire import WireError, pack, unpack
from tests.oracle import dense_attention
from tests.symbolic import check_plan

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=8, dtype="float64")
PLACED = ("pass_kv", "pass_q", "pass_either", "planned")

# Three turns of prefill and decode; turns change mode; one has fewer tokens than 2N; "c" ends
# early; "d" comes late, a single token.
SCRIPT = [
    ("pass_kv", {"a": 33, "b": 5, "c": 1}),
    *[("pass_q", {"a": 1, "b": 1, "c": 1})] * 3,
    *[("pass_q", {"a": 1, "b": 1})] * 2,
    ("pass_q", {"a": 3, "b": 40}),
    *[("pass_q", {"b": 1, "a": 1})] * 3,
    ("planned", {"a": 9, "d": 1, "b": 2}),
    ("pass_either", {"d": 17, "a": 2}),
    *[("pass_kv", {"a": 1, "b": 1, "d": 1})] * 2,
]


def cluster_of(num_ranks: int) -> Cluster:
    return Cluster(devices_per_node=num_ranks)


def tensors_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys-and-values of every position of a sequence."""
    generator = torch.Generator().manual_seed(ord(name))
    q = torch.randn(100, 8, 8, generator=generator, dtype=torch.float64)
    return q, torch.randn(100, 2, 2, 8, generator=generator, dtype=torch.float64)


def run_script(attention: CachedAttention) -> float:
    """The largest error of any step against dense attention over the whole sequence so far."""
    cache, worst = attention.caches[0], 0.0
    for step, (strategy, turn) in enumerate(SCRIPT):
        names, new = list(turn), list(turn.values())
        held = cache.held(names)
        shifts = [step + index for index in range(len(names))]
        cluster = cluster_of(cache.num_ranks)
        a_plan = plan_turn(new, held, SPEC, cluster, strategy=strategy, shifts=shifts)
        q, kv, wanted = [], [], []
        for name, count, cached in zip(names, new, held.sum(axis=1).tolist(), strict=True):
            every_q, every_kv = tensors_of(name)
            end = cached + count
            q.append(every_q[cached:end])
            kv.append(every_kv[cached:end])
            mask = torch.ones(count, end).tril(cached).bool()
            wanted.append(dense_attention(q[-1], *every_kv[:end].unbind(1), mask)[0])
        q, kv, wanted = (torch.cat(parts) for parts in (q, kv, wanted))
        if not attention.is_local:
            q, kv, wanted = (a_plan.shard(cache.rank, x) for x in (q, kv, wanted))
        attention.begin(a_plan, names)
        for layer in range(2):
            found = attention.attention(layer, q, kv)
            worst = max(worst, float((found - wanted).abs().max()) if len(found) else 0.0)
    return worst


def spread(counts) -> list[np.ndarray]:
    """So many tokens of each sequence on each rank, one rank after the other."""
    counts = np.array(counts)
    return [np.repeat(np.arange(counts.shape[1]), of) for of in counts]


def make_caches(num_ranks: int, ranks=None, *, num_pages=40, page_size=4) -> list[KVCache]:
    return [
        KVCache(
            SPEC,
            num_layers=2,
            num_pages=num_pages,
            page_size=page_size,
            rank=rank,
            num_ranks=num_ranks,
        )
        for rank in (range(num_ranks) if ranks is None else ranks)
    ]


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_three_turns_of_prefill_and_decode_equal_dense(num_ranks):
    assert run_script(CachedAttention(make_caches(num_ranks))) < 1e-10


def script_on_ranks() -> float:
    caches = make_caches(dist.get_world_size(), [dist.get_rank()])
    return run_script(CachedAttention(caches))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_three_turns_on_real_ranks_equal_dense(gloo_pool, world):
    assert max(gloo_pool(world).run(script_on_ranks)) < 1e-10


# --------------------------------------------------------------------------- plans of turns


@st.composite
def turns(draw):
    num_ranks = draw(st.integers(1, 5))
    new = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    held = [
        [draw(st.integers(0, 9)) * draw(st.integers(0, 1)) for _ in range(num_ranks)] for _ in new
    ]
    shifts = draw(st.lists(st.integers(0, 9), min_size=len(new), max_size=len(new)))
    return num_ranks, new, held, shifts


@given(turn=turns(), strategy=st.sampled_from(PLACED), seed=st.integers(0, 9))
def test_every_pair_once_and_programs_sound(turn, strategy, seed):
    num_ranks, new, held, shifts = turn
    cluster = cluster_of(num_ranks)
    a_plan = plan_turn(new, held, SPEC, cluster, strategy=strategy, shifts=shifts)
    wanted = np.zeros((a_plan.num_tokens, a_plan.num_keys), dtype=bool)
    query = key = 0
    for count, cached in zip(new, np.sum(held, axis=1), strict=True):
        part = np.tril(np.ones((count, cached + count), dtype=bool), cached)
        wanted[query : query + count, key : key + cached + count] = part
        query, key = query + count, key + cached + count
    check_plan(Plan.from_bytes(a_plan.to_bytes()), "default", wanted, seed=seed)
    # what is cached stays where it is, and chunks differ by one token at most
    lengths = a_plan.block_length[a_plan.is_cached]
    where = np.zeros_like(held)
    where[a_plan.block_sequence[a_plan.is_cached], a_plan.owner[a_plan.is_cached]] = lengths
    assert where.tolist() == held
    for sequence, count in enumerate(new):
        chunks = a_plan.block_length[~a_plan.is_cached & (a_plan.block_sequence == sequence)]
        if count >= 2 * num_ranks:
            assert chunks.max() - chunks.min() <= 1
            assert len(chunks) == 2 * num_ranks
        assert np.ptp(new_tokens(a_plan)[sequence]) <= 2


def moved(a_plan: Plan, buffer: int) -> int:
    sends = a_plan.masks["default"].sends
    return int(a_plan.moved_bytes("default")[sends[:, Move.BUFFER] == buffer].sum())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_bytes_are_those_of_the_formulas(num_ranks):
    new, held = [70, 1, 29], np.arange(1, 3 * num_ranks + 1).reshape(3, num_ranks)
    total, tokens = sum(new) + held.sum(), sum(new)
    hops = num_ranks - 1
    cluster = cluster_of(num_ranks)
    keys = plan_turn(new, held, SPEC, cluster, strategy="pass_kv")
    # table 3: 2 (T + P) D e N_KV / N_H bytes pass every link once
    assert moved(keys, KV) == hops * total * 2 * 2 * 8 * 8
    assert moved(keys, Q) == moved(keys, OUT) == 0
    queries = plan_turn(new, held, SPEC, cluster, strategy="pass_q")
    assert moved(queries, KV) == 0
    assert moved(queries, Q) == hops * tokens * 8 * 8 * 8  # T D e
    assert moved(queries, OUT) == hops * tokens * (8 * 8 * 8 + 8 * LSE_BYTES["float64"])


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
def test_a_ring_has_one_transfer_in_flight_and_outputs_come_home_together(strategy):
    a_plan = plan_turn([40, 9], np.full((2, 4), 6), SPEC, cluster_of(4), strategy=strategy)
    sends = a_plan.masks["default"].sends
    ring, home = sends[sends[:, Move.BUFFER] < OUT], sends[sends[:, Move.BUFFER] == OUT]
    assert set(map(tuple, ring[:, [Move.RANK, Move.STEP]])) == {
        (rank, step) for rank in range(4) for step in (1, 2, 3)
    }
    assert (ring[:, Move.PEER] == (ring[:, Move.RANK] + 1) % 4).all()
    assert len(set(home[:, Move.STEP])) == (1 if strategy == "pass_q" else 0)
    tables = a_plan.masks["default"]
    area = np.zeros((4, 4))
    rank, step, tile = tables.items[:, [Item.RANK, Item.STEP, Item.TILE]].T
    np.add.at(area, (rank, step), tables.tile_area[tile])
    assert balance(area.sum(axis=1)) < 1.2


def test_planned_is_never_predicted_slower_than_either_ring():
    rng = np.random.default_rng(0)
    wins = 0
    for _ in range(40):
        num_ranks = int(rng.integers(2, 7))
        new = (10 ** rng.uniform(0, 4, 3)).astype(int)
        held = (10 ** rng.uniform(0, 4, (3, num_ranks))).astype(int)
        cluster = Cluster.preset("h100", num_nodes=num_ranks, devices_per_node=1)
        spec = AttentionSpec(num_heads=16, num_kv_heads=1, head_dim=128)
        seconds = {
            name: plan_turn(new, held, spec, cluster, strategy=name).simulate().forward_seconds
            for name in ("pass_kv", "pass_q", "planned")
        }
        assert seconds["planned"] <= min(seconds.values())
        wins += seconds["planned"] < 0.99 * min(seconds["pass_kv"], seconds["pass_q"])
    assert wins > 10  # and it is no mere choice between the two


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"cached has shape \(1, 2\)"):
        plan_turn([3], [[1, 2]], SPEC, cluster_of(3))
    with pytest.raises(ValueError, match="'pass' is not one of pass_kv, pass_q"):
        plan_turn([3], [[1, 2]], SPEC, cluster_of(2), strategy="pass")
    with pytest.raises(ValueError, match="0 or more, got"):
        plan_turn([-1], [[1, 2]], SPEC, cluster_of(2))
    with pytest.raises(ValueError, match=r"is 5 x 5, the sequence has 5 tokens, 2 of them cached"):
        SequenceBatch([5], [AttnMask.full(5)], cached=[[1, 1]])
    with pytest.raises(ValueError, match="at most the seqlens"):
        SequenceBatch([5], cached=[[3, 3]])
    with pytest.raises(ValueError, match=r"dcp\.inference\.plan_turn"):
        plan(SequenceBatch([5], cached=[[1, 1]]), SPEC, cluster_of(2))
    with pytest.raises(ValueError, match="'streaming'"):
        SequenceBatch([5], "streaming", cached=[[1, 1]])
    attention = CachedAttention(make_caches(2))
    with pytest.raises(ValueError, match="call begin"):
        attention.attention(0, torch.zeros(1, 8, 8), torch.zeros(1, 2, 2, 8))
    with pytest.raises(ValueError, match=r"for \[4\] cached tokens, the cache holds \[0\]"):
        attention.begin(plan_turn([3], [[2, 2]], SPEC, cluster_of(2)), ["a"])
    with pytest.raises(ValueError, match=r"of ranks \[1\], this process needs \[0\]"):
        CachedAttention(make_caches(2, [1]))


# --------------------------------------------------------------------------- the cache


def decode(caches: list[KVCache], names: list[str], steps: int, *, start: int = 0) -> None:
    """Steps of one token per sequence, as far as the caches go."""
    for step in range(start, start + steps):
        held = caches[0].held(names)
        shifts = [step + index for index in range(len(names))]
        cluster = cluster_of(caches[0].num_ranks)
        a_plan = plan_turn([1] * len(names), held, SPEC, cluster, strategy="pass_q", shifts=shifts)
        for cache in caches:
            cache.extend(names, new_owners(a_plan))


def test_the_cache_is_balanced_after_a_thousand_steps():
    caches = make_caches(4, num_pages=1500)
    decode(caches, ["a", "b", "c", "d", "e", "f"], 300)
    decode(caches, ["b", "c", "e"], 700, start=300)  # three sequences ended
    held = caches[0].held(["a", "b", "c", "d", "e", "f"])
    assert held.sum(axis=1).tolist() == [300, 1000, 1000, 300, 1000, 300]
    assert max(balance(row) for row in [*held, held.sum(axis=0)]) <= 1.05
    for cache in caches:
        rows = cache.rows(cache.sequences)
        assert len(set(rows.tolist())) == len(rows) == held[:, cache.rank].sum()


def test_a_full_cache_says_so_on_every_rank_and_changes_nothing():
    caches = make_caches(2, num_pages=3)
    for cache in caches:
        cache.extend(["a"], spread([[5, 8]]))
        assert cache.free_pages.tolist() == [1, 1]
        before = cache.rows(["a"]).tolist()
        with pytest.raises(ValueError, match=r"rank 1 needs 2 more pages of 4 tokens and has 1 of"):
            cache.extend(["a", "b"], spread([[1, 1], [0, 1]]))
        assert cache.rows(["a"]).tolist() == before
        assert cache.sequences == ["a"]
        cache.extend(["a"], spread([[3, 4]]))
        cache.evict("a")
        assert cache.free_pages.tolist() == [3, 3]
        with pytest.raises(ValueError, match="'a' is not in the cache"):
            cache.evict("a")
        cache.extend(["b"], spread([[12, 12]]))
        assert sorted(cache.rows(["b"]).tolist()) == list(range(12))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_cache_survives_disk(tmp_path, dtype):
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=3, dtype=dtype)
    cache = KVCache(spec, num_layers=2, num_pages=6, page_size=4, rank=1, num_ranks=2)
    cache.extend(["gone"], spread([[2, 2]]))
    [rows] = cache.extend(["a", 7], spread([[3, 9], [0, 4]]))
    for pool in cache.pools:
        pool[rows] = torch.randn(13, 2, 2, 3).to(pool.dtype)
    cache.evict("gone")
    cache.save(tmp_path / "cache")
    again = KVCache.load(tmp_path / "cache")
    assert again.sequences == ["a", 7]
    assert (again.held(["a", 7]) == cache.held(["a", 7])).all()
    assert (again.free_pages == cache.free_pages).all()
    for name in ("a", 7):
        mine, theirs = again.rows([name]), cache.rows([name])
        for one, other in zip(again.pools, cache.pools, strict=True):
            assert torch.equal(one[mine], other[theirs])
    message = (tmp_path / "cache").read_bytes()
    meta, arrays = unpack("kv-cache", message)
    (tmp_path / "other").write_bytes(
        pack("kv-cache", meta, arrays | {"layer 1": arrays["layer 1"][1:]})
    )
    with pytest.raises(WireError, match="do not fit each other"):
        KVCache.load(tmp_path / "other")
    (tmp_path / "cache").write_bytes(message[:-3])
    with pytest.raises(ValueError, match="damaged dcp kv-cache"):
        KVCache.load(tmp_path / "cache")
