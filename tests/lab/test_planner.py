"""The bench of planning: its lengths, and what its summary says."""

import numpy as np

from lab.planner import load, long_tailed, summarise
from tests.batches import REFERENCE


def test_the_library_is_tested_on_batches_of_the_bench():
    batches = {batch["name"]: batch["seqlens"] for batch in load("planner_batches.json")}
    assert batches | REFERENCE == batches


def test_long_tailed_lengths_fill_the_batch():
    lengths = long_tailed(100_000)
    assert sum(lengths) == 100_000
    assert lengths == long_tailed(100_000)
    assert max(lengths) > 5 * np.median(lengths)


def test_the_summary_says_what_is_not_met():
    row = dict.fromkeys(
        ("planning_seconds", "token_balance", "bound_ratio", "layer_bound_ratio"), 0.1
    )
    assert all(line["met"] for line in summarise([row]))
    assert not all(line["met"] for line in summarise([row | {"token_balance": 1.26}]))
