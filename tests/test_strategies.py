"""Every known parallelism: right for every mask and world, and as costly as its formula says."""

import ast
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from dcp import AttentionSpec, AttnMask, Cluster, Plan, SequenceBatch, plan
from dcp.batch import LSE_BYTES
from dcp.placement import StrategyError, floor_seconds, get_strategy, strategies
from dcp.placement.heads import double_ring, usp
from dcp.planner import layer_seconds
from dcp.tables import Item, Move
from dcp.transfers import KV
from tests.cases import cases
from tests.oracle import batch_mask, errors_against_dense
from tests.symbolic import check_plan

STATIC = [strategy.name for strategy in strategies() if not strategy.searching]
RINGS = ("ring", "zigzag", "usp", "double_ring", "a2a_p2p")
SEQLENS = [33, 20, 0, 1, 26, 17, 9, 5]
MASKS = {
    "causal": AttnMask.causal,
    "streaming": lambda n: AttnMask.streaming(n, sink=2, window=9),
    "shared_question": AttnMask.shared_question,
    "causal_blockwise": lambda n: AttnMask.causal_blockwise(n, block=4, local_blocks=2),
    "documents": lambda n: AttnMask.documents([n // 3, 0, n - n // 3]),
}
SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=8)


def cluster_of(world: int) -> Cluster:
    """Two nodes, of different sizes where the world is odd."""
    sizes = (world // 2, world - world // 2) if world > 1 else (1,)
    return Cluster(num_nodes=len(sizes), devices_per_node=sizes)


def plan_with(strategy: str, seqlens, cluster: Cluster, *, masks="causal", spec=SPEC) -> Plan:
    return plan(SequenceBatch(seqlens, masks), spec, cluster, strategy=strategy)


def placed(placement, cluster: Cluster) -> Plan:
    return Plan.from_placement(placement, cluster, strategy="by hand")


def received(a_plan: Plan, buffer: int | None = None) -> np.ndarray:
    """Bytes of the forward pass that every rank receives."""
    sends = a_plan.masks["default"].sends
    volume = a_plan.moved_bytes("default")
    keep = np.full(len(sends), True) if buffer is None else sends[:, Move.BUFFER] == buffer
    return np.bincount(sends[keep, Move.PEER], weights=volume[keep], minlength=a_plan.num_ranks)


def areas(a_plan: Plan) -> np.ndarray:
    """Pairs, all heads, of every (rank, division)."""
    tables = a_plan.masks["default"]
    found = np.zeros((a_plan.num_ranks, tables.num_divisions))
    area = tables.tile_area[tables.items[:, Item.TILE]] / a_plan.num_head_groups
    np.add.at(found, (tables.items[:, Item.RANK], tables.items[:, Item.STEP]), area)
    return found


# --------------------------------------------------------------------------- right


@pytest.mark.parametrize("heads", [(8, 2), (8, 8)])
@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("strategy", STATIC)
def test_equals_dense_attention(strategy, world, heads):
    """One batch for each mask, forward and backward."""
    torch.set_num_threads(1)
    spec = AttentionSpec(num_heads=heads[0], num_kv_heads=heads[1], head_dim=8, dtype="float64")
    for mask in MASKS.values():
        masks = [mask(n) for n in SEQLENS]
        a_plan = plan_with(strategy, SEQLENS, cluster_of(world), masks=masks, spec=spec)
        assert max(errors_against_dense(a_plan, masks, torch.float64)) <= 1e-10


@settings(max_examples=40)
@given(case=cases(), order=st.sampled_from(["head-first", "context-first"]), seed=st.integers(0, 9),
       pick=st.tuples(st.integers(0, 99), st.integers(0, 99)))  # fmt: skip
def test_every_grid_computes_every_pair_once(case, order, seed, pick):
    batch, cluster = case
    spec = AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=8)
    ranks = cluster.num_ranks
    degrees = [d for d in range(1, min(ranks, 8) + 1) if ranks % d == 0]
    degree = degrees[pick[0] % len(degrees)]
    windows = [w for w in range(1, ranks // degree + 1) if ranks // degree % w == 0]
    placement = double_ring(
        batch, spec, cluster, head_degree=degree, window=windows[pick[1] % len(windows)],
        order=order, block_size=11,
    )  # fmt: skip
    check_plan(placed(placement, cluster), "default", batch_mask(batch).numpy(), seed=seed)


@pytest.mark.parametrize("seqlens", [[], [0, 0], [1], [1] * 5, [3, 2]])
@pytest.mark.parametrize("strategy", STATIC)
def test_degenerate_batches(strategy, seqlens):
    for cluster in (Cluster(devices_per_node=1), cluster_of(8), cluster_of(3)):
        a_plan = plan_with(strategy, seqlens, cluster)
        assert a_plan.rank_tokens.sum() == sum(seqlens)
        assert floor_seconds(strategy, SequenceBatch(seqlens), SPEC, cluster) >= 0


def test_several_masks_share_a_strategy():
    masks = {"global": "causal", "local": [AttnMask.sliding_window(n, 5) for n in SEQLENS]}
    batch = SequenceBatch(SEQLENS, masks, weights={"global": 1, "local": 3})
    for strategy in STATIC:
        a_plan = plan(batch, SPEC, cluster_of(4), strategy=strategy)
        for name in masks:
            check_plan(a_plan, name, batch_mask(batch, name).numpy())


# --------------------------------------------------------------------------- its formula


@pytest.mark.parametrize("nodes", [(1,), (4,), (2, 2), (3, 1, 2)])
@pytest.mark.parametrize("strategy", ["ring", "zigzag"])
def test_ring_receives_all_keys_but_its_own(strategy, nodes):
    """(N - 1) / N of all keys and values into every rank; one boundary into every node."""
    cluster = Cluster(num_nodes=len(nodes), devices_per_node=nodes)
    ranks, tokens = cluster.num_ranks, 2 * cluster.num_ranks * 12
    a_plan = plan_with(strategy, [tokens, 2 * tokens], cluster)
    volume = (ranks - 1) * 3 * tokens // ranks * SPEC.kv_token_bytes
    assert (received(a_plan) == volume).all()
    crossing = len(nodes) * volume if len(nodes) > 1 else 0
    assert a_plan.stats.inter_node_bytes == crossing
    assert a_plan.stats.num_divisions == ranks
    assert a_plan.stats.notes["padding_tokens"] == 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_zigzag_is_even_in_every_step(ranks):
    """With chunks of c tokens: 2c^2 pairs in every step, and c more in a rank's own."""
    chunk = 6
    a_plan = plan_with("zigzag", [2 * ranks * chunk], Cluster(devices_per_node=ranks))
    wanted = np.full((ranks, ranks), 2 * chunk**2)
    wanted[:, 0] += chunk
    assert (areas(a_plan) == wanted).all()


def test_contiguous_ring_is_uneven():
    """The last of N ranks has (2N - 1) / N of the mean, but for the diagonal."""
    ranks, chunk = 4, 100
    a_plan = plan_with("ring", [ranks * chunk], Cluster(devices_per_node=ranks))
    pairs = np.arange(ranks) * chunk**2 + chunk * (chunk + 1) // 2
    assert (areas(a_plan).sum(axis=1) == pairs).all()
    assert a_plan.stats.compute_balance == pytest.approx((2 * ranks - 1) / ranks, rel=0.01)


@pytest.mark.parametrize("nodes", [(1,), (4,), (2, 2), (3, 3)])
def test_allgather_brings_every_key_into_every_node_once(nodes):
    cluster = Cluster(num_nodes=len(nodes), devices_per_node=nodes)
    ranks, tokens = cluster.num_ranks, 2 * cluster.num_ranks * 6
    a_plan = plan_with("allgather", [tokens], cluster)
    everything = tokens * SPEC.kv_token_bytes
    assert (received(a_plan) == everything * (ranks - 1) // ranks).all()
    assert a_plan.stats.inter_node_bytes == (len(nodes) - 1) * everything
    found = areas(a_plan)
    assert (found[:, :-1] == 0).all(), "work before the gather is over"
    assert (found[:, -1] == found[0, -1]).all()


def head_parallel_bytes(spec, tokens, contexts, columns):
    """What each rank receives: (all-to-all, ring); the queries and outputs of a share of heads, the
    keys of as many KV heads as these need."""
    kv = spec.kv_token_bytes / min(columns, spec.num_kv_heads)
    out = spec.q_token_bytes + spec.num_heads * LSE_BYTES[spec.dtype]
    share = tokens / contexts * (columns - 1) / columns
    around = share * ((spec.q_token_bytes + out) / columns + kv)
    return around, tokens * (contexts - 1) / contexts * kv


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ulysses_is_two_all_to_alls(ranks, kv_heads):
    spec = AttentionSpec(num_heads=8, num_kv_heads=kv_heads, head_dim=8)
    a_plan = plan_with("ulysses", [ranks * 30, ranks * 10], cluster_of(ranks), spec=spec)
    around, _ = head_parallel_bytes(spec, ranks * 40, 1, ranks)
    assert (received(a_plan) == around).all()
    assert (areas(a_plan).sum(axis=1) == a_plan.rank_areas("default")[0]).all()
    assert a_plan.stats.notes == {"head_degree": ranks, "padding_tokens": 0}


def test_ulysses_deals_heads_that_do_not_divide():
    a_plan = plan_with("ulysses", [60, 31], Cluster(devices_per_node=3))
    share = a_plan.rank_areas("default") / a_plan.rank_areas("default").sum()
    assert share.tolist() == [3 / 8, 3 / 8, 2 / 8]
    assert a_plan.stats.notes["padding_tokens"] == 2
    with pytest.raises(StrategyError, match="ulysses: 8 heads cannot be dealt to 9 ranks"):
        plan_with("ulysses", [60], Cluster(devices_per_node=9))


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_usp_is_ulysses_inside_and_a_ring_across(degree, kv_heads):
    """And a2a_p2p is the same with as many columns as there are KV heads in a node."""
    spec = AttentionSpec(num_heads=8, num_kv_heads=kv_heads, head_dim=8)
    cluster = Cluster(num_nodes=2, devices_per_node=4)
    contexts, tokens = 8 // degree, 480
    batch = SequenceBatch([tokens])
    a_plan = placed(usp(batch, spec, cluster, head_degree=degree), cluster)
    around, along = head_parallel_bytes(spec, tokens, contexts, degree)
    assert (received(a_plan) == around + along).all()
    assert a_plan.stats.inter_node_bytes == 2 * degree * along
    assert a_plan.stats.compute_balance == 1.0
    if degree == min(kv_heads, 4):
        same = plan_with("a2a_p2p", [tokens], cluster, spec=spec)
        assert same.stats.notes["head_degree"] == degree
        assert (received(same) == received(a_plan)).all()


@pytest.mark.parametrize("degree", [1, 2])
def test_double_ring_crosses_nodes_with_less(degree):
    """Head-first with a window of one node: (nodes - 1) / nodes of the column's keys into a node,
    by all its ranks alike. Context-first: heads cross nodes instead, and the ring stays inside."""
    cluster = Cluster(num_nodes=4, devices_per_node=4)
    tokens, columns = 16 * 60, degree
    kv = tokens * SPEC.kv_token_bytes / min(degree, SPEC.num_kv_heads)
    batch, window = SequenceBatch([tokens]), 4 // degree

    def made(**options):
        return placed(double_ring(batch, SPEC, cluster, head_degree=degree, **options), cluster)

    inner = made(window=window, order="head-first")
    assert inner.stats.inter_node_bytes == 4 * columns * kv * 3 / 4
    plain = made(window=16 // degree, order="head-first")
    contexts = 16 // degree
    assert plain.stats.inter_node_bytes == 4 * columns * kv * (contexts - 1) / contexts
    assert (received(inner) == received(plain)).all(), "the window moves no byte more or less"
    if degree == 2:
        small = Cluster(num_nodes=2, devices_per_node=4)
        across = double_ring(batch, SPEC, small, head_degree=2, window=4, order="context-first")
        around, _ = head_parallel_bytes(SPEC, tokens, 4, 2)
        assert placed(across, small).stats.inter_node_bytes == 8 * around


def test_grids_name_what_does_not_fit():
    cluster, batch = Cluster(num_nodes=2, devices_per_node=4), SequenceBatch([80])
    for options, message in (
        ({"head_degree": 3}, "double_ring: head_degree=3 does not fit: choose one of 1, 2, 4, 8"),
        ({"head_degree": 2, "window": 3}, "double_ring: window=3 does not fit: choose one of 1, 2"),
        ({"order": "both"}, "double_ring: order='both' does not fit: choose one of head-first"),
    ):
        with pytest.raises(StrategyError, match=message):
            double_ring(batch, SPEC, cluster, **options)
    with pytest.raises(StrategyError, match="usp: head_degree=8 does not fit: choose one of 1, 2"):
        usp(batch, SPEC, cluster, head_degree=8)


@pytest.mark.parametrize("strategy", ["data_parallel", "bucketed"])
def test_data_parallel_moves_nothing(strategy):
    seqlens = [500, 40, 300, 300, 41, 42, 7, 150, 149, 43]
    a_plan = plan_with(strategy, seqlens, cluster_of(4))
    assert len(a_plan.masks["default"].sends) == 0
    load = a_plan.rank_areas("default")
    if strategy == "data_parallel":  # Graham: LPT leaves at most the mean and one sequence more
        assert load.max() <= load.mean() + 500 * 501 / 2
    else:  # buckets: 512: 500, 300, 300; 256: 150, 149; 64: 40 … 43; 8: 7
        of_rank = [set(a_plan.block_sequence[a_plan.owner == r].tolist()) for r in range(4)]
        assert all(len(of & {1, 4, 5, 9}) == 1 for of in of_rank)
        assert a_plan.stats.notes["padding_tokens"] == 400 + 1 + 6


def test_groups_take_the_least_power_of_two_that_fits():
    """1,000 tokens on 8 ranks: at most 125 of a sequence on a rank."""
    seqlens = [500, 250, 125, 100, 25]
    a_plan = plan_with("groups", seqlens, Cluster(devices_per_node=8))
    assert a_plan.stats.notes["degrees"] == {"1": 3, "2": 1, "4": 1}
    for sequence, degree in enumerate((4, 2, 1, 1, 1)):
        ranks = np.unique(a_plan.owner[a_plan.block_sequence == sequence])
        assert ranks.tolist() == list(range(ranks[0], ranks[0] + degree))
        assert ranks[0] % degree == 0
    rings = {4: 500, 2: 250}
    volume = sum((degree - 1) * tokens for degree, tokens in rings.items()) * SPEC.kv_token_bytes
    assert received(a_plan).sum() == volume


def test_flexible_groups_are_of_any_size_and_even():
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    cluster, seqlens = Cluster(devices_per_node=7), [64_000, 37_000, 20_000, 9_000, 5_000, 1_000]
    free = plan_with("flexible_groups", seqlens, cluster, spec=spec)
    power = plan_with("groups", seqlens, cluster, spec=spec)
    assert any(int(degree) not in (1, 2, 4) for degree in free.stats.notes["degrees"])
    assert free.stats.compute_balance < power.stats.compute_balance
    assert free.stats.token_balance <= 2.01


def test_data_centric_degrees_even_out_times():
    seqlens = [32_000, 16_000, 16_000] + [2_000] * 20
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    a_plan = plan_with("data_centric", seqlens, Cluster(devices_per_node=8), spec=spec)
    degrees = a_plan.stats.notes["degrees"]
    assert all(int(degree) & (int(degree) - 1) == 0 for degree in degrees)
    assert degrees["1"] >= 20
    assert a_plan.stats.compute_balance < 2


@pytest.mark.parametrize("mask", MASKS)
def test_magi_moves_only_the_key_blocks_needed(mask):
    seqlens = [90, 31, 39]
    masks = [MASKS[mask](n) for n in seqlens]
    a_plan = plan_with("magi", seqlens, cluster_of(4), masks=masks)
    assert (a_plan.rank_tokens == 40).all()
    assert a_plan.stats.notes == {"chunk_size": 10, "padding_tokens": 0}
    dense = batch_mask(SequenceBatch(seqlens, masks)).numpy()
    rows = 0
    for rank in range(4):
        seen = dense[a_plan.token_indices(rank)].any(axis=0)
        for block in np.flatnonzero(a_plan.owner != rank):
            start, length = a_plan.block_offset[block], a_plan.block_length[block]
            rows += length * seen[start : start + length].any()
    assert received(a_plan).sum() == received(a_plan, KV).sum() == rows * SPEC.kv_token_bytes


def test_padding_that_the_originals_would_need():
    cluster = Cluster(devices_per_node=4)
    for strategy, padding in {"ring": 2, "zigzag": 6, "allgather": 6, "ulysses": 2}.items():
        notes = plan_with(strategy, [10, 16, 0], cluster).stats.notes
        assert notes["padding_tokens"] == padding, strategy


# --------------------------------------------------------------------------- its floor


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), strategy=st.sampled_from(STATIC))
def test_no_plan_is_faster_than_its_floor(seed, strategy):
    rng = np.random.default_rng(seed)
    nodes = tuple(rng.integers(1, 5, rng.integers(1, 4)).tolist())
    rates = {
        "inter_node_bandwidth": 10 ** rng.uniform(8, 11),
        "device_flops": 10 ** rng.uniform(12, 15),
    }
    cluster = Cluster(num_nodes=len(nodes), devices_per_node=nodes, **rates)
    seqlens = rng.integers(0, 4000, rng.integers(1, 6)).tolist()
    mask = list(MASKS.values())[rng.integers(len(MASKS))]
    batch = SequenceBatch(seqlens, [mask(n) for n in seqlens])
    spec = AttentionSpec(num_heads=8, num_kv_heads=int(2 ** rng.integers(0, 4)), head_dim=64)
    try:
        placement = get_strategy(strategy)(batch, spec, cluster)
    except StrategyError:
        reject()
    made = placed(placement, cluster).simulate()
    seconds = made.forward_seconds + made.backward_seconds
    assert floor_seconds(strategy, batch, spec, cluster) <= seconds * 1.001 + 1e-6


def test_auto_is_never_slower_than_a_listed_strategy():
    cluster = Cluster(num_nodes=2, devices_per_node=4)
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    rng = np.random.default_rng(3)
    for _ in range(4):
        seqlens = np.minimum(rng.lognormal(7, 1.3, 12).astype(int), 30_000).tolist()
        mask = list(MASKS.values())[rng.integers(len(MASKS))]
        masks = [mask(n) for n in seqlens]
        best = layer_seconds(plan_with("auto", seqlens, cluster, masks=masks, spec=spec))
        for strategy in STATIC:
            other = plan_with(strategy, seqlens, cluster, masks=masks, spec=spec)
            assert best <= layer_seconds(other), strategy


def test_every_strategy_is_documented():
    assert set(STATIC) >= {*RINGS, "allgather", "ulysses", "data_parallel", "groups", "magi"}
    assert all(strategy.place.__doc__ for strategy in strategies())


def test_no_strategy_imports_another():
    """A family's file may use what all share, never another family's rules."""
    families = {strategy.family for strategy in strategies()}
    for family in families:
        tree = ast.parse(Path(import_module(f"dcp.placement.{family}").__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "dcp.cluster" in imported
        others = {f"dcp.placement.{other}" for other in families - {family}}
        assert not imported & others, family
