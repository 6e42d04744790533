"""The plan page: complete, self-contained and true to the plan."""

import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from dcp import AttentionSpec, AttnMask, Cluster, SequenceBatch, plan
from dcp.report.plan_page import plan_page_data, write_plan_page

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16)
CLUSTER = Cluster(num_nodes=2, devices_per_node=2)


@pytest.fixture(scope="module")
def made():
    seqlens = [3000, 0, 700, 1, 400]
    masks = {
        "global": "causal",
        "local": [AttnMask.sliding_window(n, 100) for n in seqlens],
    }
    batch = SequenceBatch(seqlens, masks, weights={"local": 3})
    return plan(batch, SPEC, CLUSTER, strategy="zigzag", block_size=256)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page)[1])


def test_the_page_needs_nothing_else(made, tmp_path):
    path = write_plan_page(made, tmp_path / "plan.html", title="a </script> title")
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "__DATA__" not in page
    assert not re.search(r"https?://|\bsrc=|@import|<link", page), "the page works offline"
    assert data_of(page)["title"] == "a </script> title"
    assert set(data_of(page)["masks"]) == {"global", "local"}


def test_the_page_tells_the_plan(made):
    data = plan_page_data(made)
    assert sum(data["blocks"]["length"]) == sum(data["rank_tokens"]) == made.num_tokens
    assert data["blocks"]["owner"] == made.owner.tolist()
    total = np.zeros(2)
    for name, mask in data["masks"].items():
        assert sum(mask["area"]) == sum(mask["rank_area"])
        by_rank = np.zeros(made.num_ranks)
        for ranks in mask["rank"]:
            by_rank += np.bincount(ranks, mask["area"], made.num_ranks) / made.num_head_groups
        np.testing.assert_allclose(by_rank, mask["rank_area"], atol=1)
        assert np.max(mask["division"]) < mask["num_divisions"]
        assert len(mask["slice_start"]) == len(mask["area"]) + 1
        total += made.weights[name] * np.sum(mask["received"], axis=1)
    assert total.tolist() == [made.stats.intra_node_bytes, made.stats.inter_node_bytes]


def test_the_timeline_is_the_predicted_one(made):
    data = plan_page_data(made)
    for which in ("forward", "backward"):
        seconds = sum(
            made.weights[name] * mask["passes"][which]["seconds"]
            for name, mask in data["masks"].items()
        )
        assert seconds == pytest.approx(made.stats.simulated[f"{which}_seconds"])
    for mask in data["masks"].values():
        parts = mask["passes"]["forward"]
        assert np.shape(parts["begin"]) == np.shape(parts["arrived"])
        assert np.shape(parts["begin"])[1] == made.num_ranks
        assert (np.array(parts["computed"]) >= np.array(parts["begin"])).all()


@pytest.mark.parametrize("seqlens", [[], [0], [1]])
def test_small_plans_have_a_page_too(seqlens, tmp_path):
    made = plan(SequenceBatch(seqlens), SPEC, Cluster(devices_per_node=1), strategy="zigzag")
    page = write_plan_page(made, tmp_path / "plan.html").read_text(encoding="utf-8")
    assert data_of(page)["seqlens"] == seqlens


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
def test_a_browser_draws_the_page(made, tmp_path):
    """The page runs without an error and its pictures have many colours: they are drawn."""
    page = write_plan_page(made, tmp_path / "plan.html")
    picture = tmp_path / "plan.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "<canvas" in shown.stdout
    assert "compute balance" in shown.stdout.lower()
    subprocess.run(
        [*command, "--window-size=1200,1600", f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        timeout=60,
        check=True,
    )
    pixels = matplotlib.image.imread(picture)[..., :3].reshape(-1, 3)
    assert len(np.unique((pixels * 255).astype(int), axis=0)) > 50
