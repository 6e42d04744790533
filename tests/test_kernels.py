"""Kernels and their options, slices merged and cut into cells; dense attention is the reference."""

import argparse
import json
import logging

import numpy as np
import pytest
import torch

from dcp import AttentionSpec, Cluster, LocalWorld, SequenceBatch, plan
from dcp.bench import kernels
from dcp.bench.alone import Alone, in_one_launch
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, DCPAttention, cells
from dcp.runtime.division import attention_steps, merged_slices, row_slices
from dcp.runtime.kernels import KERNELS, Options, get_kernel
from tests.oracle import batch_mask
from tests.test_runtime import MASKS

SEQLENS = [1, 0, 7, 70, 33]
NAMES = ("out", "lse", "dq", "dk", "dv", "dsink")
CPU = torch.device("cpu")


def make_spec(heads=4, kv_heads=2, head_dim=16, dtype="float32"):
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)


def attention_by_the_book(q, k, v, mask, scale=None, softcap=None, sink=None):
    """out and lse; the sink is one more key that every query sees, with a value of zeros."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink is not None:
        column = sink[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, column], dim=2)
        v = torch.cat([v, torch.zeros_like(v[:1])])
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hqk,khd->qhd", weights, v), lse.transpose(0, 1)


def attend(attention, q, k, v, sink):
    """out, lse and gradients for a fixed gradient of out."""
    out, lse = attention(q, k, v, sink)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    inputs = [x for x in (q, k, v, sink) if x is not None]
    grads = torch.autograd.grad(out, inputs, grad_out)
    return [x.detach() for x in (out, lse, *grads)]


def inputs_of(spec, tokens, dtype, with_sink):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, h, spec.head_dim) for h in (spec.num_heads, *[spec.num_kv_heads] * 2)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    sink = torch.randn(spec.num_heads, generator=generator, dtype=torch.float64).to(dtype)
    return [x.requires_grad_() for x in tensors] + [sink.requires_grad_() if with_sink else None]


def errors(
    kernel, mask, world, heads=(4, 2), head_dim=16, dtype="float32", with_sink=False, **call
):
    """Largest error of each result of the kernel, and of dense attention in the same dtype."""
    batch = SequenceBatch(SEQLENS, [MASKS[mask](n) for n in SEQLENS])
    spec = make_spec(*heads, head_dim, dtype)
    cluster = Cluster(num_nodes=1, devices_per_node=world)
    a_plan = plan(batch, spec, cluster, strategy="hypergraph", block_size=24)
    dense_mask, to = batch_mask(batch), getattr(torch, dtype)

    def planned(q, k, v, sink):
        world = LocalWorld(a_plan, kernel=kernel)
        return world.attention(q, k, v, sink=sink, return_lse=True, **call)

    def by_the_book(q, k, v, sink):
        call_of = {name: call[name] for name in ("scale", "softcap") if name in call}
        return attention_by_the_book(q, k, v, dense_mask, sink=sink, **call_of)

    tensors = inputs_of(spec, batch.num_tokens, to, with_sink)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    want = attend(by_the_book, *exact)
    return [
        [difference(a, b) for a, b in zip(attend(run, *tensors), want, strict=True)]
        for run in (planned, by_the_book)
    ]


def difference(found, want):
    """Largest absolute difference; infinite where NaN or infinities do not agree."""
    if torch.isnan(found).any() or not torch.equal(torch.isinf(found), torch.isinf(want)):
        return float("inf")
    gap = found.double() - want
    return torch.nan_to_num(gap, nan=0, posinf=0, neginf=0).abs().max().item()


def is_close(found, tolerance=1e-5):
    assert max(found[0]) <= tolerance, dict(zip(NAMES, found[0], strict=False))


OPTIONS = [
    {"scale": 0.3},
    {"softcap": 2.0},
    {"with_sink": True},
    {"softcap": 5.0, "with_sink": True, "scale": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", ["torch_cpu", "dense"])
def test_options_of_every_kernel(kernel, options):
    if kernel == "torch_cpu" and "softcap" in options:
        with pytest.raises(ValueError, match="torch_cpu: it has no soft-cap"):
            errors(kernel, "streaming", 3, **options)
    else:
        is_close(errors(kernel, "streaming", 3, dtype="float64", **options), 1e-10)


def test_a_sink_reaches_rows_that_see_nothing():
    """Their weight is all on the sink: out 0, log-sum-exp the sink."""
    is_close(errors("torch_cpu", "ranges", 2, dtype="float64", with_sink=True), 1e-10)


@pytest.mark.parametrize("kernel", ["torch_cpu", "dense"])
@pytest.mark.parametrize("mask", MASKS)
def test_cells_cut_by_small_strips_equal_dense(monkeypatch, kernel, mask):
    monkeypatch.setattr(cells, "STRIP", 16)
    is_close(errors(kernel, mask, 2, dtype="float64"), 1e-10)


def test_flex_serves_inference_and_refuses_gradients():
    a_plan = make_plan("streaming", 2)
    q, k, v = (torch.randn(a_plan.num_tokens, heads, 16) for heads in (4, 2, 2))
    flex = LocalWorld(a_plan, kernel="flex").attention(q, k, v)
    dense = LocalWorld(a_plan, kernel="dense").attention(q, k, v)
    assert (flex - dense).abs().max() < 1e-5
    capped = [
        LocalWorld(make_plan("causal", 1), kernel=name).attention(q, k, v, softcap=2.0)
        for name in ("flex", "dense")
    ]
    assert (capped[0] - capped[1]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="flex: it has no backward pass"):
        LocalWorld(a_plan, kernel="flex").attention(q.requires_grad_(), k, v)


def make_plan(mask, world):
    batch = SequenceBatch(SEQLENS, [MASKS[mask](n) for n in SEQLENS])
    cluster = Cluster(num_nodes=1, devices_per_node=world)
    spec = make_spec()
    return plan(batch, spec, cluster, strategy="hypergraph", block_size=24)


def test_compiled_code_has_no_graph_break_and_keeps_its_plan():
    first, second = make_plan("causal", 1), make_plan("full", 1)
    executor = AttentionExecutor()
    layer, sink = torch.nn.Linear(8, 16 * 8), torch.randn(4, requires_grad=True)
    x = torch.randn(first.num_tokens, 8)

    def model(x):
        q, kv = layer(x).view(-1, 8, 16).split([4, 4], dim=1)
        out = DCPAttention.apply(executor, q, kv.unflatten(1, (2, 2)), sink=sink)
        return out.square().sum()

    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        executor.prepare(first)
        loss = run(x)
        executor.prepare(second)  # the backward pass must go by the first
        results.append((loss, *torch.autograd.grad(loss, (layer.weight, sink))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_plan_made_ready_ahead_of_time():
    executor, like = AttentionExecutor(), torch.empty(0)
    a_plan = make_plan("causal", 1)
    executor.prepare(executor.ready(a_plan, like))
    q, kv = torch.randn(a_plan.num_tokens, 4, 16), torch.randn(a_plan.num_tokens, 2, 2, 16)
    want = LocalWorld(a_plan).attention(q, *kv.unbind(1))
    found = executor.attention(a_plan.shard(0, q), a_plan.shard(0, kv))
    torch.testing.assert_close(a_plan.unshard([found]), want)
    with pytest.raises(ValueError, match="rank 0 of 2"):
        executor.ready(make_plan("causal", 2).rank_plan(0), like)


# --------------------------------------------------------------------------- what is refused


def test_what_cannot_be_honoured_is_refused_by_name():
    a_plan = make_plan("causal", 1)
    executor = AttentionExecutor()
    executor.prepare(a_plan)
    q, kv = torch.zeros(a_plan.num_tokens, 4, 16), torch.zeros(a_plan.num_tokens, 2, 2, 16)
    with pytest.raises(ValueError, match=r"dropout=0\.1 of attention weights is not offered"):
        DCPAttention.apply(executor, q, kv, dropout=0.1)
    with pytest.raises(ValueError, match=r"softcap must be positive, or None for none, got 0"):
        DCPAttention.apply(executor, q, kv, softcap=0.0)
    with pytest.raises(ValueError, match=r"sink has shape \(3,\), the plan needs \(4,\)"):
        DCPAttention.apply(executor, q, kv, sink=torch.zeros(3))
    with pytest.raises(TypeError, match="alibi"):
        DCPAttention.apply(executor, q, kv, alibi=True)


def test_auto_picks_by_device_and_option_and_says_which(caplog):
    get_kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger="dcp"):
        assert get_kernel("auto", CPU, torch.float32).NAME == "torch_cpu"
    assert "kernel torch_cpu for torch.float32 on cpu" in caplog.text
    capped = Options(1.0, softcap=3.0)
    assert get_kernel("auto", CPU, torch.float32, capped).NAME == "dense"
    with pytest.raises(ValueError, match=r"no kernel for torch\.int32 on cpu") as refusal:
        get_kernel("auto", CPU, torch.int32)
    assert all(f"{name}:" in str(refusal.value) for name in KERNELS)


# --------------------------------------------------------------------------- the benchmark


def test_a_program_alone_and_its_blocks_in_one_launch():
    """What the benchmark compares: equal pairs, so equal work."""
    a_plan = make_plan("streaming", 3)
    for rank in range(3):
        rank_plan = a_plan.rank_plan(rank)
        one = in_one_launch(rank_plan)
        pairs = [num_pairs(each.mask_program()) for each in (rank_plan, one)]
        assert pairs[0] == pairs[1] > 0
        alone = Alone(one, get_kernel("auto", CPU, torch.float32), CPU, torch.float32)
        alone.backward(*alone.forward())


def num_pairs(program):
    sizes = program.buffer_rows[:2]
    steps = [merged_slices(step.items, program.slices) for step in attention_steps(program)]
    return sum(count_pairs(bands, sizes).sum() for bands in steps)


def test_benchmark_rows_without_a_gpu_are_empty_with_the_reason(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    options = "--repeat 1 --cpu-tokens 512 --dense-tokens 8192 --num-batches 1 --json"
    assert kernels.run(parser.parse_args(options.split())) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    empty = [row for row in rows if row["value"] is None]
    assert {row["note"] for row in empty} == {kernels.NO_GPU}
    assert {row["figure"].split(":")[0] for row in rows if row["value"]} == {
        "ready() of a rank",
        "CPU",
    }


# --------------------------------------------------------------------------- slices, cells


def count_pairs(bands, sizes):
    """How many of the slices hold each pair."""
    pairs = np.zeros(tuple(sizes), dtype=int)
    for q0, q1, k0, k1, lo, hi, *_ in np.asarray(bands).tolist():
        offset = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
        pairs[q0:q1, k0:k1] += (offset >= lo) & (offset <= hi)
    return pairs


@pytest.mark.parametrize("strip", [16, 512])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_merged_slices_and_cells_hold_every_pair_once(monkeypatch, mask, world, strip):
    monkeypatch.setattr(cells, "STRIP", strip)
    a_plan = make_plan(mask, world)
    for rank in range(world):
        program = a_plan.rank_plan(rank).mask_program()
        for step in attention_steps(program):
            want = count_pairs(row_slices(step.items, program.slices), program.buffer_rows[:2])
            merged = merged_slices(step.items, program.slices)
            assert (count_pairs(merged, want.shape) == want).all()
            found = np.zeros_like(want)
            for cell in cells.division_cells(step.items, program.slices):
                mask_of = cell.dense_mask(CPU)
                found[cell.q, cell.k] += 1 if mask_of is None else mask_of.numpy()
            assert (found == want).all()


def test_blocks_of_one_rank_merge_into_the_mask_itself():
    batch = SequenceBatch([4096])
    a_plan = plan(batch, make_spec(), Cluster(devices_per_node=1), block_size=256)
    program = RankPlan.from_bytes(a_plan.rank_plan(0).to_bytes()).mask_program()
    [step] = attention_steps(program)
    assert len(step.items) > 100 * a_plan.num_head_groups
    assert len(merged_slices(step.items, program.slices)) == a_plan.num_head_groups
    assert all(cell.causal for cell in cells.division_cells(step.items, program.slices))


def test_cuda_graphs_are_refused_on_the_cpu():
    executor = AttentionExecutor()
    executor.prepare(make_plan("causal", 1))
    q, kv = torch.zeros(8, 4, 16), torch.zeros(8, 2, 2, 16)
    with pytest.raises(ValueError, match="q is on cpu"):
        executor.captured(q, kv)
