"""``dcp profile``: the file it writes is a cluster of what was measured here."""

from itertools import product

import numpy as np
import pytest
import torch

from dcp import AttentionSpec, Cluster, profile
from dcp.bench import rates
from dcp.cli import main
from dcp.kernel_table import BLOCK_MASKS, Curves, KernelRates
from dcp.launch.ranks import run_ranks


def test_a_measured_cluster_can_be_loaded(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(rates, "BLOCK_SIZES", (16, 64))
    monkeypatch.setattr(rates, "LONG", 60.0)  # a busy machine measures all sizes too
    monkeypatch.setitem(rates.LAUNCH_TOKENS, "cpu", 64)
    path = tmp_path / "here.json"
    words = ["--heads=2", "--kv-heads=1", "--nodes=3", "--devices-per-node=2"]
    words += ["--head-dim", "16", "24"]
    assert main(["profile", "--out", str(path), "--name", "here", *words]) == 0
    shown = capfd.readouterr().out
    assert f"written to {path}" in shown
    found, preset = Cluster.load(path), Cluster.preset("laptop")
    assert (found.name, found.num_nodes, found.devices_per_node) == ("here", 3, 2)
    assert [side for side, _ in found.kernel_rates] == [16, 64]
    assert found.device_flops == max(rate for _, rate in found.kernel_rates) > 0
    assert found.kernel == "auto"
    for head_dim in (16, 24):
        spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=head_dim, dtype="float32")
        assert (taken := found.kernel_for(spec)) in ("torch_cpu", "dense")
        assert f"float32, head_dim {head_dim}: ranks run {taken}" in shown
    assert all(len(line) <= 80 for line in shown.replace(str(path), "file").splitlines())
    lines = {(line.kernel, line.head_dim, line.mask) for line in found.kernel_table}
    assert lines == set(product(("torch_cpu", "flex", "dense"), (16, 24), BLOCK_MASKS))
    for line in found.kernel_table:
        assert line.sides == (16, 64)
        assert min(line.forward) > 0
        assert len(line.backward) == (0 if line.kernel == "flex" else 2)
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


def test_a_wrong_kernel_is_left_out_of_the_table(monkeypatch, capfd):
    def wrong(kernel, *_):
        if kernel.name == "flex":
            raise RuntimeError("illegal instruction")
        return "its dk is off by 1.0" if kernel.name == "dense" else None

    monkeypatch.setattr(rates, "trial", wrong)
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16)
    serving = rates.serving_kernels(spec, torch.device("cpu"))
    assert [(kernel.name, trains) for kernel, trains in serving] == [("torch_cpu", True)]
    assert capfd.readouterr().err.splitlines() == [
        "kernel flex is left out: it fails on a small case: RuntimeError: illegal instruction",
        "kernel dense is left out: its dk is off by 1.0",
    ]


@pytest.mark.parametrize("mask", BLOCK_MASKS)
def test_blocks_of_a_line_are_of_its_kind(mask):
    """The planner's cost takes a block of this mask to be of this line."""
    side = 200
    area = rates.block_mask(mask, side).area
    lines = [
        KernelRates(
            kernel="dense", dtype="float32", head_dim=8, mask=each, sides=(64,), forward=(rate,)
        )
        for each, rate in zip(BLOCK_MASKS, (1.0, 2.0, 3.0), strict=True)
    ]
    curves = Curves({line.mask: line for line in lines})
    found = curves.flops(*map(np.array, (area, side, side)), backward=False)
    assert found == pytest.approx(1.0 + BLOCK_MASKS.index(mask))


def test_ranks_run_the_kernel_of_their_cluster(tmp_path):
    from tests.trainer_work import make_trainer

    def kernel(**plan):
        trainer = make_trainer(tmp_path, plan=plan)
        trainer.get_train_dataloader()
        return trainer.executor.kernel, trainer.attention.spec

    chosen, spec = kernel(cluster=Cluster(devices_per_node=1, kernel="dense"))
    assert chosen == "dense"
    assert kernel()[0] == "auto"
    fast, slow = (
        KernelRates(
            kernel=name, dtype=spec.dtype, head_dim=spec.head_dim, mask="full",
            sides=(64,), forward=(rate,), backward=(rate,),
        )
        for name, rate in (("dense", 2e9), ("torch_cpu", 1e9))
    )  # fmt: skip
    assert kernel(cluster=Cluster(devices_per_node=1, kernel_table=(slow, fast)))[0] == "dense"


def test_a_failing_rank_is_one_line_and_no_file(tmp_path, monkeypatch, capfd):
    def failing(*_, **options):
        return run_ranks("tests.works:wait_beside_a_failure", {}, **options)

    monkeypatch.setattr(rates, "BLOCK_SIZES", (16,))
    monkeypatch.setattr(profile, "run_ranks", failing)
    words = ["--heads=2", "--kv-heads=1", "--head-dim=16", "--out", str(tmp_path / "x.json")]
    assert main(["profile", *words]) == 1
    assert capfd.readouterr() == ("", "dcp profile: rank 1 ended with status 3\n")
    assert not (tmp_path / "x.json").exists()
