"""Planning many documents takes no square of time or memory; sizes beyond a limit are refused."""

import time
import tracemalloc

import numpy as np
import pytest

from dcp import AttentionSpec, Cluster, SequenceBatch, plan
from dcp.cli import main

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)


def seconds_of(count, mask, strategy="auto"):
    batch = SequenceBatch(np.random.default_rng(0).integers(1, 513, count), mask)
    began = time.process_time()
    made = plan(batch, SPEC, Cluster(), strategy=strategy)
    assert sum(len(made.token_indices(rank)) for rank in range(8)) == batch.num_tokens
    assert made.stats.compute_balance < 1.04
    return time.process_time() - began


@pytest.mark.parametrize("mask", ["causal", "shared_question", "streaming:window=50"])
def test_thousands_of_documents(mask):
    seconds_of(2500, mask)  # compiles
    tracemalloc.start()
    took = seconds_of(20_000, mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 6
    assert peak < 300e6


def test_time_grows_with_the_number_of_documents():
    seconds_of(5000, "causal", "bisection")
    ratio = seconds_of(20_000, "causal", "bisection") / seconds_of(5000, "causal", "bisection")
    assert ratio < 6


@pytest.mark.parametrize(("count", "length"), [(100_000, 1), (50_000, 0)])
def test_documents_of_one_token_and_of_none(count, length):
    for cluster in (Cluster(), Cluster(num_nodes=4)):
        made = plan(SequenceBatch(np.full(count, length)), SPEC, cluster)
        assert made.num_tokens == count * length
        assert made.stats.token_balance < 1.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seqlens=9", "--nodes=100000"], "num_nodes must be 65536 or less, got 100000"),
        (["--seqlens=9", "--devices-per-node=1000000"], "devices_per_node must be 65536 or less"),
        (["--seqlens=100000000", "--block-size=1"], "100,000,000 data blocks are too many"),
        (["--seqlens=100000000", "--block-size=100"], "parts of a mask are too many"),
        (["--seqlens=9", "--num-divisions=1000000000"], "num_divisions must be 4096 or less"),
        (["--seqlens=99999999999"], "seqlens[0] must be 2147483647 or less"),
    ],
)
def test_sizes_beyond_a_limit(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mask", ["causal", "streaming", "causal_blockwise:block=2"])
def test_a_hundred_million_tokens_are_planned(mask, capsys):
    began = time.process_time()
    assert main(["plan", "--seqlens=100000000", "--mask", mask]) == 0
    assert "100,000,000 tokens" in capsys.readouterr().out
    assert time.process_time() - began < 20
