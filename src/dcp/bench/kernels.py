"""``dcp bench kernels``: our attention beside torch's, on this machine's GPU and CPU.

Every row names the figure, what it must reach and aims at, and the value measured here, or the
reason why there is none. Ratios are of medians of interleaved runs on the same random inputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench import rivals
from dcp.bench.alone import Alone, in_one_launch
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.masks import named_mask
from dcp.planner import plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, LocalWorld
from dcp.runtime.kernels import get_kernel
from dcp.runtime.kernels import triton as triton_kernel
from dcp.runtime.prepared import PreparedPlan

SPEC = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
CPU_SPEC = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=64, dtype="float32")
PLAN_TOKENS, PLAN_CLUSTER = 131072, Cluster(num_nodes=4, devices_per_node=8)
MASKS = ("causal", "streaming", "causal_blockwise", "shared_question")
NO_GPU = "no CUDA device on this machine"


@dataclass(frozen=True)
class Row:
    """One figure; ``value`` is None where there is none, for the reason in ``note``."""

    figure: str
    case: str
    must: str
    aim: str = ""
    value: float | None = None
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, default=7, help="timed runs per case; median kept")
    for name, default in (
        ("--cpu-tokens", [4096, 8192, 16384]),
        ("--dense-tokens", [8192, 16384, 32768, 65536, 131072]),
    ):
        parser.add_argument(name, default=default, nargs="*", type=int)
    parser.add_argument("--mask-tokens", type=int, default=32768)
    parser.add_argument("--num-batches", type=int, default=20, help="long-tailed packed batches")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's default otherwise")
    parser.add_argument("--out", type=Path, help="file for the JSON result")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write. Returns the exit status."""
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for row in all_rows(args):
        rows.append(row)
        if not args.json:
            value = "     -" if row.value is None else f"{row.value:6.3f}"
            must = f"must {row.must}" if row.must else f"aim {row.aim}"
            print(f"{row.figure:42} {row.case:30} {must:12} {value}  {row.note}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    here = conditions() | {"device": device, "num_threads": torch.get_num_threads()}
    result = {"conditions": here, "rows": [asdict(row) for row in rows]}
    if args.json:
        print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def all_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Every row of the table. One that fails says why and does not stop the others."""
    dtype = getattr(torch, SPEC.dtype)
    for tokens in args.dense_tokens:
        for backward in (False, True):
            way = "backward" if backward else "forward"
            for rival, must, aim in (("flex", ">= 1.0", ""), ("cudnn", "", ">= 0.9")):
                row = Row(f"causal {way}: speed, ours / {rival}", f"{tokens} tokens", must, aim)
                yield on_gpu(row, lambda: dense_ratio(tokens, rival, backward, args.repeat))  # noqa: B023
    cases = [(mask, mask, [args.mask_tokens]) for mask in MASKS]
    cases += [("documents", "causal", long_tailed(args.mask_tokens, seed=0))]
    for timed, must, aim in ((False, ">= 1.1", ">= 1.5"), (True, ">= 2", "")):
        what = "mask's preparation timed" if timed else "mask ready"
        for case, mask, seqlens in cases:
            row = Row(f"{what}: speed, ours / flex", case, must, aim)
            yield on_gpu(row, lambda: mask_ratio(mask, [seqlens], timed, args.repeat))  # noqa: B023
        batches = [long_tailed(args.mask_tokens, seed=seed) for seed in range(args.num_batches)]
        row = Row(f"{what}: speed, ours / flex", f"{args.num_batches} packed batches", must, aim)
        yield on_gpu(row, lambda: mask_ratio("causal", batches, timed, 3))  # noqa: B023
    plans = rank_plans()
    row = Row("rank's program / one fused launch", "32 ranks, mean", "<= 1.10", "<= 1.03")
    yield on_gpu(row, lambda: program_ratio(plans, torch.device("cuda"), dtype, args.repeat))
    yield ready_row(plans)
    for tokens in args.cpu_tokens:
        for block_size in (512, 1024):
            for world in (1, 4):
                yield cpu_row(tokens, block_size, world, args.repeat)


def on_gpu(row: Row, measure: Callable[[], tuple[float, str]]) -> Row:
    """The row with its measurement, or with the reason why there is none."""
    if not torch.cuda.is_available():
        return replace(row, note=NO_GPU)
    try:
        value, note = measure()
    except Exception as error:  # a rival may refuse a case: its row says so
        return replace(row, note=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    finally:
        torch.cuda.empty_cache()
    return replace(row, value=value, note=note)


def interleaved(works: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median seconds of each work; they take turns, so that a busy machine slows all alike."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            sync()
            began = perf_counter()
            work()
            sync()
            if turn:  # the first compiles and warms up
                times[name].append(perf_counter() - began)
    return {name: median(each) for name, each in times.items()}


# --------------------------------------------------------------------------- GPU rows


def dense_ratio(tokens: int, rival: str, backward: bool, repeat: int) -> tuple[float, str]:
    """Speed of ours over the rival's best setting, one causal sequence."""
    device = torch.device("cuda")
    if rival == "cudnn":
        attends = [rivals.fused(SDPBackend.CUDNN_ATTENTION)]
    else:
        mask = rivals.block_mask(rivals.mask_mod("causal", [tokens], device), tokens, device)
        attends = [rivals.flex(mask, setting) for setting in rivals.flex_settings(SPEC.head_dim)]
    ours = our_work("causal", [tokens], device, backward)
    theirs = [their_work(attend, tokens, device, backward) for attend in attends]
    works = {"ours": ours} | {str(n): work for n, work in enumerate(theirs)}
    seconds = interleaved(works, repeat)
    best = min(value for name, value in seconds.items() if name != "ours")
    flops = 2 * tokens**2 * SPEC.num_heads * SPEC.head_dim * (2.5 if backward else 1)
    rate = f"{flops / seconds['ours'] / 1e12:.0f} against {flops / best / 1e12:.0f} TFLOP/s"
    return best / seconds["ours"], rate


def mask_ratio(mask: str, batches: list[list[int]], timed: bool, repeat: int) -> tuple[float, str]:
    """Speed of ours over FlexAttention's, forward and backward; with ``timed``, each run also
    makes what its kernel needs of the mask: our tables, or the block mask."""
    device, ratios = torch.device("cuda"), []
    for seqlens in batches:
        tokens = sum(seqlens)
        rule = rivals.mask_mod(mask, seqlens, device)
        blocks = rivals.block_mask(rule, tokens, device)
        tensors = random_heads_first(tokens, device)

        def theirs() -> None:
            made = rivals.block_mask(rule, tokens, device) if timed else blocks  # noqa: B023
            there_and_back(rivals.flex(made, {}), *tensors)  # noqa: B023

        one_plan, executor = one_rank(mask, seqlens), AttentionExecutor()
        q, kv = random_packed(tokens, device)
        ready = executor.ready(one_plan, q)

        def ours() -> None:
            executor.prepare(executor.ready(one_plan, q) if timed else ready)  # noqa: B023
            there_and_back(executor.attention, q, kv)  # noqa: B023

        seconds = interleaved({"ours": ours, "theirs": theirs}, repeat)
        ratios.append(seconds["theirs"] / seconds["ours"])
    return median(ratios), f"lowest {min(ratios):.2f}" if len(ratios) > 1 else ""


def our_work(
    mask: str, seqlens: list[int], device: torch.device, backward: bool
) -> Callable[[], Any]:
    executor = AttentionExecutor()
    q, kv = random_packed(sum(seqlens), device)
    executor.prepare(executor.ready(one_rank(mask, seqlens), q))
    if not backward:
        return lambda: executor.attention(q.detach(), kv.detach())
    out = executor.attention(q, kv)
    return lambda: torch.autograd.grad(out, (q, kv), out.detach(), retain_graph=True)


def their_work(
    attend: Callable[..., Tensor], tokens: int, device: torch.device, backward: bool
) -> Callable[[], Any]:
    q, k, v = random_heads_first(tokens, device)
    if not backward:
        return lambda: attend(q.detach(), k.detach(), v.detach())
    out = attend(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), out.detach(), retain_graph=True)


