"""The bench of inference: what it predicts for the published cluster, and how it sums up."""

import json

import pytest

from lab import inference, inference_paper
from lab.__main__ import main


def test_the_published_cluster_is_simulated_as_reported(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["inference", "--only", "simulated", "--json", "--out", str(tmp_path)]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["simulated"]
    assert json.loads((tmp_path / "inference.json").read_text())["simulated"] == found
    assert (tmp_path / "inference.png").stat().st_size > 10_000
    rows = found["table_4"]
    assert rows[0]["pass_q_ms"] < rows[0]["pass_kv_ms"]
    assert rows[-1]["pass_q_ms"] > rows[-1]["pass_kv_ms"]
    assert all(row["planned_ms"] <= min(row["pass_kv_ms"], row["pass_q_ms"]) for row in rows)
    for row in found["full_prefill"]:
        if row["num_nodes"] <= 8:
            assert row["seconds"] == pytest.approx(row["published_seconds"], rel=0.2)
    text = "\n".join(inference_paper.as_text(found))
    assert "| 128 K | 4 |" in text


def test_regret_is_against_the_faster_ring_each_time():
    def row(kv, q, planned, choice):
        seconds = {"pass_kv": kv, "pass_q": q, "planned": planned}
        return {n: {"seconds": s} for n, s in seconds.items()} | {"choices": {"rule": choice}}

    rows = [row(4.0, 1.0, 1.5, "pass_kv"), row(2.0, 5.0, 2.0, "pass_kv")]
    assert inference.regret(rows) == pytest.approx(
        {"rule": 1.0, "pass_kv": 1.0, "pass_q": 1.0, "planned": 1 / 6}
    )


def test_one_rank_has_nothing_to_pass(capsys):
    assert main(["inference", "--ranks", "1"]) == 2
    assert "--ranks must be 2 or more" in capsys.readouterr().err
