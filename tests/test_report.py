"""The plan page: complete, self-contained and true to the plan."""

import re

import numpy as np
import pytest

from dcp import AttentionSpec, AttnMask, Cluster, SequenceBatch, plan
from dcp.report.plan_page import plan_page_data, write_plan_page
from dcp.tables import Item, Move
from dcp.transfers import DKV, KV, OUT, Q
from tests.browser import data_of, needs_browser

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
        moves, node = mask["moves"], made.cluster.node_of_rank
        far = node[moves["source"]] != node[moves["target"]]
        volume = made.weights[name] * np.array(moves["forward"])
        total += [volume[~far].sum(), volume[far].sum()]
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


def test_a_block_names_the_messages_that_serve_it(made):
    """Against rows that are written message by message: who wrote a row last has brought it."""
    for name, mask in plan_page_data(made)["masks"].items():
        tables, moves = made.masks[name], mask["moves"]
        sends, receives = tables.sends.tolist(), tables.receives.tolist()
        ends = list(zip(moves["step"], moves["source"], moves["target"], strict=True))
        assert ends == sorted((s[Move.STEP], s[Move.RANK], s[Move.PEER]) for s in sends)
        assert sum(moves["forward"]) == made.moved_bytes(name).sum()
        assert sum(moves["backward"]) == made.moved_bytes(name, backward=True).sum()
        wrote = np.full((made.num_ranks, 4, tables.buffer_rows.max() + 1), -1)
        taken = {}  # rows of results: when and by which message they leave
        arrivals = {}
        for line in receives:
            arrivals.setdefault((line[Move.STEP], line[Move.PEER], line[Move.RANK]), []).append(
                line
            )
        leaving = {}
        for line in sends:
            leaving.setdefault((line[Move.STEP], line[Move.RANK], line[Move.PEER]), []).append(line)
        seen = 0
        for step in range(tables.num_steps + 1):
            for index in [i for i, move in enumerate(ends) if move[0] == step]:
                came, gone = arrivals[ends[index]].pop(0), leaving[ends[index]].pop(0)
                assert came[Move.BUFFER] == gone[Move.BUFFER] == moves["buffer"][index]
                rows = slice(came[Move.ROW], came[Move.ROW] + came[Move.ROWS])
                wrote[came[Move.RANK], came[Move.BUFFER], rows] = index
                for row in range(gone[Move.ROW], gone[Move.ROW] + gone[Move.ROWS]):
                    taken.setdefault((gone[Move.RANK], gone[Move.BUFFER], row), []).append(index)
            for item in tables.items[tables.items[:, Item.STEP] == step].tolist():
                rank, group, tile = item[Item.RANK], item[Item.GROUP], item[Item.TILE]
                assert mask["q_move"][group][tile] == wrote[rank, Q, item[Item.Q_ROW]]
                assert mask["kv_move"][group][tile] == wrote[rank, KV, item[Item.KV_ROW]]
                seen += wrote[rank, KV, item[Item.KV_ROW]] >= 0
        for item in tables.items.tolist():
            rank, group, tile = item[Item.RANK], item[Item.GROUP], item[Item.TILE]
            for what, buffer, row in (("out", OUT, Item.OUT_ROW), ("dkv", DKV, Item.DKV_ROW)):
                left = [
                    i
                    for i in taken.get((rank, buffer, item[row]), ())
                    if ends[i][0] > item[Item.STEP]
                ]
                move = mask[f"{what}_move"][group][tile]
                assert move < 0 if not left else ends[move][0] == min(ends[i][0] for i in left)
                assert move in (left or [-1])
        assert seen  # some keys travelled


@pytest.mark.parametrize("seqlens", [[], [0], [1]])
def test_small_plans_have_a_page_too(seqlens, tmp_path):
    made = plan(SequenceBatch(seqlens), SPEC, Cluster(devices_per_node=1), strategy="zigzag")
    page = write_plan_page(made, tmp_path / "plan.html").read_text(encoding="utf-8")
    assert data_of(page)["seqlens"] == seqlens


# ---------------------------------------------------------------- in a browser


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_drawn_and_fits(page, made, tmp_path, width):
    path = write_plan_page(made, tmp_path / "plan.html")
    for dark in (False, True):
        page.open(path, width=width, dark=dark)
        assert page.run("document.documentElement.scrollWidth") == width
        for name in ("timeline", "traffic", "loads", "owners", "matrix"):
            canvas = f"document.getElementById({name!r})"
            assert page.run(f"{canvas}.getBoundingClientRect().right") <= width
            colours = f"""new Set(new Uint32Array({canvas}.getContext("2d").getImageData(
                0, 0, {canvas}.width, {canvas}.height).data.buffer)).size"""
            assert page.run(colours) > 4, name
    assert page.errors == []
    assert all(url.startswith("file:") for url in page.requests)


