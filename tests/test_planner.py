"""Choosing a plan: never worse than what it could have chosen, the same for the same batch."""

import time
from dataclasses import replace

import numpy as np
import pytest

from dcp import AttentionSpec, AttnMask, Cluster, SequenceBatch, plan, planner
from dcp.layer import layer_seconds
from dcp.placement import StrategyError, strategies
from dcp.planner import Planner
from tests.batches import REFERENCE, SPEC, make_batch
from tests.oracle import batch_mask
from tests.symbolic import check_plan

CLUSTER = Cluster(num_nodes=2, devices_per_node=2)


def random_batch(rng: np.random.Generator) -> SequenceBatch:
    seqlens = np.minimum(rng.lognormal(6, 1.3, rng.integers(1, 9)).astype(int), 9000).tolist()
    mask = rng.choice(["causal", "streaming", "shared_question", "causal_blockwise", "full"])
    return make_batch(seqlens, mask)


def test_auto_is_never_worse_than_any_strategy():
    rng = np.random.default_rng(0)
    for _ in range(25):  # `python -m lab rules` draws more, from wider
        batch = random_batch(rng)
        best = plan(batch, SPEC, CLUSTER).stats.layer_seconds
        for strategy in strategies():
            name = strategy.name
            if strategy.searching:  # auto's own candidates, the hypergraph's within its budget
                continue
            try:
                other = plan(batch, SPEC, CLUSTER, strategy=name).stats.layer_seconds
            except StrategyError:
                continue
            assert best <= other * (1 + 1e-9), (name, batch)


def test_a_plan_depends_on_the_set_of_sequences_alone():
    lengths = [900, 20, 333, 20, 0, 4000]
    masks = [AttnMask.causal(900), AttnMask.full(20), AttnMask.streaming(333, 2, 50)]
    masks += [AttnMask.causal(20), AttnMask.causal(0), AttnMask.causal(4000)]
    planner = Planner(SPEC, CLUSTER)
    first = planner.plan(SequenceBatch(lengths, masks))
    shuffled = np.random.default_rng(1).permutation(6)
    batch = SequenceBatch([lengths[i] for i in shuffled], [masks[i] for i in shuffled])
    again = planner.plan(batch)
    assert again.masks is first.masks  # the remembered plan, told in the new order
    assert again.stats.planning_seconds < first.stats.planning_seconds
    check_plan(again, "default", batch_mask(batch).numpy())
    planner.plan(SequenceBatch(lengths, "causal"))
    assert planner.plan(batch).masks is first.masks


def test_the_cache_forgets_the_oldest():
    planner = Planner(SPEC, CLUSTER, cache_size=2)
    plans = [planner.plan(SequenceBatch([n])) for n in (10, 20, 30)]
    assert planner.plan(SequenceBatch([30])).masks is plans[2].masks
    assert planner.plan(SequenceBatch([10])).masks is not plans[0].masks


def test_a_remembered_plan_is_not_the_callers_to_change():
    of_cluster = Planner(SPEC, CLUSTER)
    batch = SequenceBatch([900, 300])
    first = of_cluster.plan(batch)
    notes = dict(first.stats.notes)
    first.stats.notes["candidates"].clear()
    first.stats.notes["mine"] = 1
    first.stats.simulated.clear()
    again = of_cluster.plan(batch)
    assert again.stats.notes.keys() == notes.keys()
    assert again.stats.notes["candidates"]
    assert again.stats.simulated


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_planning_says_that_it_compiles(monkeypatch, capsys, tmp_path, compiled):
    class Compiled:
        class stats:
            cache_path = str(tmp_path)

    if compiled:
        (tmp_path / "events.play-47.py312.nbi").touch()
    monkeypatch.setattr(planner, "play", Compiled)
    monkeypatch.setattr(planner, "COMPILING", (0.05, "compiling"))
    monkeypatch.setattr(planner, "_plan_a_little", lambda: time.sleep(0.5))
    planner._load_compiled.__wrapped__()
    assert capsys.readouterr().err == ("" if compiled else "compiling\n")


def test_load_and_volume_on_reference_batches():
    """The promises of docs/planner.md on four of its cases."""
    cluster = Cluster(num_nodes=4, devices_per_node=8)
    for name, mask in [
        ("ldc-131k-0", "causal"),
        ("longalign-131k-1", "streaming"),
        ("ldc-131k-1", "shared_question"),
        ("short-131k", "causal"),
    ]:
        stats = plan(make_batch(REFERENCE[name], mask), SPEC, cluster).stats
        assert stats.layer_excess["imbalance"] <= 0.05 * stats.limit_seconds
        assert stats.token_balance <= 1.25
        ring_bytes = 131072 * SPEC.kv_token_bytes * 31
        assert stats.inter_node_bytes + stats.intra_node_bytes <= 0.35 * ring_bytes
    assert stats.inter_node_bytes + stats.intra_node_bytes == 0  # whole short sequences stay whole


def test_balance_is_over_the_sum_of_several_masks():
    lengths = [3000, 1500, 400, 100]
    masks = {"global": "causal", "local": [AttnMask.sliding_window(n, 128) for n in lengths]}
    batch = SequenceBatch(lengths, masks, weights={"global": 1, "local": 5})
    made = plan(batch, SPEC, CLUSTER, strategy="bisection")
    work = made.rank_areas("global") + 5 * made.rank_areas("local")
    assert made.stats.compute_balance == pytest.approx(work.max() / work.mean())
    assert made.stats.layer_excess["imbalance"] <= 0.10 * made.stats.limit_seconds
    for name in masks:
        check_plan(plan(batch, SPEC, CLUSTER, block_size=750), name,
                   batch_mask(batch, name).numpy())  # fmt: skip


