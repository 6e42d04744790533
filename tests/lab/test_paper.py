"""The artifact's experiments on tiny inputs: lengths, resuming, and what each row means."""

import json
from pathlib import Path

import numpy as np
import pytest

from dcp import AttentionSpec, Cluster, SequenceBatch, plan
from dcp.simulate import COMPUTE, TRANSFER, Span
from lab.__main__ import main
from lab.paper import attention, campaign, dryrun, lengths, loss, motivation
from lab.paper.end_to_end import GPT_8B, predict_iteration, sliced_cluster
from lab.paper.rows import mean_by, read_rows
from lab.paper.workbench import Workbench


@pytest.fixture
def bench(tmp_path):
    for name in lengths.DATASETS:
        (tmp_path / f"{name}.json").write_text(json.dumps([900, 4000, 12000, 70000, 300] * 8))
    return Workbench(tmp_path / "out", effort=0.005, files=tmp_path, workers=0)


def test_batches_are_full_and_hold_documents_of_the_data_set(bench):
    known = bench.lengths["ldc"]
    for over_long, longest in (("drop", 12000), ("truncate", 16384), ("split", 16384)):
        batches = lengths.make_batches(known, scale=1, tokens=16384, count=30, over_long=over_long)
        assert len(batches) == 30
        assert all(0.75 * 16384 <= sum(batch) <= 16384 for batch in batches)
        assert max(max(batch) for batch in batches) == longest
    halved = lengths.make_batches(known, scale=0.5, tokens=16384, count=3)
    assert {n for batch in halved for n in batch} <= {450, 2000, 6000, 150}
    with pytest.raises(ValueError, match="over_long"):
        lengths.make_batches(known, scale=1, tokens=16384, count=1, over_long="keep")
    with pytest.raises(ValueError, match="100 tokens or fewer"):
        lengths.make_batches(known, scale=1, tokens=100, count=1)


def test_lengths_of_files_and_fitted_ones_say_what_they_are(tmp_path):
    said = [{"messages": [{"role": "user", "content": "x" * n}]} for n in (3, 50)]
    (tmp_path / "longalign.jsonl").write_text("\n".join(map(json.dumps, said)))
    found = lengths.document_lengths("longalign", tmp_path / "cache", files=tmp_path)
    assert found.tokens.tolist() == [3 + 7, 50 + 7]  # begin, "user", newline, text, end
    assert found.source == "file longalign.jsonl, bytes"
    again = lengths.document_lengths("longalign", tmp_path / "cache")  # needs no file
    assert (again.source, again.tokens.tolist()) == (found.source, found.tokens.tolist())
    with pytest.raises(ValueError, match=r"no ldc\.json"):
        lengths.document_lengths("ldc", tmp_path / "cache", files=tmp_path)
    fitted = lengths.fitted_lengths("ldc")
    assert fitted.source.startswith("fitted")
    assert abs(np.median(fitted.tokens) / lengths.DATASETS["ldc"].median - 1) < 0.05


def count_up(settings, seqlens):
    return {"sum": sum(seqlens), "ran": settings["n"] * 0.5}


def test_rows_are_kept_and_a_cut_run_goes_on(tmp_path):
    path = tmp_path / "rows.csv"
    tasks = [({"n": n, "name": "a,b"}, [n, 1]) for n in range(5)]
    assert campaign.run_tasks(path, tasks[:3], count_up, workers=0)[2]["sum"] == 3
    path.write_text(path.read_text() + "3,half")  # cut short while writing

    def only_new(settings, seqlens):
        assert settings["n"] > 2
        return count_up(settings, seqlens)

    rows = campaign.run_tasks(path, tasks, only_new, workers=0)
    assert [row["n"] for row in rows] == [0, 1, 2, 3, 4]
    assert read_rows(path) == rows
    [mean] = mean_by(rows, ("name",), ("ran",))
    assert mean == {"name": "a,b", "ran": 1.0, "batches": 5}


def test_a_dry_run_counts_mask_sparsity_of_every_batch_and_resumes(bench):
    rows = dryrun.block_rows(bench, data=("ldc",), masks=("streaming",), block_sizes=(2048, 4096))
    own = [row for row in rows if row["strategy"] == dryrun.STRATEGY]
    assert [row["block_size"] for row in own] == [2048, 4096]
    [seqlens] = bench.batches("ldc", tokens=dryrun.TOKENS, count=1)
    causal = SequenceBatch(seqlens, "causal").area()
    expected = SequenceBatch(seqlens, "streaming").area() / causal
    assert own[0]["sparsity"] == pytest.approx(expected)
    assert own[0]["planning_seconds"] > 0
    static = next(row for row in rows if row["strategy"] == dryrun.STATIC)
    assert static["inter_node_mb"] > own[0]["inter_node_mb"]
    path = bench.data / "dryrun_blocks.csv"
    before = path.read_text()
    dryrun.block_rows(bench, data=("ldc",), masks=("streaming",), block_sizes=(2048, 4096))
    assert path.read_text() == before


def test_the_dryrun_command_prints_means(tmp_path, capsys):
    options = ["--out", str(tmp_path), "--iterations", "1", "--data", "ldc", "--workers", "0"]
    assert main(["dryrun", *options, "--masks", "causal", "--block-sizes", "4096"]) == 0
    assert "inter_node_mb" in capsys.readouterr().out
    assert (tmp_path / "data" / "dryrun_balance.csv").exists()
    assert main(["dryrun", "--out", str(tmp_path), "--iterations", "0"]) == 2


