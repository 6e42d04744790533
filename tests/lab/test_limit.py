"""Layers over their limit: the parts add up, and the limit is one."""

import json

import pytest

from dcp.cluster import Cluster
from dcp.cost import attention_seconds, linear_seconds
from dcp.planner import plan
from lab import host, limit, operations, overlap
from lab.__main__ import main
from lab.planner import make_batch

BATCH = {"name": "small", "seqlens": [9000, 3000, 1100, 70], "nodes": 2, "devices_per_node": 2}
CLUSTER = Cluster.preset("h100", num_nodes=2, devices_per_node=2)


@pytest.mark.parametrize("model", limit.MODELS)
def test_parts_of_the_excess_add_up(model):
    row = limit.measure(BATCH, "causal", CLUSTER, model)
    assert row["ratio"] == pytest.approx(1 + sum(row["excess"].values()))
    assert row["excess"]["imbalance"] >= 0
    assert row["excess"]["kernels"] > 0
    spec, width = limit.MODELS[model]
    batch = make_batch(BATCH["seqlens"], "causal")
    area = sum(n * (n + 1) / 2 for n in BATCH["seqlens"]) / 4
    mean = sum(attention_seconds(area, spec, CLUSTER, backward=b) for b in (False, True))
    mean += linear_seconds(batch.num_tokens / 4, spec, CLUSTER, model_width=width)
    assert row["limit_seconds"] == pytest.approx(mean)


def test_half_batches_and_early_messages_are_played():
    batch = make_batch([9000, 3000, 1100, 70], "causal")
    row = overlap.compare("small", "causal", batch, CLUSTER)
    floor = plan(batch, overlap.SPEC, CLUSTER).stats.limit_seconds
    assert floor < row["early_seconds"] <= 1.01 * row["layer_seconds"]
    assert floor < row["halves_seconds"]
    alone = overlap.compare("one", "causal", make_batch([9000], "causal"), CLUSTER)
    assert alone["halves_seconds"] is None
    summary = overlap.summarise([row, alone])
    assert summary["halves"]["median"] == row["halves_seconds"] / row["layer_seconds"]
    assert "halves ÷ planned" in overlap.as_text({"rows": [row, alone], "summary": summary})


def test_a_table_a_file_and_a_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(limit, "load", lambda name: [BATCH])
    words = ["limit", "--masks", "causal", "--nodes", "1", "--strategy", "zigzag"]
    assert main([*words, "--json", "--name", "rule", "--out", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["chosen"] for row in shown["rows"]] == ["zigzag"]
    assert json.loads((tmp_path / "limit.json").read_text())["rule"] == shown
    assert main(words) == 0
    assert "h100 1x8 8B-tp4: median" in capsys.readouterr().out


def test_a_summary_of_each_cluster_and_model():
    excess = dict.fromkeys(limit.PARTS, 0.1)
    rows = [
        {"cluster": c, "model": "m", "ratio": r, "cpu_seconds": r, "excess": excess}
        for c, r in (("a", 1.1), ("b", 1.3), ("b", 1.2), ("b", 1.7))
    ]  # fmt: skip
    a, b = limit.summarise(rows)
    assert (a["median"], a["worst"]) == (1.1, 1.1)
    assert (b["median"], b["worst"]) == (1.3, 1.7)


def test_what_programs_cost_the_host(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host, "PLAN_TOKENS", 4096)
    monkeypatch.setattr(host, "PLAN_CLUSTER", Cluster(num_nodes=1, devices_per_node=3))
    monkeypatch.setattr(operations, "PLAN_TOKENS", 4096)
    words = ["host", "--repeat", "2", "--divisions", "3", "--out", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "host.json").read_text())["3 divisions"] == shown
    assert len(shown["rows"]) == 6
    for row in shown["rows"]:
        assert row["instructions"]["Copy"] == 2
        assert row["instructions"]["Division"] <= 3
    assert len(shown["operations"]) == 6
    assert all(each["operations"] > 0 < each["megabytes"] for each in shown["operations"])
    summary = shown["summary"]
    both = summary["forward"]["microseconds"] + summary["backward"]["microseconds"]
    assert summary["milliseconds"] == pytest.approx(32 * both / 1e3)
    assert main(words) == 0
    assert "µs each" in capsys.readouterr().out