def test_uneven_nodes_and_more_devices_than_tokens():
    uneven = Cluster(num_nodes=3, devices_per_node=(1, 3, 2))
    made = plan(SequenceBatch([5000, 700, 60]), SPEC, uneven)
    assert made.num_ranks == 6
    assert made.stats.layer_excess["imbalance"] <= 0.2 * made.stats.limit_seconds
    crowded = plan(SequenceBatch([3, 1]), SPEC, Cluster(num_nodes=4, devices_per_node=8))
    assert crowded.rank_tokens.sum() == 4


def test_a_spec_of_one_kv_head_and_head_groups():
    made = plan(
        SequenceBatch([300]), AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8), CLUSTER
    )
    assert made.stats.num_tokens == 300


def test_more_time_is_spent_on_more_searches_and_equal_time_on_equal_ones():
    batch = make_batch(REFERENCE["ldc-131k-1"], "streaming")
    cluster = Cluster(num_nodes=2, devices_per_node=4)
    short, again, long = (plan(batch, SPEC, cluster, time_budget=t) for t in (0.0, 0.0, 1.0))
    assert short == again
    assert long.stats.layer_seconds <= short.stats.layer_seconds
    assert "bisection 1" in long.stats.notes["candidates"]
    assert short.stats.notes["candidates"]["hypergraph"] == "beyond the time budget"
    assert "bisection 1" not in short.stats.notes["candidates"]


def test_ranks_keep_to_their_share_of_tokens():
    batch = make_batch(REFERENCE["ldc-131k-0"], "causal")
    cluster = Cluster(num_nodes=2, devices_per_node=4)
    planner = Planner(SPEC, cluster, strategy="bisection", token_limit=1.02)
    assert planner.plan(batch).stats.token_balance <= 1.05
    with pytest.raises(ValueError, match="token_limit must be 1 or more"):
        Planner(SPEC, cluster, token_limit=0.9)


@pytest.mark.parametrize("spare", [1.0, 1.1])
def test_no_rank_gets_more_tokens_than_it_has_memory_for(spare):
    cluster = Cluster(num_nodes=2, devices_per_node=4)
    batch = make_batch(REFERENCE["longalign-131k-1"], "causal")
    most = int(batch.num_tokens / 8 * spare) + 1
    made = plan(batch, SPEC, cluster, max_rank_tokens=most)
    assert made.rank_tokens.max() <= most
    refused = made.stats.notes["candidates"]["data_parallel"]
    assert f"more than max_rank_tokens = {most:,}" in refused
    with pytest.raises(StrategyError, match=rf"of 131,072 tokens, more than .* = {most:,}"):
        plan(batch, SPEC, cluster, strategy="data_parallel", max_rank_tokens=most)
    with pytest.raises(StrategyError, match="= 16,383 cannot hold 131,072 tokens"):
        plan(batch, SPEC, cluster, max_rank_tokens=16_383)


@pytest.mark.parametrize("mask", ["causal", "streaming"])
@pytest.mark.parametrize("strategy", ["auto", "hypergraph"])
def test_a_slow_rank_is_given_less(mask, strategy):
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16")
    even = Cluster.preset("h100", num_nodes=2, devices_per_node=4)
    slow = replace(even, rank_speeds=(1, 1, 1, 1, 1, 1 / 1.5, 1, 1))
    batch = SequenceBatch([30000, 14000, 9000, 6000, 3000, 2000, 1000, 500], mask)
    plans = {
        name: plan(batch, spec, cluster, strategy=strategy)
        for name, cluster in (("even", even), ("slow", slow))
    }
    seconds = {name: made.stats.layer_seconds for name, made in plans.items()}
    unaware = layer_seconds(replace(plans["even"], cluster=slow), slow)
    # 8 ranks of which one is 1.5 times slower are 7.67: 1.043 is what nothing can beat
    assert seconds["slow"] < 1.12 * seconds["even"]
    assert unaware > 1.25 * seconds["even"]
    tokens, areas = (plans["slow"].rank_tokens, plans["slow"].rank_areas("default"))
    assert tokens[5] < 0.85 * tokens.mean()
    assert areas[5] < 0.95 * areas.mean()


def test_ranks_of_one_speed_get_the_plan_of_ranks_without():
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16")
    cluster = Cluster.preset("h100", num_nodes=2, devices_per_node=2)
    batch = SequenceBatch([9000, 4000, 900, 100], "causal")
    plain, same = (
        plan(batch, spec, each)
        for each in (cluster, replace(cluster, rank_speeds=(1.0, 1.0, 1.0, 1.0)))
    )
    assert plain.fingerprint == same.fingerprint


def test_the_second_best_is_tried_only_where_it_is_near():
    batch = SequenceBatch([9000, 4000, 900, 100], "causal")
    best = plan(batch, SPEC, CLUSTER)
    seconds = sorted(t for t in best.stats.notes["candidates"].values() if not isinstance(t, str))
    behind = seconds[1] / seconds[0] - 1
    far, near = (plan(batch, SPEC, CLUSTER, second_within=x) for x in (behind / 2, behind * 1.01))
    assert far.fingerprint == best.fingerprint
    assert near.stats.layer_seconds == pytest.approx(seconds[1])
    assert near.stats.notes["tried_as_second"]
    with pytest.raises(ValueError, match="second_within"):
        plan(batch, SPEC, CLUSTER, second_within=-1)