def there_and_back(attend: Callable[..., Tensor], *tensors: Tensor) -> None:
    out = attend(*tensors)
    torch.autograd.grad(out, tensors, out.detach())


def program_ratio(
    plans: list[RankPlan], device: torch.device, dtype: torch.dtype, repeat: int
) -> tuple[float, str]:
    """Time of a rank's whole program over that of the same blocks in one launch, forward and
    backward, one rank at a time."""
    kernel, ratios = get_kernel("auto", device, dtype), []
    for rank_plan in plans:
        works: dict[str, Callable[[], Any]] = {}
        for name, each in (("program", rank_plan), ("launch", in_one_launch(rank_plan))):
            alone = Alone(each, kernel, device, dtype)
            works[name] = partial(_both_passes, alone)
        seconds = interleaved(works, repeat)
        ratios.append(seconds["program"] / seconds["launch"])
    return float(np.mean(ratios)), f"worst rank {max(ratios):.2f}"


def _both_passes(alone: Alone) -> None:
    alone.backward(*alone.forward())


# --------------------------------------------------------------------------- host and CPU rows


def ready_row(plans: list[RankPlan]) -> Row:
    """Host time of all that a rank makes of its plan before the first launch."""
    shapes = triton_kernel.SHAPES[128, 2]
    times = []
    for rank_plan in plans * 3:
        began = perf_counter()
        prepared = PreparedPlan(rank_plan)
        for backward in (False, True):
            prepared.instructions(None, torch.device("cpu"), backward=backward)
        triton_kernel.prepare(
            rank_plan.mask_program(),
            torch.device("cpu"),
            head_dim=SPEC.head_dim,
            dtype=torch.bfloat16,
            shapes=shapes,
        )
        times.append(perf_counter() - began)
    case = f"{PLAN_TOKENS} tokens, 32 ranks"
    note = "milliseconds on the host, without the copy; off the critical path with ready()"
    return Row("ready() of a rank", case, "<= 1", "", 1e3 * median(times), note)


