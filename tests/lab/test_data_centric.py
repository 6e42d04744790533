"""The simulated comparison of data-centric presets, and its cost model."""

import json

import pytest

from dcp import AttentionSpec, Cluster
from dcp.datacentric.buckets import Bucket, video_buckets
from dcp.datacentric.iteration import Group, MicroBatch
from lab import data_centric as bench
from lab.video_cost import KINDS, TextCost, VideoCost

COST = VideoCost(Cluster.preset("h100", devices_per_node=8))
BUCKETS = {bucket.name: bucket for bucket in video_buckets()}


def test_costs_grow_with_tokens_and_fall_with_ranks():
    def seconds(name, degree, batch_size):
        return COST.measure(BUCKETS[name], degree, batch_size).seconds

    assert seconds("720p x 204", 1, 2) == pytest.approx(2 * seconds("720p x 204", 1, 1))
    halved = seconds("720p x 204", 2, 1) / seconds("720p x 204", 1, 1)
    assert 0.5 < halved < 0.6, "exchanges cost something"
    assert seconds("144p x 1", 8, 1) > seconds("144p x 1", 1, 1), "launches do not shrink"


def test_the_longest_videos_need_several_ranks():
    profile = COST.profile(
        [BUCKETS["720p x 408"], BUCKETS["144p x 1"]], memory_bytes=bench.MEMORY_BYTES, max_batch=2
    )
    assert profile.cost(("720p x 408", 1, 1)) is None
    assert profile.cost(("720p x 408", 2, 1)) is not None
    kept = profile.cost(("144p x 1", 1, 1), recompute=False).keep
    assert kept == dict.fromkeys(KINDS, 28), "short ones keep every activation"


def test_packing_saves_launches():
    batches = [MicroBatch("144p x 1", 1, 0.0, (("spatial", 0), ("temporal", 0)))] * 4
    apart, together = (
        bench.group_seconds(COST, BUCKETS, Group(1, tuple(batches)), packed=packed)
        for packed in (False, True)
    )
    assert together < apart / 2


def test_an_epoch_beside_the_alternatives(tmp_path):
    row = bench.simulate_video(8, "short", 150)
    presets = row["presets"]
    assert list(presets) == list(bench.ORDER)
    rate = {name: figures["tokens_per_second"] for name, figures in presets.items()}
    assert rate["inter+PAC"] > rate["inter"] > rate["bucket"]
    assert json.loads(json.dumps(row)) == row
    rows = [row | {"world": 32}]
    text = {"world": 8, "presets": {"auto": {"seconds": 1e-3, "iterations": 2}}}
    shown = bench.as_text("simulate", {"video": rows, "text": [text]})
    assert "published 2.48x" in shown
    assert "1.00 ms, 2 iterations" in shown


def test_text_costs_add_up_to_the_whole():
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64)
    cost = TextCost(Cluster(devices_per_node=4), spec)
    one, four = (cost.measure(Bucket("", (4096,)), degree, 1).seconds for degree in (1, 4))
    assert one / 4 < four < one / 3


def test_the_first_step_is_left_out_of_measured_figures():
    rows = [
        {"epoch": epoch, "num_tokens": 100, "seconds": seconds, "loss": 1.0}
        | {f"{kind}_rank_seconds": [1.0, 0.5] for kind in ("predicted", "measured")}
        for epoch, seconds in [(0, 50.0), (0, 1.0), (0, 1.0), (1, 9.0)]
    ]
    figures = bench._epoch_figures(rows)
    assert figures["tokens_per_second"] == 100
    assert figures["measured_imbalance"] == pytest.approx(0.25)
