"""The emulated cluster: its stretched time, its links, and what a run is said to be."""

import json
from argparse import Namespace

import numpy as np
import pytest

import dcp
from dcp.cost import linear_seconds
from lab.__main__ import main
from lab.emulate import execute, summarise
from lab.emulated_network import dilated
from lab.emulated_plans import (
    chosen_strategies,
    make_cases,
    predicted_seconds,
    wanted_dilation,
    worth_running,
)
from lab.testbed import why_not

CLUSTER = dcp.Cluster.preset("a100", num_nodes=2, devices_per_node=2)
needs_namespaces = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize("factor", [1, 7.5])
def test_in_stretched_time_everything_takes_as_many_times_as_long(factor):
    spec = dcp.AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")
    batch = dcp.SequenceBatch([5000, 900, 40], "causal")
    made = dcp.plan(batch, spec, CLUSTER, strategy="zigzag")
    slow = dilated(CLUSTER, factor)
    before, after = (dcp.simulate.simulate(made, cluster) for cluster in (CLUSTER, slow))
    for name in ("forward_seconds", "backward_seconds", "exposed_comm_seconds"):
        assert getattr(after, name) == pytest.approx(factor * getattr(before, name), rel=0.01)
    assert linear_seconds(100, spec, slow) == pytest.approx(
        factor * linear_seconds(100, spec, CLUSTER)
    )


def test_time_is_not_made_shorter():
    with pytest.raises(ValueError, match=r"--dilation must be 1 or more, got 0\.5"):
        dilated(CLUSTER, 0.5)


def test_strategies_by_name_and_in_groups():
    assert chosen_strategies(["auto", "static", "zigzag"])[:3] == ["auto", "ring", "zigzag"]
    assert len(set(chosen_strategies(["all"]))) == len(chosen_strategies(["all"]))
    with pytest.raises(ValueError, match="'spiral' is not auto"):
        chosen_strategies(["spiral"])


def row(strategy, simulated, executed, mask="causal"):
    passes = {
        f"{way}_{name}_seconds": seconds / 2
        for way, seconds in (("simulated", simulated), ("executed", executed))
        for name in ("forward", "backward")
    }
    return {"strategy": strategy, "batch": "b", "mask": mask} | passes


def test_a_summary_counts_pairs_in_order_and_compares_auto_with_the_best():
    rows = [row("auto", 1.0, 1.2), row("zigzag", 2.0, 3.0), row("groups", 1.5, 1.0)]
    found = summarise(rows)
    assert found["num_pairs"] == 3
    assert found["pairs_in_order"] == pytest.approx(2 / 3)  # groups was faster than auto
    assert found["best_other_over_auto"]["static, causal"]["least"] == pytest.approx(2.5)
    assert found["best_other_over_auto"]["any"]["least"] == pytest.approx(1 / 1.2)
    assert found["executed_over_simulated"]["most"] == pytest.approx(1.5)


def test_slow_rules_are_left_out_but_for_the_fastest_static_one():
    batch = {"name": "small", "seqlens": [9000, 400, 600]}
    cluster = dcp.Cluster.preset("a100", num_nodes=2, devices_per_node=2)
    cases = list(make_cases(batch, "causal", chosen_strategies(["all"]), cluster, layers=0))
    seconds = {labels["strategy"]: predicted_seconds(made) for labels, made in cases}
    kept = {labels["strategy"] for labels, _ in worth_running(cases, within=1.2)}
    static = min(set(chosen_strategies(["static"])[1:]) & set(seconds), key=seconds.__getitem__)
    fast = {name for name, each in seconds.items() if each <= 1.2 * min(seconds.values())}
    assert kept == fast | {static}
    assert len(kept) < len(cases)


def test_short_passes_and_many_messages_are_stretched_more():
    few, many = (
        next(make_cases({"name": "", "seqlens": lengths}, "causal", [rule], CLUSTER, layers=0))[1]
        for lengths, rule in (([400] * 8, "data_parallel"), ([200000, 60000], "zigzag"))
    )
    assert wanted_dilation(few, CLUSTER) > 8 * wanted_dilation(many, CLUSTER)
    doubled = wanted_dilation(few, CLUSTER) / wanted_dilation(many, CLUSTER)
    assert np.log2(doubled) == round(np.log2(doubled))  # plans of like lengths share a network


@needs_namespaces
def test_a_run_takes_at_least_what_its_kernels_and_links_take():
    cluster = dcp.Cluster.preset("a100", num_nodes=2, devices_per_node=2)
    batch = {"name": "small", "seqlens": [9000, 4000, 600]}
    cases = list(make_cases(batch, "causal", ["zigzag", "data_parallel"], cluster, layers=0))
    options = Namespace(dilation=1000, rounds=1, layers=1)
    try:
        [rows] = execute(cases, cluster, options, most_busy=1.0, link_error=1.0)
    except ValueError as error:
        pytest.fail(str(error))
    assert [each["strategy"] for each in rows] == ["zigzag", "data_parallel"]
    for each in rows:
        for name in ("forward", "backward"):
            ratio = each[f"executed_{name}_seconds"] / each[f"simulated_{name}_seconds"]
            assert ratio > 0.97, (each["strategy"], name)
        assert each["executed_layer_seconds"] > each["executed_forward_seconds"]


@needs_namespaces
def test_an_unknown_batch_is_refused_before_anything_runs(capsys):
    assert main(["emulate", "--batches", "nobody"]) == 2
    assert "'nobody' is not one of" in capsys.readouterr().err
    assert json.dumps(summarise([row("auto", 1, 1)]))
