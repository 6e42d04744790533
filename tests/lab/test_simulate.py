"""The comparison of simulated with measured seconds, and the testbed it runs in."""

import subprocess
from dataclasses import replace

import numpy as np
import pytest

from dcp import AttentionSpec, Cluster, SequenceBatch, plan
from dcp.cost import item_seconds
from dcp.simulate import simulate
from lab import simulate as bench
from lab.fleet import measured_cluster
from lab.testbed import open_testbed, why_not

SPEC = AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=64, dtype="float32")


@pytest.fixture(scope="module")
def made():
    cluster = Cluster.preset("laptop", num_nodes=2, devices_per_node=1)
    return plan(SequenceBatch([700, 90]), SPEC, cluster, strategy="zigzag")


def test_a_pass_ends_with_its_last_rank_and_the_first_run_warms_up(made):
    runs = [[(9, 9), (1, 4), (3, 4), (2, 4)], [(9, 9), (2, 5), (1, 5), (1, 5)]]
    row = bench.compare(made, made.cluster, runs, [(1, 2), (3, 4)])
    assert row["forward"]["measured_seconds"] == 2  # the median of 2, 3 and 2
    assert row["backward"]["measured_seconds"] == 5
    assert row["forward"]["local"]["measured_seconds"] == 2
    simulated = row["forward"]["simulated_seconds"]
    assert simulated == simulate(made, made.cluster).forward_seconds
    assert row["forward"]["error"] == pytest.approx(simulated / 2 - 1)


def test_summary_and_text(made):
    rows = []
    for link, seconds in (("slow", 2.0), ("fast", 1.0)):
        runs, local = [[(seconds, seconds)] * 2] * 2, [(seconds, seconds)] * 2
        labels = {"batch": "b", "mask": "causal", "strategy": "zigzag", "link": link}
        rows.append(labels | bench.compare(made, made.cluster, runs, local))
    summary = bench.summarise(rows)
    assert [line["what"] for line in summary] == [
        "all passes on ranks", "forward, slow", "backward, slow", "forward, fast",
        "backward, fast", "forward, one process, kernels only",
        "backward, one process, kernels only",
    ]  # fmt: skip
    assert all(line["median_error"] <= line["worst_error"] for line in summary)
    assert "NOT MET" in bench.as_text(rows, summary)


def test_one_plan_under_two_names_counts_once(made):
    row = bench.compare(made, made.cluster, [[(1.0, 1.0)] * 2] * 2, [(1.0, 1.0)] * 2)
    names = ("zigzag", "a2a_p2p")
    rows = [{"batch": "b", "mask": "m", "link": "l", "strategy": name} | row for name in names]
    assert [each["strategy"] for each in bench.distinct(rows)] == ["zigzag"]
    assert len(bench.distinct([rows[0], rows[1] | {"link": "other"}])) == 2


def test_rates_of_all_ranks_are_averaged():
    def rates(scale):
        return {
            "kernel_rates": [(64, 1e9 * scale), (128, 3e9 * scale)],
            "kernel_tile": 512,
            "device_flops": 3e9 * scale,
            "inter_node_bandwidth": 1e6 * scale,
        }

    found = [{"rates": [rates(1), rates(3)]}, {"rates": [rates(2), rates(2)]}]
    cluster = measured_cluster(found, Cluster(), name="here")
    assert cluster.kernel_rates == ((64, 2e9), (128, 6e9))
    assert (cluster.device_flops, cluster.inter_node_bandwidth) == (6e9, 2e6)
    assert (cluster.kernel_tile, cluster.name) == (512, "here")


def test_measured_rates_are_not_rounded_to_tiles_and_cuts_cost_theirs():
    """64 of a 128 tile cost a quarter with measured rates; a cut loses half a tile a row."""
    one = np.array([1])
    measured = Cluster(kernel_rates=((64, 1e9), (128, 1e9)), device_flops=1e9)
    rounded = Cluster(device_flops=1e9)
    full = [item_seconds(64 * 64 * one, 64 * one, 64 * one, SPEC, c) for c in (measured, rounded)]
    assert full[1] == pytest.approx(4 * full[0])
    area, rows = 1024 * 1025 // 2, 1024
    cut = item_seconds(area * one, rows * one, rows * one, SPEC, measured)
    assert cut == pytest.approx((area + rows * 64) * 4 * 8 * 64 / 1e9)


def test_packing_and_the_backward_ratio_take_time(made):
    usual = simulate(made, made.cluster)
    packed = simulate(made, replace(made.cluster, pack_bandwidth=1e7))
    assert packed.forward_seconds > usual.forward_seconds
    slow = simulate(made, replace(made.cluster, backward_ratio=50.0))
    assert slow.forward_seconds == usual.forward_seconds
    assert slow.backward_seconds > usual.backward_seconds


def test_a_testbed_refuses_what_it_cannot_make():
    with pytest.raises(ValueError, match="num_nodes"), open_testbed(0, bandwidth=1e6):
        pass
    with pytest.raises(ValueError, match="bandwidth"), open_testbed(2, bandwidth=0):
        pass


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_nodes_reach_each_other_and_nothing_stays_behind():
    with open_testbed(2, bandwidth=1e6) as bed:
        found = bed.run("tests.works:meet", {}, ranks_per_node=2, timeout_seconds=120)
    nodes = [int(each["node"]) for each in found]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]  # the namespaces' numbers
    assert [each["heard"] for each in found] == [[0, 1, 2, 3]] * 4
    assert [each["cards"] for each in found] == [["eth0", "lo"]] * 4
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not set(bed.namespaces) & set(listed.split())
