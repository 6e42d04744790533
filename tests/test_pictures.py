"""Pictures for notebooks: true to what they show, self-contained, small, drawn by a browser."""

import base64
import io
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp import AttentionSpec, AttnMask, Cluster, SequenceBatch, plan
from dcp.pictures.mask import mask_cells
from dcp.slices import cell_areas
from tests.browser import needs_browser

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16)
TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"
MASKS = [
    AttnMask.causal(13),
    AttnMask.streaming(700, sink=30, window=90),
    AttnMask.documents([5, 0, 300, 1, 40]),
    AttnMask.shared_question(1000),
    AttnMask.causal(600, cached=590),
    AttnMask.full(0),
]


def made(num_nodes=2):
    batch = SequenceBatch([3000, 0, 700, 1], masks={"a": "causal", "b": "sliding_window:window=64"})
    return plan(batch, SPEC, Cluster(num_nodes=num_nodes, devices_per_node=2), block_size=128)


def picture(html):
    """What an HTML fragment holds as XML, and its image's cells: opacity and whether orange."""
    whole = ElementTree.fromstring(html)
    found = re.search(r"data:image/png;base64,([^\"]+)", html)
    if found is None:
        return whole, None, None
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(found[1])))
    return whole, pixels[..., 3], pixels[..., 0] > 0.5


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_mask_is_drawn_cell_by_cell(mask):
    html = mask._repr_html_()
    _, opacity, orange = picture(html)
    assert f"{mask.area:,} pairs" in html
    assert len(html) < 12_000
    assert not re.search(r"https?://|<script", html)
    if opacity is None:
        assert not mask.q_len
        return
    dense = mask.to_dense()
    rows, columns = opacity.shape
    q = np.linspace(0, mask.q_len, rows + 1).astype(int)
    k = np.linspace(0, mask.k_len, columns + 1).astype(int)
    share = np.add.reduceat(np.add.reduceat(dense.astype(float), q[:-1], 0), k[:-1], 1)
    share /= np.diff(q)[:, None] * np.diff(k)[None]
    assert not orange[opacity > 0].any()
    np.testing.assert_array_equal(opacity > 0, share > 0)
    np.testing.assert_allclose(opacity[share > 0], (32 + 95 * share[share > 0]) / 127, atol=0.01)


@given(data=st.data())
def test_cells_hold_every_pair_once(data):
    """Against the dense mask, for grids of any edges."""
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))
    kinds = [AttnMask.documents(lengths), AttnMask.streaming(sum(lengths), sink=3, window=5)]
    for mask in kinds:
        q, k = (
            np.unique([0, mask.q_len, *data.draw(st.lists(st.integers(0, mask.q_len), max_size=6))])
            for _ in range(2)
        )
        dense = mask.to_dense()
        expected = [[dense[a:b, c:d].sum() for c, d in pairwise(k)] for a, b in pairwise(q)]
        found = cell_areas(mask.bands, q, k)
        assert found.tolist() == np.array(expected, dtype=int).reshape(found.shape).tolist()


def test_masks_of_millions_are_drawn_at_once():
    rng = np.random.default_rng(0)
    long = AttnMask.documents(rng.integers(1, 400, 20_000))
    ragged = AttnMask.from_ranges(
        np.stack([np.zeros(50_000, int), rng.integers(1, 50_000, 50_000)], axis=1)
    )
    for mask in (long, ragged, AttnMask.sliding_window(1 << 20, 128)):
        cells = mask_cells(mask.bands, mask.q_len, mask.k_len)
        size = mask.q_len * mask.k_len / cells.size
        assert cells.sum() * size == pytest.approx(mask.area, rel=0.01)
        assert len(mask._repr_html_()) < 40_000


