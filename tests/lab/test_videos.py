"""Simulated comparisons of videos: planned attention beside groups, and gains taken apart."""

import json

import numpy as np
import pytest

from dcp import Cluster, SequenceBatch, plan
from dcp.datacentric.buckets import Bucket
from lab import packed_video, short_videos
from lab.packed_video import MODELS, PackedCost

LTX, WAN = MODELS


def test_models_have_their_size():
    # published: 2 and 1.3 billion weights with all embeddings
    assert LTX.num_weights == pytest.approx(1.9e9, rel=0.15)
    assert WAN.num_weights == pytest.approx(1.3e9, rel=0.1)
    sizes = {bucket.name: bucket.shape for bucket in LTX.buckets()}
    assert sizes["720p x 1"] == (1, 23, 40)
    assert sizes["480p x 51"] == (7, 15, 27)


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_and_a_group_of_one_rank_cost_the_same(model):
    cost = PackedCost(model, Cluster.preset("h100", num_nodes=1, devices_per_node=1))
    length = 8192
    alone = cost.measure(Bucket("one", (length,)), 1, 1)
    made = plan(
        SequenceBatch([length], "full"), model.spec, cost.cluster, model_width=cost.plan_width
    )
    planned, keeping = cost.plan_seconds(made)
    assert planned == pytest.approx(alone.seconds, rel=0.02)
    layer = alone.layers["layer"]
    assert planned - keeping == pytest.approx(model.depth * layer.forward_seconds, rel=0.03)


def test_what_does_not_fit_is_said():
    cost = PackedCost(WAN, Cluster.preset("h100", num_nodes=1, devices_per_node=1))
    made = plan(SequenceBatch([600_000], "full"), WAN.spec, cost.cluster, strategy="data_parallel")
    with pytest.raises(ValueError, match="600000 tokens of a rank do not fit"):
        cost.plan_seconds(made)


def test_an_epoch_of_packed_videos():
    row = packed_video.simulate_epoch(LTX, 4, "balanced", epoch_tokens=4e5, tokens_per_rank=4096)
    assert list(row["ways"]) == [*packed_video.GROUPS, *packed_video.PLANNED]
    rate = {way: figures["tokens_per_second"] for way, figures in row["ways"].items()}
    assert rate["planned+PAC"] > rate["planned"] > rate["bucket"]
    assert rate["inter+PAC"] > rate["inter"]
    assert row["ways"]["planned"]["over_limit"] >= 1
    assert json.loads(json.dumps(row)) == row
    shown = packed_video.as_text([row])
    assert shown.count("**") == 4, "the best of both kinds"


def test_gains_are_balance_times_the_rest():
    row = short_videos.published()
    assert row["gain"]["inter+PAC"] == 2.48
    for way in short_videos.WAYS:
        assert row["of_balance"][way] * row["rest"][way] == pytest.approx(row["gain"][way])
    assert row["of_balance"]["inter"] == pytest.approx((1 - 0.043) / (1 - 0.164))
    assert "2.48 = 1.16 × 2.14" in short_videos.as_text([row])


def test_variants_change_what_they_say():
    plain, *others = short_videos.VARIANTS
    drawn = {v.name: [b.name for b in short_videos.draw_short(v, 500)] for v in (plain, *others)}
    shortest = {name: np.mean([n == "144p x 1" for n in of]) for name, of in drawn.items()}
    assert shortest["distribution: (n + 0)^-3"] > shortest[plain.name]
    assert shortest[plain.name] > shortest["distribution: (n + 10)^-3"]
    row = short_videos.simulate_variant(
        short_videos.Variant("slow", costs={"step_seconds": 5.0}), 300
    )
    base = short_videos.simulate_variant(short_videos.Variant("plain"), 300)
    assert row["gain"]["inter"] > base["gain"]["inter"], "accumulation saves steps"
