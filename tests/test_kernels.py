"""Kernels and their options, slices merged and cut into cells; dense attention is the reference."""

import argparse
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from dcp import Cluster, LocalWorld, SequenceBatch, plan
from dcp.bench import kernels
from dcp.bench.alone import Alone, _random, in_one_launch
from dcp.bench.rows import README, Row, readme_table
from dcp.cli import main
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, DCPAttention, cells
from dcp.runtime.division import attention_steps, merged_slices, row_slices
from dcp.runtime.kernels import KERNELS, Options, get_kernel
from tests.kernel_cases import count_pairs, errors, is_close, make_plan, make_spec
from tests.masks_cases import MASKS

CPU = torch.device("cpu")


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
    with pytest.raises(ValueError, match="is for 2 ranks, the executor's group has 1"):
        executor.ready(make_plan("causal", 2).rank_plan(0), like)


@pytest.mark.parametrize("kernel", ["triton", "torch_cpu"])
def test_every_table_made_ahead_is_known_to_the_stream_that_uses_it(monkeypatch, kernel):
    from dcp.runtime import prepared, rows
    from dcp.runtime.kernels import triton

    made = []

    def copied(array, device):
        made.append(torch.from_numpy(array))
        return made[-1]

    monkeypatch.setattr(rows, "MANY_RUNS", 0)
    for module in (rows, triton):
        monkeypatch.setattr(module, "copy_to_device", copied)
    monkeypatch.setattr(triton.TritonKernel, "refusal", lambda *_: None)
    executor = AttentionExecutor(kernel=kernel)
    ready = executor.ready(make_plan("streaming", 1), torch.empty(0))
    found = {x.untyped_storage().data_ptr() for x in prepared.tensors_in(vars(ready))}
    assert found >= {x.untyped_storage().data_ptr() for x in made}
    assert bool(made) == (kernel == "triton")


# --------------------------------------------------------------------------- what is refused


def test_what_cannot_be_honoured_is_refused_by_name():
    a_plan = make_plan("causal", 1)
    executor = AttentionExecutor()
    executor.prepare(a_plan)
    q, kv = torch.zeros(a_plan.num_tokens, 4, 16), torch.zeros(a_plan.num_tokens, 2, 2, 16)
    with pytest.raises(ValueError, match=r"dropout=0\.1 of attention weights is not offered"):
        DCPAttention.apply(executor, q, kv, dropout=0.1)
    with pytest.raises(ValueError, match=r"softcap must be positive and finite.* got 0"):
        DCPAttention.apply(executor, q, kv, softcap=0.0)
    with pytest.raises(ValueError, match=r"sink has shape \(3,\), the plan needs \(4,\)"):
        DCPAttention.apply(executor, q, kv, sink=torch.zeros(3))
    with pytest.raises(TypeError, match="alibi"):
        DCPAttention.apply(executor, q, kv, alibi=True)


def test_auto_picks_by_device_and_option_and_says_which(caplog):
    get_kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger="dcp"):
        assert get_kernel("auto", CPU, torch.float32, Options(16, 1.0)).name == "torch_cpu"
    assert "kernel torch_cpu for torch.float32 on cpu" in caplog.text
    capped = Options(16, 1.0, softcap=3.0)
    assert get_kernel("auto", CPU, torch.float32, capped).name == "dense"
    with pytest.raises(ValueError, match=r"no kernel for torch\.int32 on cpu") as refusal:
        get_kernel("auto", CPU, torch.int32, capped)
    assert all(f"{name}:" in str(refusal.value) for name in KERNELS)


def test_auto_falls_through_to_what_serves_wide_heads(monkeypatch):
    """As on a GPU: the CPU's kernel refuses, and Triton's serves, but not so wide a head."""
    from dcp.runtime.kernels import torch_cpu, triton

    monkeypatch.setattr(torch_cpu.KERNEL, "refusal", lambda *_: "it runs on the CPU only")
    monkeypatch.setattr(triton, "_interprets", lambda: True)
    monkeypatch.setattr(triton.KERNEL, "by_name_on", ())
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    get_kernel.cache_clear()
    try:
        chosen = [
            get_kernel("auto", CPU, torch.bfloat16, Options(head_dim, 1.0)).name
            for head_dim in (256, 257)
        ]
        assert chosen == ["triton", "dense"]
        with pytest.raises(ValueError, match="triton: it serves head_dim up to 256, not 512"):
            get_kernel("triton", CPU, torch.bfloat16, Options(512, 1.0))
    finally:
        get_kernel.cache_clear()


# --------------------------------------------------------------------------- the benchmark


def test_a_program_alone_and_its_blocks_in_one_launch():
    """What the benchmark compares: equal pairs, so equal work."""
    a_plan = make_plan("streaming", 3)
    for rank in range(3):
        rank_plan = a_plan.rank_plan(rank)
        one = in_one_launch(rank_plan)
        pairs = [num_pairs(each.mask_program()) for each in (rank_plan, one)]
        assert pairs[0] == pairs[1] > 0
        alone = Alone(
            one, get_kernel("auto", CPU, torch.float32, Options(16, 1.0)), CPU, torch.float32
        )
        alone.backward(*alone.forward())