def test_tolerance_trades_balance_for_volume():
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    cluster = sliced_cluster(Cluster(num_nodes=8), 4)
    batch = SequenceBatch([20000, 9000, 9000, 8000, 7000, 5000, 3000, 2000])
    strict, loose = (
        plan(batch, spec, cluster, strategy="hypergraph", block_size=1024, tolerance=t).stats
        for t in (0.01, 0.6)
    )
    assert strict.compute_balance < loose.compute_balance
    assert strict.inter_node_bytes > loose.inter_node_bytes
    with pytest.raises(ValueError, match="tolerance"):
        plan(batch, spec, cluster, tolerance=0)


def test_an_iteration_is_attention_and_what_surrounds_it():
    full = Cluster(num_nodes=2)
    made = plan(SequenceBatch([4000, 2000]), GPT_8B.spec(4), sliced_cluster(full, 4))
    found = predict_iteration(made, GPT_8B, full, 4)
    once = made.simulate()
    attention = GPT_8B.num_layers * (once.forward_seconds + once.backward_seconds)
    assert found.attention == pytest.approx(attention)
    # 6 FLOPs a weight and token, the weights of a layer written out
    layer = 4096 * 128 * (32 + 8 + 8 + 32) + 2 * 4096 * 14336
    weights = 32 * layer + 4096 * 50304
    assert GPT_8B.num_parameters == weights
    tokens = made.rank_tokens.max()
    assert found.linear == pytest.approx(6 * tokens * weights / 4 / full.device_flops)
    # every node passes on all gradients (4 bytes) and parameters (2 bytes) but one rank's part
    assert found.gradients == pytest.approx(weights * 6 * (3 / 4) / full.inter_node_bandwidth)
    assert found.seconds == pytest.approx(found.attention + found.others)
    with pytest.raises(ValueError, match="tensor_parallel=3"):
        sliced_cluster(full, 3)
    with pytest.raises(ValueError, match="2 devices"):
        predict_iteration(made, GPT_8B, full, 2)


def test_motivation_counts_what_a_ring_sends_in_vain():
    case = {"nodes": 4, "mask": "causal_blockwise", "strategy": "zigzag"}
    found = motivation.waste(case, [4096])
    # brute force: 8 ranks with 2 of 16 chunks each; who needs which chunk
    dense = SequenceBatch([4096], "causal_blockwise").masks["default"][0].to_dense()
    needs = dense.reshape(16, 256, 16, 256).any(axis=(1, 3))
    received = useful = 0
    for rank in range(8):
        own = [rank, 15 - rank]
        received += 14
        useful += np.delete(needs[own].any(axis=0), own).sum()
    assert found["redundant_share"] == pytest.approx(1 - useful / received)
    parts = motivation.decompose(case | {"mask": "causal"}, [16000, 900])
    assert all(parts[name] >= 0 for name in ("attention_alone", "overlapped", "exposed"))


def test_parts_of_a_trace_sum_to_its_seconds():
    spans = [
        Span(0, COMPUTE, "forward: copy", 0.0, 1.0),
        Span(0, COMPUTE, "forward: attention 0", 1.0, 4.0),
        Span(0, TRANSFER, "forward: wait 1", 0.5, 2.0),
        Span(0, TRANSFER, "forward: wait 2", 1.5, 2.5),
        Span(0, COMPUTE, "forward: attention 1", 6.0, 7.0),
    ]
    assert attention.parts(spans, 8.0) == pytest.approx((1.0, 2.5, 1.5, 3.0))


def test_the_operator_is_measured_on_real_ranks(bench):
    size = attention.LocalSize(
        processes=2, tokens=512, batches=1, repeat=1, head_dim=16, scales=(1,)
    )
    attention.measure_local(bench, size)
    rows = bench.rows(attention.ROWS)
    assert len(rows) == 2 * (5 + 3 * 2)
    assert {row["ranks"] for row in rows} == {2}
    for row in rows:
        total = row["others"] + row["attention_alone"] + row["overlapped"] + row["exposed"]
        assert 0 < total <= (row["forward_ms"] + row["backward_ms"]) * 1e-3 * 1.01


def test_training_curves_differ_in_strategy_alone_and_are_run_once(bench, monkeypatch):
    configs = []

    def train(options, *, num_processes):
        configs.append(options)
        folder = Path(options["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(options))
        step = {"step": 1, "loss": 5.0, "seconds": 0.1, "num_tokens": 9}
        line = json.dumps(step | {"strategy": "x"}) + "\n"
        (folder / "metrics.jsonl").write_text(line * options["max_steps"])

    monkeypatch.setattr(loss, "launch", train)
    rows = loss.rows(bench)  # effort 0.005: one step each
    assert [(row["mask"], row["system"]) for row in rows] == [
        (mask, system) for mask in loss.MASKS for system in ("static", "dcp")
    ]
    for static, ours in zip(configs[::2], configs[1::2], strict=True):
        differ = {key for key in static if static[key] != ours[key]}
        assert differ == {"strategy", "output_dir"}
    assert bench.rows("loss") == rows
    assert loss.rows(bench) == rows
    assert len(configs) == 8  # nothing was run again
    loss.rows(Workbench(bench.out, effort=0.02))  # other steps: other runs
    assert len(configs) == 16
