"""The table of a cluster file: what it holds, what it costs, which kernel it names."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcp
from dcp import AttentionSpec, Cluster, SequenceBatch, wire
from dcp.cost import attention_seconds, item_seconds
from dcp.data.messages import REQUEST, request_from_bytes, request_to_bytes
from dcp.kernel_table import BLOCK_MASKS, KernelRates
from dcp.rates import RateFit

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16")
SIDES = (64, 256, 1024)


def line(kernel="triton", mask="full", rates=(1e12, 4e12, 8e12), **fields):
    known = {
        "kernel": kernel, "dtype": "bfloat16", "head_dim": 64, "mask": mask, "sides": SIDES,
        "forward": tuple(rates), "backward": tuple(rate / 2 for rate in rates),
    }  # fmt: skip
    return KernelRates(**known | fields)


TABLE = (
    line(),
    line(mask="causal", rates=(5e11, 3e12, 7e12)),
    line(mask="banded", rates=(2e11, 1e12, 4e12)),
)
MEASURED = Cluster(num_nodes=2, devices_per_node=2, kernel_table=TABLE, memory_bandwidth=1e18)


def seconds(area, q_rows, kv_rows, cluster=MEASURED, spec=SPEC, **options):
    arrays = (np.atleast_1d(np.array(each)) for each in (area, q_rows, kv_rows))
    return item_seconds(*arrays, spec, cluster, **options)


# --------------------------------------------------------------------------- the file


def test_a_table_survives_file_plan_and_request(tmp_path):
    MEASURED.save(tmp_path / "c.json")
    assert Cluster.load(tmp_path / "c.json") == MEASURED
    plan = dcp.plan(SequenceBatch([3000, 40]), SPEC, MEASURED, strategy="zigzag")
    assert dcp.Plan.from_bytes(plan.to_bytes()).cluster == MEASURED
    request = request_to_bytes(SequenceBatch([30]), SPEC, MEASURED, {})
    assert request_from_bytes(request)[2] == MEASURED


def test_files_and_plans_without_a_table_stay_as_they_were(tmp_path):
    plain = Cluster(num_nodes=2, devices_per_node=2)
    plain.save(tmp_path / "c.json")
    assert "kernel_table" not in json.loads((tmp_path / "c.json").read_text())
    assert Cluster.load(tmp_path / "c.json") == plain
    plan = dcp.plan(SequenceBatch([3000, 40]), SPEC, plain, strategy="zigzag")
    assert b"kernel_table" not in plan.to_bytes()
    assert dcp.Plan.from_bytes(plan.to_bytes()).cluster == plain


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (5, "kernel_table must be a list of lines, got 5"),
        ("ab", "must be a list of lines"),
        ({"kernel": "x"}, "must be a list of lines"),
        ([7], "a line of kernel_table must have"),
        ([{"kernel": "triton"}], "a line of kernel_table must have"),
        ([{"mask": "striped"}], "mask 'striped' is not one of full, causal, banded"),
        ([{"mask": ["full"]}], "mask ['full'] is not one of"),
        ([{"dtype": "int8"}], "dtype 'int8' is not one of"),
        ([{"kernel": 3}], "kernel must be a string, got 3"),
        ([{"head_dim": 0}], "head_dim must be 1 or more, got 0"),
        ([{"sides": []}], "sides must ascend, got []"),
        ([{"sides": [64, 64, 128]}], "sides must ascend, got [64, 64, 128]"),
        ([{"sides": [64, 128]}], "forward must have a rate for each of 2 sides"),
        ([{"backward": [1e9]}], "backward must have a rate for each of 3 sides"),
        ([{"forward": [1e9, 0, 1e9]}], "forward must be more than 0, got 0"),
        ([{"forward": [1e9, float("nan"), 1e9]}], "forward must be a finite number, got nan"),
        ([{"forward": None}], "forward must have a rate for each"),
        ([{}, {}], "has two lines of triton, bfloat16, head_dim 64 for one mask"),
        ([{"mask": "causal"}], "has no line of triton, bfloat16, head_dim 64 for full blocks"),
    ],
    ids=str,
)
def test_tables_that_are_none(tmp_path, table, words):
    whole = json.loads(json.dumps(replace(MEASURED, kernel_table=TABLE[:1]).to_json()))
    [first] = whole["kernel_table"]
    if isinstance(table, list) and isinstance(table[0], dict) and table != [{"kernel": "triton"}]:
        table = [first | each for each in table]
    (tmp_path / "c.json").write_text(json.dumps(whole | {"kernel_table": table}))
    with pytest.raises(ValueError) as told:
        Cluster.load(tmp_path / "c.json")
    assert words in str(told.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"mask": "casual"}, {"sides": [64, 256]}, {"head_dim": "64"}, {"sides": "abc"},
        {"forward": [1.0, "x", 2.0]}, {"colour": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_table_on_the_wire_is_refused(damage):
    meta, arrays = wire.unpack(REQUEST, request_to_bytes(SequenceBatch([30]), SPEC, MEASURED, {}))
    meta["cluster"]["kernel_table"][0] |= damage
    with pytest.raises(wire.WireError):
        request_from_bytes(wire.pack(REQUEST, meta, arrays))


# --------------------------------------------------------------------------- costs


def test_blocks_cost_what_was_measured():
    for mask, rates in zip(BLOCK_MASKS, TABLE, strict=True):
        for side, forward, backward in zip(SIDES, rates.forward, rates.backward, strict=True):
            kept = {"full": side**2, "causal": side * (side + 1) // 2, "banded": side**2 // 5}
            flops = 4 * SPEC.num_heads * SPEC.head_dim * kept[mask]
            assert seconds(kept[mask], side, side)[0] == pytest.approx(flops / forward)
            found = seconds(kept[mask], side, side, backward=True, num_head_groups=2)
            assert found[0] == pytest.approx(2.5 * flops / backward / 2)
    # no block is faster than the bound that planning prunes by
    most = attention_seconds(1024**2, SPEC, MEASURED)
    assert seconds(1024**2, 1024, 1024)[0] == pytest.approx(most)


ROWS = st.integers(1, 5000)


@given(ROWS, ROWS, st.floats(0, 1), st.booleans())
def test_no_block_beats_the_bound_and_larger_ones_take_longer(q_rows, kv_rows, part, backward):
    area = int(part * q_rows * kv_rows)
    found = seconds(area, q_rows, kv_rows, backward=backward)[0]
    assert found >= attention_seconds(area, SPEC, MEASURED, backward=backward) * (1 - 1e-12)
    full = seconds(q_rows * kv_rows, q_rows, kv_rows, backward=backward)[0]
    larger = seconds((q_rows + 7) * kv_rows, q_rows + 7, kv_rows, backward=backward)[0]
    assert larger >= full * (1 - 1e-12)


def test_noise_makes_no_larger_block_cheaper():
    """The rate of 256 is more than sixteen times that of 64: its block would take less time."""
    noisy = replace(MEASURED, kernel_table=(line(rates=(1e10, 1e12, 2e12)),))
    sides = np.arange(32, 2048)
    assert (np.diff(seconds(sides**2, sides, sides, cluster=noisy)) >= -1e-15).all()


def test_specs_that_were_not_measured_cost_as_before():
    plain = replace(MEASURED, kernel_table=())
    for changed in ({"head_dim": 128}, {"dtype": "float32"}, {"value_dim": 32}):
        spec = replace(SPEC, **{"value_dim": changed.get("head_dim", 64)} | changed)
        found = [seconds(900, 30, 300, cluster=c, spec=spec)[0] for c in (MEASURED, plain)]
        assert found[0] == found[1]
        assert MEASURED.kernel_for(spec) == "auto"


def test_a_backward_pass_that_was_not_measured_takes_its_ratio():
    cluster = replace(MEASURED, kernel="flex", kernel_table=(line("flex", backward=()),))
    there, back = (seconds(64**2, 64, 64, cluster=cluster, backward=b)[0] for b in (False, True))
    assert back == pytest.approx(cluster.backward_ratio * there)


# --------------------------------------------------------------------------- choices


def test_the_kernel_is_the_tables_fastest_that_trains():
    tables = (
        line("dense", rates=(9e11, 9e11, 9e11)),
        line("flash", rates=(2e12, 9e12, 9e12)),
        line("flex", rates=(9e13, 9e13, 9e13), backward=()),
        line("dense", rates=(9e15, 9e15, 9e15), head_dim=128),
    )
    cluster = replace(MEASURED, kernel_table=TABLE + tables)
    assert cluster.kernel_for(SPEC) == "flash"
    assert cluster.kernel_for(replace(SPEC, head_dim=128, value_dim=128)) == "dense"
    named = replace(cluster, kernel="dense")
    assert named.kernel_for(SPEC) == "dense"
    cost = [seconds(64**2, 64, 64, cluster=c)[0] for c in (cluster, named)]
    assert cost[1] / cost[0] == pytest.approx(2e12 / 9e11)


def test_plans_follow_the_table():
    """Where small blocks are slow, another strategy is planned than where none is."""
    batch = SequenceBatch([4096, 600, 500, 400, 300, 300, 200, 200, 100, 100])
    even, steep = (
        replace(
            MEASURED,
            inter_node_bandwidth=1e9,
            device_network_bandwidth=1e9,
            kernel_table=(line(rates=rates),),
        )
        for rates in ((4e11, 4e11, 4e11), (2e9, 3e10, 4e11))
    )
    plans = [dcp.plan(batch, SPEC, each, model_width=0) for each in (even, steep)]
    there = [p.simulate().forward_seconds for p in plans]
    sizes = [np.median(p.block_length) for p in plans]
    assert plans[0].stats.strategy != plans[1].stats.strategy or sizes[0] < sizes[1]
    assert there[0] < there[1]
    for mine, other in ((0, 1), (1, 0)):  # each is the better one where it was planned
        assert dcp.layer.layer_seconds(
            plans[mine], plans[mine].cluster, model_width=0
        ) < dcp.layer.layer_seconds(plans[other], plans[mine].cluster, model_width=0)


def test_learnt_rates_scale_the_table():
    fit = RateFit(MEASURED)
    fit.compute.log = np.log([2.0, 4.0, 1.0])
    fitted = fit._fitted()
    assert [each.forward for each in fitted.kernel_table] == [
        tuple(rate / 2 for rate in each.forward) for each in TABLE
    ]
    assert fitted.kernel_table[0].backward[0] == TABLE[0].backward[0] / 4
    again = RateFit(MEASURED)
    again.load_state_dict(json.loads(json.dumps(fit.state_dict())))
    assert again.given == MEASURED
