"""Traces of simulated and of executed plans."""

import json

import torch

from dcp import AttentionSpec, Cluster, LocalWorld, SequenceBatch, plan
from dcp.program import Wait
from dcp.report.trace import simulated_spans, write_trace
from dcp.simulate import COMPUTE, TRANSFER
from dcp.tables import Item

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")


def test_a_trace_holds_every_division_and_transfer(tmp_path):
    made = plan(
        SequenceBatch([3000, 400, 20]),
        SPEC,
        Cluster(num_nodes=2, devices_per_node=2),
        strategy="bisection",
    )
    spans = simulated_spans(made)
    write_trace(spans, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2, 3}
    drawn = [event for event in events if event["ph"] == "X"]
    timeline = made.simulate()
    end = max(event["ts"] + event["dur"] for event in drawn)
    assert end <= (timeline.forward_seconds + timeline.backward_seconds) * 1e6 * (1 + 1e-6)
    divisions = [s for s in spans if s.track == COMPUTE and "forward" in s.name]
    assert len(divisions) == len(
        {(i[Item.RANK], i[Item.STEP]) for i in made.masks["default"].items}
    )


def test_an_executed_run_records_its_instructions():
    cluster = Cluster(num_nodes=1, devices_per_node=3)
    made = plan(SequenceBatch([300, 40]), SPEC, cluster, strategy="ring")
    assert made.stats.intra_node_bytes > 0
    world = LocalWorld(made)
    world.spans = []
    q, k, v = (torch.randn(340, h, 16, requires_grad=True) for h in (4, 2, 2))
    world.attention(q, k, v).sum().backward()
    names = {span.name.split()[1] for span in world.spans}
    assert names == {"attention", "copy", "reduce", "wait"}
    assert {span.name.split(":")[0] for span in world.spans} == {"forward", "backward"}
    assert {span.rank for span in world.spans} == {0, 1, 2}
    assert all(span.end >= span.start for span in world.spans)
    waits = [span for span in world.spans if span.track == TRANSFER]
    programs = [made.rank_plan(rank).mask_program() for rank in range(3)]
    planned = sum(
        isinstance(each, Wait)
        for program in programs
        for backward in (False, True)
        for each in program.instructions(backward=backward)
    )
    assert len(waits) == planned > 0
    assert all("wait" in span.name for span in waits)
