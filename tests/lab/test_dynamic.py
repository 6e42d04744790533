"""Planned attention beside Megatron's schedulers: what the simulated comparison counts."""

import pytest

pytest.importorskip("megatron.core")

from dcp import Cluster, SequenceBatch
from lab import dynamic
from lab.peers import plan_megatron_turns
from lab.planner import SPEC

SEQLENS = [5000, 3000, 900, 400, 300, 200, 100, 100]


@pytest.mark.parametrize("any_degree", [False, True])
def test_turns_hold_every_sequence_once(any_degree):
    batch = SequenceBatch(SEQLENS, "causal")
    plans = plan_megatron_turns(batch, SPEC, Cluster(devices_per_node=8), any_degree=any_degree)
    tokens = sorted(n for made in plans for n in made.seqlens.tolist())
    assert tokens == sorted(SEQLENS)
    assert sum(made.rank_tokens.sum() for made in plans) == sum(SEQLENS)


def test_no_system_is_faster_than_ours_and_means_are_of_a_data_set():
    batch = {"name": "some-0", "seqlens": SEQLENS, "nodes": 2, "devices_per_node": 4}
    row = dynamic.compare(batch, "causal")
    assert not row["cannot"]
    assert min(row["layer_seconds"], key=row["layer_seconds"].get) == "auto"
    other = row | {"batch": "some-1", "layer_seconds": {"auto": 1.0, "dynamic CP": 4.0}}
    row = row | {"layer_seconds": {"auto": 2.0, "dynamic CP": 2.0}}
    (summary,) = dynamic.summarise([row, other])
    assert summary["data"] == "some"
    assert summary["slower"]["dynamic CP"] == pytest.approx(2.0)
