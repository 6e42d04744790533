"""The benchmarks on shaped links: what they compare, count and keep."""

import json

import pytest

from dcp import Cluster
from dcp.cost import linear_seconds
from dcp.launch.failures import JobFailed
from dcp.planner import plan
from lab import attention as bench
from lab import train
from lab.__main__ import main
from lab.peers import MEGATRON, ranks_of_samples
from lab.results import merge
from lab.testbed import open_testbed, why_not

CLUSTER = Cluster.preset("laptop", num_nodes=2, devices_per_node=1)
BATCH = {"name": "b", "seqlens": [8000, 1600, 320, 16]}


@pytest.fixture(scope="module")
def case():
    return bench.make_case(BATCH, "causal", CLUSTER, scale=16)


def test_lengths_and_masks_shrink_alike():
    small = bench.scaled_batch([160, 33], "streaming", 16)
    assert small.seqlens.tolist() == [10, 3]
    full = bench.scaled_batch([8192], "streaming", 1).area()
    assert bench.scaled_batch([8192], "streaming", 16).area() == pytest.approx(full / 256, rel=0.02)


def test_one_plan_under_two_names_runs_once(case):
    assert case.index["a2a_p2p"] == case.index["zigzag"] != case.index["ulysses"]
    assert set(case.index.values()) == set(range(len(case.plans)))
    assert {*case.index, *case.cannot} >= {*bench.STATIC, *bench.PER_BATCH, MEGATRON, "auto"}


def test_gains_are_of_medians_and_spreads_of_rounds(case):
    wanted = {"zigzag": 3.0, "data_parallel": 1.5, "auto": 2.0}
    plans = [case.plans[case.index[name]] for name in wanted]
    mine = bench.Case("b", "causal", plans, {name: i for i, name in enumerate(wanted)}, {})
    rounds = (100.0, 1.0, 1.0, 2.0)  # the first warms up
    runs = [
        [[(scale * seconds * share,) * 2 for scale in rounds] for seconds in wanted.values()]
        for share in (0.25, 0.5)
    ]
    wire = [[bench.planned_wire(each).tolist()[node] for each in mine.plans] for node in range(2)]
    row = bench.compare(mine, CLUSTER, runs, wire)
    assert row["strategies"]["auto"]["seconds"] == 2.0
    assert row["strategies"]["auto"]["spread"] == [2.0, 4.0]
    assert row["over_static"]["gain"] == row["over_static"]["lowest"] == pytest.approx(1.5)
    assert row["over_all"]["gain"] == pytest.approx(0.75)
    summary = bench.summarise([row])
    assert summary["masks"]["causal"]["met"]
    assert summary["least_gain"] == pytest.approx(1.5)
    assert summary["least_gain_over_all"] == pytest.approx(0.75)
    assert summary["never_slower"]
    assert summary["wire_error"] == 0
    assert row["strategies"]["zigzag"]["planned_bytes"] > 0


def test_planned_bytes_are_the_tables_of_both_passes(case):
    made = case.plans[case.index["zigzag"]]
    total = sum(made.moved_bytes("default", backward=b).sum() for b in (False, True))
    assert bench.planned_wire(made).sum(axis=0).tolist() == [total, total]


def test_unknown_batches_are_refused():
    with pytest.raises(ValueError, match="'nothing' is not one of longalign"):
        bench.choose_batches(["nothing"])


def test_samples_of_ranks_become_ranks_of_samples():
    turns = [[[0], [0], [1], [2]], [[3], [], [], []]]
    assert ranks_of_samples(turns) == {0: (0, 1), 1: (2,), 2: (3,), 3: (0,)}


def test_linear_layers_cost_by_the_models_width():
    spec = bench.SPEC
    wide, own = (linear_seconds(10, spec, CLUSTER, model_width=w) for w in (4096, 512))
    assert linear_seconds(10, spec, CLUSTER) == wide == pytest.approx(8 * own)
    batch = bench.scaled_batch(BATCH["seqlens"], "causal", 16)
    alone = plan(batch, spec, CLUSTER, model_width=0).stats
    passes = alone.simulated["forward_seconds"] + alone.simulated["backward_seconds"]
    assert 0.5 * passes < alone.layer_seconds <= passes * (1 + 1e-9)  # no linear layers between
    with pytest.raises(ValueError, match="model_width must be 0 or more, got -1"):
        plan(batch, spec, CLUSTER, model_width=-1)


def test_results_of_other_runs_are_kept(tmp_path):
    path = tmp_path / "new" / "attention.json"
    for name, value in (("a", 1), ("b", 2), ("a", 3)):
        merge(path, name, {"value": value})
    assert json.loads(path.read_text()) == {"a": {"value": 3}, "b": {"value": 2}}


def test_speeds_leave_warm_up_out_and_losses_are_compared():
    def steps(speed, loss):
        keys = ("plan_wait_seconds", "seconds", "inter_node_bytes")
        common = dict.fromkeys(keys, 0.0) | {"strategy": "zigzag"}
        speeds = [1.0, 1.0, speed, speed + 2]
        return [common | {"tokens_per_second": s, "loss": loss} for s in speeds]

    found = train.figures([steps(10, 4.0), steps(20, 4.0)])
    assert found["tokens_per_second"] == 16
    assert (found["spread"], found["by_round"]) == ([10, 22], [11, 21])
    assert train.loss_difference([steps(1, 4.0), steps(2, 4.25)]) == 0.25


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_failing_rank_ends_the_others():
    with open_testbed(2, bandwidth=1e6) as bed, pytest.raises(JobFailed, match=r"^rank 1 ended"):
        bed.run("tests.works:wait_beside_a_failure", {})


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_cards_carry_what_the_plans_say(case):
    """Real ranks, real counters: the tables' bytes and nothing else to speak of."""
    made = case.plans[case.index["zigzag"]]
    with open_testbed(2, bandwidth=100e6) as bed:
        found = bench.run_plans(bed, [made], bench.SPEC, ranks_per_node=1, repeat=3)
    counted = [rank["wire"][0] for rank in found]
    for node, planned in enumerate(bench.planned_wire(made).tolist()):
        assert counted[node] == pytest.approx(planned, rel=0.05)


def test_no_testbed_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("lab.testbed.why_not", lambda: "network namespaces need root")
    assert main(["attention", "--repeat", "1"]) == 2
    assert "no testbed: network namespaces need root" in capsys.readouterr().err