def test_a_plan_is_drawn_rank_by_rank():
    one = made()
    html = one._repr_html_()
    whole, opacity, orange = picture(html)
    words = "".join(whole.itertext())
    assert f"balance {one.stats.compute_balance:.3f} compute" in words
    assert f"tokens ≤ {one.rank_tokens.max():,}" in words
    rows = opacity.reshape(one.num_ranks, 3, -1) > 0
    assert (rows[:, 0] == rows[:, 1]).all()
    assert orange.reshape(one.num_ranks, 3, -1)[:, 2][rows[:, 2]].all()
    columns = rows.shape[-1]
    # the column of a token is its owner's, and its query's pairs are of who computes them
    for rank in range(one.num_ranks):
        owned = np.unique(one.token_indices(rank) * columns // one.num_tokens)
        assert set(owned) <= set(np.flatnonzero(rows[rank, 2]))
        assert len(np.flatnonzero(rows[rank, 2])) <= 2 * len(owned) + 2
    assert rows[:, 0].any(axis=0).all()
    assert len(html) < 20_000
    received = sum(one.weights[name] * one.received_bytes(name) for name in one.masks)
    assert received.sum(axis=1).tolist() == [one.stats.intra_node_bytes, one.stats.inter_node_bytes]


def test_a_timeline_has_a_bar_for_every_division():
    one = made()
    timeline = one.simulate()
    whole, _, _ = picture(timeline._repr_html_())
    paths = [e.get("d") for e in whole.iter("path") if e.get("fill") != "currentColor"]
    passes = [*timeline.forward.values(), *timeline.backward.values()]
    scale = 706 / max(p.seconds for p in passes)
    for path, p in zip(paths, passes, strict=True):
        drawn = [float(width) for width in re.findall(r"h([\d.e-]+)v", path)]
        seconds = (p.computed - p.begin)[p.computed > p.begin]
        # a bar each, less the gap to the next; steps too narrow to be told apart are one
        assert (seconds * scale > 3).sum() <= len(drawn) <= len(seconds)
        assert sum(drawn) == pytest.approx(seconds.sum() * scale, abs=1.3 * len(seconds))
    assert "forward, mask a" in "".join(whole.itertext())


@pytest.mark.parametrize("seqlens", [[], [0], [1], [5000] * 3])
def test_small_and_wide_plans_are_drawn(seqlens):
    cluster = Cluster(num_nodes=50, devices_per_node=2) if len(seqlens) > 1 else Cluster()
    one = plan(SequenceBatch(seqlens), SPEC, cluster, strategy="zigzag", block_size=64)
    html = one._repr_html_() + one.simulate()._repr_html_()
    assert len(html) < 400_000
    assert ("64 of 100 ranks shown" in html) == (len(seqlens) > 1)
    picture(one._repr_html_())
    picture(one.simulate()._repr_html_())


def test_pictures_need_no_torch():
    code = "import sys, dcp; dcp.AttnMask.causal(9)._repr_html_(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@needs_browser
def test_a_browser_draws_them_on_light_and_dark(page, tmp_path):
    one = made()
    body = "".join(each._repr_html_() for each in (*MASKS, one, one.simulate()))
    path = tmp_path / "all.html"
    style = ":root{color-scheme:light dark} body{margin:8px}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    path.write_text(f"<!doctype html>{head}<style>{style}</style>{body}")
    for dark in (False, True):
        page.open(path, width=390, dark=dark)
        assert page.run("document.documentElement.scrollWidth") == 390
        picture = matplotlib.image.imread(page.picture(tmp_path / "all.png"))[..., :3]
        assert len(np.unique((picture.reshape(-1, 3) * 255).astype(int), axis=0)) > 40
    assert page.errors == []


def test_the_tour_runs():
    """Every cell of the notebook; masks, plans and timelines show themselves as pictures."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(TOUR, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not kept"
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": "."}})
    client.execute()
    shown = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    heads = [re.search(r"<b>(\w+)", html)[1] for html in shown]
    assert heads == ["AttnMask"] * 3 + ["Plan"] * 2 + ["Timeline"] * 2
    assert sum(map(len, shown)) < 200_000