@needs_browser
def test_the_numbers_of_the_page_are_the_plans(page, made, tmp_path):
    page.open(write_plan_page(made, tmp_path / "plan.html"))
    stats, figures = made.stats, page.text("figures")
    assert f"{made.num_tokens:,} tokens on 4 ranks" in page.text("title")
    assert f"{stats.compute_balance:.3f}compute balance" in figures
    assert f"{stats.num_compute_blocks:,}compute blocks" in figures
    page.run("view.mask = 'local'; view.pass = 'backward'; draw()")
    received = page.run("received()")
    sends, node = made.masks["local"].sends, made.cluster.node_of_rank
    volume, expected = made.moved_bytes("local", backward=True), np.zeros((2, 4))
    far = (node[sends[:, Move.RANK]] != node[sends[:, Move.PEER]]).astype(int)
    np.add.at(expected, (far, sends[:, Move.PEER]), volume)
    assert received == expected.tolist()
    waits = page.run("timeline.text({rank: 0, step: 1})")
    times = made.simulate().backward["local"]
    compute = (times.computed - times.begin)[1, 0]
    assert f"division 1: {compute * 1e6:.0f} µs of attention" in waits or compute < 1e-5


@needs_browser
def test_the_keyboard_reaches_everything(page, made, tmp_path):
    page.open(write_plan_page(made, tmp_path / "plan.html"))

    def focus(name):
        page.run(f"document.getElementById({name!r}).focus()")

    focus("timeline")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.press(key)
    assert page.text("said").startswith("rank 1, step 1")
    page.press("+")
    begin, end = page.run("view.time")
    assert end - begin == pytest.approx(1 / 1.6)
    page.press("0")
    assert page.run("view.time") == [0, 1]
    page.press("Enter")
    assert page.run("view.rank") == 1
    assert "Rank 1 on node 0" in page.text("panel")
    page.press("Escape")
    assert page.run("view.rank") is None
    focus("matrix")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        page.press(key)
    starts = np.sort(made.block_position[made.block_sequence == 0])
    q, k = f"{starts[2]}–{starts[3] - 1}", f"0–{starts[1] - 1}"
    assert page.text("said").startswith(f"queries {q} × keys {k}")
    page.run("document.querySelector('[data-rank=\\'0\\']').focus()")
    page.press("ArrowRight")
    assert page.run("[view.rank, document.activeElement.dataset.rank]") == [1, "1"]
    page.run("document.querySelector('[data-document=\\'2\\']').click()")
    assert "document 2" in page.text("matrix-says")
    assert page.errors == []


@needs_browser
def test_the_mouse_points_picks_and_drags(page, made, tmp_path):
    page.open(write_plan_page(made, tmp_path / "plan.html"))
    page.run("document.getElementById('timeline').scrollIntoView({block: 'center'})")
    left, top = page.run(
        "(box => [box.left, box.top])(document.getElementById('timeline').getBoundingClientRect())"
    )
    place = page.run("timeline.place({rank: 2, step: 0})")
    x, y = left + place[0], top + place[1]
    page.mouse("moved", x, y)
    assert page.text("tip").startswith("rank 2, step 0")
    page.click(x, y)
    assert page.run("view.rank") == 2
    page.mouse("wheel", x, y, deltaX=0, deltaY=-250, modifiers=2)  # with Ctrl
    page.wait("view.time[1] - view.time[0] < 0.5")
    before = page.run("view.time")
    page.mouse("pressed", x, y)
    page.mouse("moved", x - 60, y, buttons=1)
    page.mouse("released", x - 60, y)
    assert page.run("view.time")[0] > before[0]
    assert page.run("view.rank") == 2  # dragging picks nothing


@needs_browser
def test_the_page_prints_light_and_small_plans_are_drawn(page, made, tmp_path):
    page.open(write_plan_page(made, tmp_path / "plan.html"), dark=True)
    page.run("addEventListener('beforeprint', () => { window.printed = [printing, dark()]; })")
    assert page.print(tmp_path / "plan.pdf").read_bytes().startswith(b"%PDF")
    assert page.run("window.printed") == [True, False]
    for seqlens in ([], [0], [1]):
        small = plan(SequenceBatch(seqlens), SPEC, Cluster(devices_per_node=1), strategy="zigzag")
        page.open(write_plan_page(small, tmp_path / "small.html"))
    assert page.errors == []
