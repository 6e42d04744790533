"""``dcp profile``: the file it writes is a cluster of what was measured here."""

from dcp import Cluster, profile
from dcp.cli import main
from dcp.launch.ranks import run_ranks


def test_a_measured_cluster_can_be_loaded(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(profile, "BLOCK_SIZES", (16, 64))
    path = tmp_path / "here.json"
    words = ["--heads=2", "--kv-heads=1", "--head-dim=16", "--nodes=3", "--devices-per-node=2"]
    assert main(["profile", "--out", str(path), "--name", "here", *words]) == 0
    assert f"written to {path}" in capfd.readouterr().out
    found, preset = Cluster.load(path), Cluster.preset("laptop")
    assert (found.name, found.num_nodes, found.devices_per_node) == ("here", 3, 2)
    assert [side for side, _ in found.kernel_rates] == [16, 64]
    assert found.device_flops == max(rate for _, rate in found.kernel_rates) > 0
    assert 1 <= found.kernel_tile <= 2048
    assert found.backward_ratio > 0
    assert 0 < found.launch_seconds < 1
    assert min(found.memory_bandwidth, found.pack_bandwidth) > 1e7
    assert 0 < found.intra_node_latency < 1
    assert found.intra_node_bandwidth != preset.intra_node_bandwidth
    assert 1e6 < found.intra_node_bandwidth < 1e12
    # one node cannot tell how far others are
    assert found.inter_node_bandwidth == preset.inter_node_bandwidth
    assert found.inter_node_latency == preset.inter_node_latency


def test_a_failing_rank_is_one_line_and_no_file(tmp_path, monkeypatch, capfd):
    def failing(*_, **options):
        return run_ranks("tests.works:wait_beside_a_failure", {}, **options)

    monkeypatch.setattr(profile, "BLOCK_SIZES", (16,))
    monkeypatch.setattr(profile, "run_ranks", failing)
    words = ["--heads=2", "--kv-heads=1", "--head-dim=16", "--out", str(tmp_path / "x.json")]
    assert main(["profile", *words]) == 1
    assert capfd.readouterr() == ("", "dcp profile: rank 1 ended with status 3\n")
    assert not (tmp_path / "x.json").exists()
