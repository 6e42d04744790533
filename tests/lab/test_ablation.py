"""What each part is worth, and ``auto`` beside the rules: the tables say what was planned."""

import json

import pytest

from dcp.cluster import Cluster
from dcp.placement import strategy_names
from lab import ablation, rules
from lab.__main__ import main

BATCH = {"name": "small", "seqlens": [9000, 3000, 1100, 70], "nodes": 2, "devices_per_node": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ablation, "load", lambda name: [BATCH])


@pytest.mark.parametrize("part", ablation.PARTS)
def test_a_part_is_left_out_and_put_back(part):
    [whole] = ablation.measure("all parts", ["causal"], 0)
    [without] = ablation.measure(part, ["causal"], 0)
    assert without["ratio"] >= 1
    [again] = ablation.measure("all parts", ["causal"], 0)
    assert again["ratio"] == whole["ratio"]


def test_the_local_search_is_worth_something():
    assert main(["ablation", "--parts", "no local search", "--masks", "causal"]) == 0
    rows = [
        {"part": part, **row}
        for part in ("all parts", "no local search")
        for row in ablation.measure(part, ["causal", "streaming"], 0)
    ]
    whole, without = ablation.summarise([{"seed": 0, **row} for row in rows])
    assert whole["slower"] == whole["bytes"] == 1
    assert without["slower"] > 1


def test_random_batches_are_planned_by_every_rule(tmp_path, capsys):
    words = ["rules", "--batches", "3", "--seed", "5", "--json", "--out", str(tmp_path)]
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "rules.json").read_text())["random"] == shown
    assert shown["summary"]["auto_slower"] == 0
    assert set(shown["rows"][0]["layer_seconds"]) <= {"auto", *strategy_names()}
    assert main(words[:-3]) == 0
    assert "auto slower than a rule: 0 times" in capsys.readouterr().out


def test_a_faster_rule_is_counted():
    cluster = Cluster.preset("h100", num_nodes=1, devices_per_node=2)
    row = rules.measure([900, 50], "causal", cluster, "8B-tp4", 4.0)
    row["layer_seconds"]["zigzag"] = row["layer_seconds"]["auto"] / 2
    summary = rules.summarise([row])
    assert summary["auto_slower"] == 1
    assert summary["rules"]["zigzag"]["least"] == pytest.approx(0.5)
