"""``dcp profile``: the file it writes is a cluster of what was measured here."""

import torch

from dcp import AttentionSpec, Cluster, profile
from dcp.cli import main
from dcp.launch.ranks import run_ranks


def test_a_measured_cluster_can_be_loaded(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(profile, "BLOCK_SIZES", (16, 64))
    path = tmp_path / "here.json"
    words = ["--heads=2", "--kv-heads=1", "--head-dim=16", "--nodes=3", "--devices-per-node=2"]
    assert main(["profile", "--out", str(path), "--name", "here", *words]) == 0
    shown = capfd.readouterr().out
    assert f"written to {path}" in shown
    found, preset = Cluster.load(path), Cluster.preset("laptop")
    assert (found.name, found.num_nodes, found.devices_per_node) == ("here", 3, 2)
    assert [side for side, _ in found.kernel_rates] == [16, 64]
    assert found.device_flops == max(rate for _, rate in found.kernel_rates) > 0
    assert found.kernel in ("torch_cpu", "dense")
    assert [name for name in ("torch_cpu", "dense") if f"kernel {name} " in shown] == [
        "torch_cpu",
        "dense",
    ]
    assert shown.count(", taken") == 1
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


def test_a_wrong_kernel_is_left_out_of_the_race(monkeypatch, capfd):
    def wrong(kernel, *_):
        return "its dk is off by 1.0" if kernel.name == "dense" else None

    monkeypatch.setattr(profile, "trial", wrong)
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16)
    raced = profile.race_kernels(spec, torch.device("cpu"), side=64)
    assert list(raced) == ["torch_cpu"]
    assert raced["torch_cpu"] > 0
    assert capfd.readouterr().err == "kernel dense is left out: its dk is off by 1.0\n"


def test_ranks_run_the_kernel_of_their_cluster(tmp_path):
    from tests.trainer_work import make_trainer

    cluster = Cluster(devices_per_node=1, kernel="dense")
    assert make_trainer(tmp_path, plan={"cluster": cluster}).executor.kernel == "dense"
    assert make_trainer(tmp_path).executor.kernel == "auto"


def test_a_failing_rank_is_one_line_and_no_file(tmp_path, monkeypatch, capfd):
    def failing(*_, **options):
        return run_ranks("tests.works:wait_beside_a_failure", {}, **options)

    monkeypatch.setattr(profile, "BLOCK_SIZES", (16,))
    monkeypatch.setattr(profile, "run_ranks", failing)
    words = ["--heads=2", "--kv-heads=1", "--head-dim=16", "--out", str(tmp_path / "x.json")]
    assert main(["profile", *words]) == 1
    assert capfd.readouterr() == ("", "dcp profile: rank 1 ended with status 3\n")
    assert not (tmp_path / "x.json").exists()