@pytest.mark.parametrize("kernel", ["torch_cpu", "dense"])
def test_no_row_of_the_comparison_is_uninitialised(monkeypatch, kernel):
    """Memory that is not initialised is NaN here, and reaches no result."""
    empty = torch.empty

    def poisoned(*args, **options):
        found = empty(*args, **options)
        return found.fill_(torch.nan if found.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)
    a_plan = make_plan("streaming", 3)
    kernel = get_kernel(kernel, CPU, torch.float32, Options(16, 1.0))
    for rank in range(3):
        for each in (a_plan.rank_plan(rank), in_one_launch(a_plan.rank_plan(rank))):
            alone = Alone(each, kernel, CPU, torch.float32)
            for _ in range(3):
                out, lse = alone.forward()
                alone.backward(out, lse)
                assert out.isfinite().all()
            held = [x for way in alone.noise.values() for x in way.held]
            assert not any(x.isnan().any() for x in held)
            messages = [x.view(torch.float32) for x in held if x.dtype == torch.uint8]
            assert all(x.isfinite().all() and x.std() > 0.1 for x in messages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bytes_of_messages_are_numbers_in_any_dtype(dtype):
    assert _random([8000], torch.uint8, CPU).view(dtype).isfinite().all()


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
        "two processes by gloo",
        "CPU",
    }
    [gloo] = [row for row in rows if row["figure"].startswith("two processes")]
    assert gloo["case"] == "2 ranks on cpu"
    assert 0 < gloo["value"] <= 2


def test_all_parts_apart_and_what_must_hold(tmp_path, monkeypatch, capfd):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(kernels, "PARTS", ("errors", "messages", "host"))
    out = tmp_path / "kernels.json"
    words = f"bench kernels --all --repeat 1 --cpu-tokens 512 --out {out}"
    assert main(words.split()) == 0
    rows = json.loads(out.read_text())["rows"]
    ours = next(row for row in rows if row["figure"] == "ready() of a rank")
    shown = capfd.readouterr().out
    assert (
        f"error, ours / dense in the same dtype      <= 2     0 of 10 cases: {kernels.NO_GPU}"
        in shown
    )
    assert f"ready() of a rank{' ' * 26}<= 1     1 of 1 cases: median {ours['value']:.2f}" in shown
    table = shown[shown.index("README, GPU figures") :].splitlines()
    assert all(len(line) <= 110 for line in table)
    fate = {line[:36].rstrip(): line.split("  ")[-1] for line in table[1:]}
    assert fate["errors, beside dense attention"] == f"no: {kernels.NO_GPU}"
    assert fate["two processes on one device"] == "no: measured on the CPU"
    assert fate["dense causal, beside cuDNN"] == "no: not run"
    assert list(fate) == list(README)
    conditions = json.loads(out.read_text())["conditions"]
    assert {"cuda", "driver"} <= set(conditions)
    assert {"torch", "triton"} <= set(conditions["versions"])
    assert main([*words.split(), "--resume"]) == 0
    again = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in again] == [row["case"] for row in rows]


def test_a_row_of_the_readme_is_filled_by_all_of_its_cases():
    def rows(*values):
        figure = "rank's program / one fused launch"
        return [Row(figure, f"case {n}", "<= 1.10", value=v) for n, v in enumerate(values)]

    def fate(rows):
        [line] = [x for x in readme_table(rows) if x.startswith("a rank's program beside")]
        return line

    assert fate(rows(1.02, 1.08, 1.03)).split()[-5:] == ["<=", "1.10", "1.03", "1.08", "yes"]
    assert fate(rows(1.02, None)).endswith("no: ")


def test_options_are_handed_on_to_the_parts():
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    words = [
        "--repeat",
        "3",
        "--cpu-tokens",
        "5",
        "6",
        "--dense-tokens",
        "--threads",
        "2",
        "--out",
        "x.json",
    ]
    given = parser.parse_args(words)
    again = parser.parse_args(kernels.words_of(given))
    assert again == given
    assert again.dense_tokens == []


def test_a_row_that_is_there_is_not_measured_again(monkeypatch):
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    args = parser.parse_args(["--only", "errors"])
    [first, *others] = kernels.all_rows(args, {})
    assert first.value is None
    kept = kernels.replace(first, value=1.5)
    [again, *rest] = kernels.all_rows(args, {(first.figure, first.case): kept})
    assert again == kept
    assert rest == others


@pytest.mark.parametrize("word", ["--all", "--resume"])
def test_parts_apart_need_a_file(word, capsys):
    assert main(["bench", "kernels", word]) == 2
    assert f"{word} needs --out" in capsys.readouterr().err


def test_the_benchmark_needs_no_more_than_torch_numba_and_numpy():
    """In a fresh process that finds no partitioner and no transformers."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('mtkahypar', 'transformers', 'ray', 'scipy')))\n"
        "import torch\n"
        "from dcp.cli import main\n"
        "from dcp.bench import kernels, kernels_gpu as gpu\n"
        "assert len(kernels.rank_plans()) == 32\n"
        "assert gpu.one_rank('streaming', [700, 20]).num_local_tokens == 720\n"
        "main('bench kernels --only host --cpu-tokens 256 --repeat 1 --json'.split())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 5
    assert all(row["value"] for row in rows)


# --------------------------------------------------------------------------- slices, cells


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
