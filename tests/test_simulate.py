"""The simulator against times worked out by hand."""

import numpy as np
import pytest

from dcp import AttentionSpec, Cluster, SequenceBatch, plan
from dcp.cost import attention_seconds, item_seconds
from dcp.events import play
from dcp.simulate import simulate

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)


def play_flows(compute, flows, capacity):
    """``play`` on flows given as (source, target, step, volume, latency, out link, in link)."""
    table = np.array(flows, dtype=float).reshape(-1, 7)
    source, target, step = (table[:, i].astype(np.int64) for i in range(3))
    steps, ranks = np.shape(compute)
    ends = np.concatenate([step * ranks + source, step * ranks + target])
    order = np.argsort(ends, kind="stable")
    return play(
        np.array(compute, dtype=float), source, target, step, table[:, 3], table[:, 4],
        table[:, 5:].astype(np.int64), np.array(capacity, dtype=float),
        order % max(len(table), 1), np.searchsorted(ends[order], np.arange(steps * ranks + 1)),
    )  # fmt: skip


def test_compute_hides_a_transfer_or_waits_for_it():
    for compute, end in ((3.0, 3.0), (1.0, 2.5)):
        _, computed, arrived = play_flows(
            [[compute, compute]], [(0, 1, 0, 2.0, 0.5, 0, 1)], [1.0, 1.0]
        )
        assert np.maximum(computed, arrived).max() == pytest.approx(end, abs=1e-5)


def test_flows_share_a_link_fairly():
    """Two flows of 1 and 3 bytes leave by one link of 1 byte/s: over after 2 and 4 seconds."""
    flows = [(0, 1, 0, 1.0, 0, 0, 1), (0, 2, 0, 3.0, 0, 0, 2)]
    _, _, arrived = play_flows([[0, 0, 0]], flows, [1.0, 9.0, 9.0])
    assert arrived[0, 1] == pytest.approx(2.0, abs=1e-5)
    assert arrived[0, 2] == pytest.approx(4.0, abs=1e-5)


def test_a_flow_waits_for_both_its_ends():
    flows = [(0, 1, 1, 1.0, 0, 0, 1)]
    begin, _, arrived = play_flows([[5.0, 1.0], [0.0, 0.0]], flows, [1.0, 1.0])
    assert begin[1].tolist() == pytest.approx([5.0, 1.0], abs=1e-5)
    assert arrived[1, 1] == pytest.approx(6.0, abs=1e-5)


def test_a_lone_rank_takes_its_compute_and_nothing_else():
    cluster = Cluster(num_nodes=1, devices_per_node=1)
    made = plan(SequenceBatch([8192]), SPEC, cluster, block_size=8192, strategy="bisection")
    ideal = attention_seconds(8192 * 8193 / 2, SPEC, cluster)
    assert made.simulate().exposed_comm_seconds == pytest.approx(0, abs=1e-12)
    assert ideal <= made.simulate().forward_seconds <= 1.05 * ideal + cluster.launch_seconds


def test_zigzag_of_a_long_document_hides_its_ring():
    cluster = Cluster(num_nodes=1, devices_per_node=8)
    made = plan(SequenceBatch([2**18]), SPEC, cluster, strategy="zigzag")
    line = made.simulate()
    assert line.exposed_comm_seconds < 0.01 * line.forward_seconds
    slow = simulate(made, Cluster(num_nodes=8, devices_per_node=1, inter_node_bandwidth=1e9))
    transfers = 2**18 * 7 / 8 * SPEC.kv_token_bytes / 1e9
    last_division = line.forward_seconds / 8
    assert slow.forward_seconds == pytest.approx(transfers + last_division, rel=0.005)


def test_roofline_counts_whole_tiles_and_memory():
    cluster = Cluster()
    one = item_seconds(np.array([1]), np.array([1]), np.array([1]), SPEC, cluster)
    tile = item_seconds(np.array([128**2]), np.array([128]), np.array([128]), SPEC, cluster)
    assert one[0] <= tile[0]
    assert one[0] >= attention_seconds(128**2 / 2, SPEC, cluster)
    backward = item_seconds(
        np.array([2**20]), np.array([1024]), np.array([1024]), SPEC, cluster, backward=True
    )
    forward = item_seconds(np.array([2**20]), np.array([1024]), np.array([1024]), SPEC, cluster)
    assert backward[0] == pytest.approx(2.5 * forward[0])


def test_a_cluster_of_another_size_is_refused():
    made = plan(SequenceBatch([100]), SPEC, Cluster(num_nodes=1, devices_per_node=2))
    with pytest.raises(ValueError, match="the plan is for 2 ranks, not 8"):
        simulate(made, Cluster())