def cpu_row(tokens: int, block_size: int, world: int, repeat: int) -> Row:
    """Time of the block-wise path (all ranks in turn) over one fused call, forward and backward."""
    row = Row(
        "CPU: block-wise / one-shot time",
        f"{tokens} tokens, block {block_size}, {world} rank{'s' * (world > 1)}",
        "<= 1.15" if world == 1 else "",
    )
    cluster = Cluster(num_nodes=1, devices_per_node=world)
    made = plan(SequenceBatch([tokens]), CPU_SPEC, cluster, strategy="magi", block_size=block_size)
    heads, kv_heads = CPU_SPEC.num_heads, CPU_SPEC.num_kv_heads
    q = torch.randn(tokens, heads, CPU_SPEC.head_dim, requires_grad=True)
    kv = torch.randn(tokens, 2, kv_heads, CPU_SPEC.head_dim, requires_grad=True)
    grad = torch.randn(q.shape)
    executor, local = AttentionExecutor(kernel="torch_cpu"), LocalWorld(made, kernel="torch_cpu")
    if world == 1:
        executor.prepare(made)

    def ours() -> None:
        out = executor.attention(q, kv) if world == 1 else local.attention(q, *kv.unbind(1))
        torch.autograd.grad(out, (q, kv), grad)

    def one_shot() -> None:
        query, key, value = (x.transpose(0, 1)[None] for x in (q, *kv.unbind(1)))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (q, kv), grad.transpose(0, 1)[None])

    seconds = interleaved({"ours": ours, "one_shot": one_shot}, repeat)
    note = f"{seconds['ours']:.3f} s against {seconds['one_shot']:.3f} s, forward and backward"
    return replace(row, value=seconds["ours"] / seconds["one_shot"], note=note)


# --------------------------------------------------------------------------- inputs


def long_tailed(tokens: int, *, seed: int) -> list[int]:
    """Document lengths, log-normal, that fill ``tokens``."""
    draws = np.random.default_rng(seed).lognormal(7.5, 1.2, size=4096).astype(int) + 1
    ends = np.minimum(np.cumsum(draws), tokens)
    return [int(n) for n in np.diff(np.append(0, ends)) if n]


def one_rank(mask: str, seqlens: list[int]) -> RankPlan:
    batch = SequenceBatch(seqlens, [named_mask(mask, n) for n in seqlens])
    return plan(batch, SPEC, Cluster(num_nodes=1, devices_per_node=1)).rank_plan(0)


def rank_plans() -> list[RankPlan]:
    made = plan(SequenceBatch(long_tailed(PLAN_TOKENS, seed=0)), SPEC, PLAN_CLUSTER)
    return [made.rank_plan(rank) for rank in range(PLAN_CLUSTER.num_ranks)]


def random_packed(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    dtype = getattr(torch, SPEC.dtype)
    q = torch.randn(tokens, SPEC.num_heads, SPEC.head_dim, device=device, dtype=dtype)
    kv = torch.randn(tokens, 2, SPEC.num_kv_heads, SPEC.head_dim, device=device, dtype=dtype)
    return q.requires_grad_(), kv.requires_grad_()


def random_heads_first(tokens: int, device: torch.device) -> list[Tensor]:
    dtype = getattr(torch, SPEC.dtype)
    heads = (SPEC.num_heads, SPEC.num_kv_heads, SPEC.num_kv_heads)
    shapes = [(1, count, tokens, SPEC.head_dim) for count in heads]
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
