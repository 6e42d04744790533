"""The training page: true to the log, small for long jobs, and new while the job runs."""

import json
import math
import re

import numpy as np
import pytest

from dcp.report.training_page import MOST_POINTS, training_page_data, write_training_page
from tests.browser import data_of, needs_browser


def lines_of(count, **others):
    rng = np.random.default_rng(0)
    return [
        {
            "step": step, "loss": 6 * math.exp(-step / 40) + rng.random() / 5, "seconds": 0.5,
            "num_tokens": 1000.0, "tokens_per_second": 2000.0 + step, "compute_balance": 1.03,
            "token_balance": 1.2, "plan_wait_seconds": 0.05, "predicted_over_measured": 0.9,
            "max_rank_memory_bytes": 3e9, "learning_rate": 1e-3, "grad_norm": 1.0,
            "intra_node_bytes": 5e6, "inter_node_bytes": 1e6, "strategy": "bisection", **others,
        }
        for step in range(1, count + 1)
    ]  # fmt: skip


EVALUATED = [{"step": 20, "eval_loss": 4.5}, {"step": 40, "eval_loss": 3.25}]
RANKS = {"memory_bytes": [1e9, 3e9, 2e9], "attention_wait_share": [0.1, math.nan, 0.3]}


def test_the_page_needs_nothing_else_and_holds_the_log(tmp_path):
    lines = lines_of(50)
    path = write_training_page(lines + EVALUATED, tmp_path / "t.html", max_steps=60, ranks=RANKS)
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|\bsrc=|@import|<link|__\w+__", page), "it works offline"
    data = data_of(page)
    assert data["step"] == list(range(1, 51))
    assert data["series"]["loss"]["mean"] == pytest.approx([line["loss"] for line in lines])
    assert "measured_imbalance" not in data["series"]
    assert data["evaluations"] == {"step": [20, 40], "eval_loss": [4.5, 3.25]}
    assert data["tokens"] == 50_000
    assert data["trained_seconds"] == 25
    assert data["ranks"]["attention_wait_share"] == [0.1, None, 0.3]
    assert [each.name for each in tmp_path.iterdir()] == ["t.html"]  # no draft is left


def test_what_is_no_number_is_left_out():
    lines = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 2.0, "grad_norm": math.inf}]
    data = training_page_data([*lines, {"step": 3, "loss": "?"}, {"step": 4}])
    assert data["series"]["loss"]["mean"] == [None, 2.0, None]
    assert "grad_norm" not in data["series"]
    json.dumps(data, allow_nan=False)
    assert training_page_data([])["step"] == []


@pytest.mark.parametrize("count", [MOST_POINTS, MOST_POINTS + 1, 7 * MOST_POINTS + 3])
def test_long_jobs_have_means_and_ranges(count):
    lines = lines_of(count)
    lines[5]["loss"] = 1000.0
    found = training_page_data(lines)["series"]["loss"]
    assert len(found["mean"]) <= MOST_POINTS
    size = math.ceil(count / MOST_POINTS)
    runs = [lines[at : at + size] for at in range(0, count, size)]
    losses = [[line["loss"] for line in run] for run in runs]
    assert found["mean"] == pytest.approx([np.mean(of) for of in losses], rel=1e-6)
    if size > 1:
        assert found["low"] == pytest.approx([min(of) for of in losses], rel=1e-6)
        assert max(found["high"]) == 1000


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_drawn_and_fits(page, tmp_path, width):
    path = tmp_path / "t.html"
    cases = (lines_of(50) + EVALUATED, lines_of(2 * MOST_POINTS), [], lines_of(1))
    for dark, lines in zip((False, True, False, True), cases, strict=True):
        page.open(write_training_page(lines, path, ranks=RANKS), width=width, dark=dark)
        assert page.run("document.documentElement.scrollWidth") == width
        for canvas in range(page.run("document.querySelectorAll('canvas').length")):
            colours = f"""(canvas => new Set(new Uint32Array(canvas.getContext("2d").getImageData(
                0, 0, canvas.width, canvas.height).data.buffer)).size)(
                document.querySelectorAll("canvas")[{canvas}])"""
            assert page.run(colours) > 4
    assert page.errors == []
    assert all(url.startswith("file:") for url in page.requests)


@needs_browser
def test_the_numbers_of_the_page_are_the_logs(page, tmp_path):
    lines = lines_of(50)
    page.open(write_training_page(lines + EVALUATED, tmp_path / "t.html", max_steps=60))
    assert page.text("title") == "Training: step 50 of 60"
    assert page.text("state").startswith("finished")
    figures = page.text("figures")
    shown = ["3.2500loss of evaluation at step 40", f"{lines[-1]['loss']:.4f}loss"]
    shown += ["50,000tokens trained on", "1.030compute balance", "10%of the step waits"]
    assert not [words for words in shown if words not in figures]
    page.run("document.querySelector('#charts canvas').focus()")
    page.press("ArrowLeft")  # the last step
    page.press("ArrowLeft")
    said = page.text("said")
    assert said.startswith("step 49\n")
    loss = float(f"{lines[48]['loss']:.4g}")
    assert f"loss (training): {loss:g}" in said
    assert "tokens a second: 2,049" in said
    page.press("+")
    part = page.run("view.part")
    assert part[1] - part[0] == pytest.approx(1 / 1.6)
    page.press("0")
    assert page.run("view.part") == [0, 1]
    assert page.errors == []


@needs_browser
def test_a_page_of_a_running_job_reads_itself_again(page, tmp_path):
    path = tmp_path / "t.html"
    page.open(write_training_page(lines_of(10), path, reload_seconds=0.5))
    page.wait("$('state').textContent.startsWith('running')")
    page.wait("($('smooth').value = 0.5, $('smooth').oninput({target: $('smooth')}), true)")
    write_training_page(lines_of(20), path, reload_seconds=0.5)
    page.wait("document.title.startsWith('20') && view.smooth === 0.5")  # what was chosen is kept
    write_training_page(lines_of(30), path)
    page.wait("document.title.startsWith('30')")
    page.wait("$('state').textContent.startsWith('finished')")
