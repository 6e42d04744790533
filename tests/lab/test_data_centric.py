"""The simulated comparison of data-centric presets, and its cost model."""

import json

import pytest

from dcp import AttentionSpec, Cluster
from dcp.datacentric.buckets import Bucket, draw_buckets, video_buckets
from dcp.datacentric.choosers import make_chooser
from dcp.datacentric.config import DataCentricArguments
from dcp.datacentric.iteration import MicroBatch, RankGroup, epoch_imbalance
from dcp.datacentric.schedule import epoch_iterations
from lab import data_centric as bench
from lab.baselines import BASELINES, launch_baseline, make_baseline
from lab.video_cost import KINDS, TextCost, VideoCost
from tests import sample_costs

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
        bench.group_seconds(COST, BUCKETS, RankGroup(1, tuple(batches)), packed=packed)
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
        {"data_epoch": epoch, "num_tokens": 100, "seconds": seconds, "loss": 1.0}
        | {f"{kind}_rank_seconds": [1.0, 0.5] for kind in ("predicted", "measured")}
        for epoch, seconds in [(0, 50.0), (0, 1.0), (0, 1.0), (1, 9.0)]
    ]
    figures = bench._epoch_figures(rows)
    assert figures["tokens_per_second"] == 100
    assert figures["measured_imbalance"] == pytest.approx(0.25)


# --------------------------------------------------------------------------- baselines

SIZES = {bucket.name: bucket.size for bucket in sample_costs.BUCKETS}


@pytest.mark.parametrize("num_ranks", [1, 3, 4, 6])
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_gives_every_rank_a_group_and_every_sample_a_turn(name, num_ranks):
    profile = sample_costs.make_profile(num_ranks=num_ranks)
    chooser = make_baseline(name, profile, SIZES, degree=1)
    iterations = sample_costs.checked_epoch(chooser, profile, num_ranks)
    busy = [g for iteration in iterations for g in iteration.groups if g.micro_batches]
    assert {group.degree for group in busy} == {1}


def test_the_presets_balance_better_than_a_fixed_degree():
    buckets, profile = sample_costs.BUCKETS, sample_costs.make_profile()
    bucket_of = [bucket.name for bucket in draw_buckets(buckets, 400, "balanced")]
    choosers = {
        "fixed": make_baseline("fixed", profile, SIZES, degree=1),
        "intra": make_chooser(profile, DataCentricArguments(preset="intra")),
        "inter": make_chooser(profile, DataCentricArguments(preset="inter")),
    }
    found = {}
    for name, chooser in choosers.items():
        iterations = list(epoch_iterations(chooser, bucket_of, 4, seed=0, epoch=0))
        seconds = [iteration.rank_seconds() for iteration in iterations]
        found[name] = epoch_imbalance(seconds), sum(each.max() for each in seconds)
    assert max(found["intra"][0], found["inter"][0]) < found["fixed"][0]
    assert max(found["intra"][1], found["inter"][1]) < found["fixed"][1]


def test_a_baseline_trains_on_real_ranks(tmp_path):
    options = {
        "job": "video",
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "video_samples": 4,
        "max_batch_size": 1,
        "sp_size": 2,
        "max_steps": 1,
        "calculate_imbalance": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "output_dir": str(tmp_path),
    }
    launch_baseline("packed", options, num_processes=2)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [group["degree"] for group in row["groups"]] == [2]
    assert len(row["groups"][0]["micro_batches"]) > 0
    assert len(row["measured_rank_seconds"]) == 2
