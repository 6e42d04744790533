"""``dcp bench kernels``: our attention beside torch's, on this machine's GPU and CPU.

Every row names the figure, what it must reach and aims at, and the value measured here, or the
reason why there is none. Ratios are of medians of interleaved runs on the same random inputs.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench import kernels_gpu as gpu
from dcp.bench import rivals
from dcp.bench.conditions import conditions
from dcp.cluster import Cluster
from dcp.planner import plan
from dcp.program import RankPlan
from dcp.runtime import AttentionExecutor, LocalWorld
from dcp.runtime.kernels.triton import place_tables
from dcp.runtime.kernels.triton_shapes import SHAPES
from dcp.runtime.prepared import PreparedPlan

PARTS = ("errors", "tune", "dense", "masks", "program", "host")
CPU_SPEC = AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=64, dtype="float32")
PLAN_TOKENS, PLAN_CLUSTER = 131072, Cluster(num_nodes=4, devices_per_node=8)
MASKS = ("causal", "streaming", "causal_blockwise", "shared_question")
NO_GPU = "no CUDA device on this machine"
Found = tuple[float | None, str]  # value and note of a row
Measure = Callable[[], Sequence[Found]]


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
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=[part for part in PARTS if part != "tune"],
        help="parts to measure; by default all but tune, which times tile shapes",
    )
    parser.add_argument(
        "--limit-seconds", type=float, default=480, help="GPU rows begin within this time"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every part in a process of its own, then a table of what must hold",
    )
    parser.add_argument("--out", type=Path, help="file for the JSON result, written row by row")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out has measured already"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write after every row. Returns the exit status."""
    if args.resume and not args.out:
        raise ValueError("--resume needs --out, the file that has the rows")
    if args.all:
        return run_apart(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    here = conditions() | {
        "device": device, "num_threads": torch.get_num_threads(), "cuda": torch.version.cuda,
    }  # fmt: skip
    held = read_rows(args.out) if args.resume else []
    done = {(row.figure, row.case): row for row in held if row.value is not None}
    rows = {(row.figure, row.case): row for row in held}
    result = {"conditions": here, "rows": [asdict(each) for each in held]}
    for row in all_rows(args, done):
        rows[row.figure, row.case] = row
        result["rows"] = [asdict(each) for each in rows.values()]
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        if not args.json:
            print(as_line(row), flush=True)
    if args.json:
        print(json.dumps(result, indent=1))
    return 0


def as_line(row: Row) -> str:
    value = "     -" if row.value is None else f"{row.value:6.3f}"
    must = f"must {row.must}" if row.must else f"aim {row.aim}" if row.aim else ""
    return f"{row.figure:42} {row.case:34} {must:12} {value}  {row.note}"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is none."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def run_apart(args: argparse.Namespace) -> int:
    """Every part in a process of its own; then what must hold. Returns the worst exit status."""
    if not args.out:
        raise ValueError("--all needs --out, the file that the parts add their rows to")
    given = [f"--{name.replace('_', '-')}" for name in ("cpu_tokens", "dense_tokens")]
    numbers = [list(map(str, getattr(args, name))) for name in ("cpu_tokens", "dense_tokens")]
    words = ["--repeat", str(args.repeat), "--mask-tokens", str(args.mask_tokens)]
    words += ["--num-batches", str(args.num_batches), "--resume", "--out", str(args.out)]
    words += ["--limit-seconds", str(args.limit_seconds)]
    words += ["--threads", str(args.threads)] if args.threads else []
    words += [word for name, some in zip(given, numbers, strict=True) for word in (name, *some)]
    status = 0
    for part in PARTS:
        command = [sys.executable, "-m", "dcp.cli", "bench", "kernels", "--only", part, *words]
        found = subprocess.run(command).returncode
        if found:
            print(f"the part {part!r} ended with status {found}", file=sys.stderr)
        status = max(status, abs(found))
    print("\n".join(summary(read_rows(args.out))))
    return status


def summary(rows: Sequence[Row]) -> list[str]:
    """One line for every figure that must hold or is aimed at: its worst and median case."""
    lines = []
    for figure in dict.fromkeys(row.figure for row in rows if row.must or row.aim):
        some = [row for row in rows if row.figure == figure]
        values = [row.value for row in some if row.value is not None]
        wanted = some[0].must or some[0].aim
        worst = max(values, default=0.0) if wanted.startswith("<") else min(values, default=0.0)
        found = f"median {median(values):.2f}, worst {worst:.2f}" if values else some[0].note
        lines.append(f"{figure:42} {wanted:8} {len(values)} of {len(some)} cases: {found}")
    return lines


def all_rows(args: argparse.Namespace, done: dict[tuple[str, str], Row]) -> Iterator[Row]:
    """Every row of the parts asked for, most important first; past the limit the GPU's stay empty.
    A row that fails says why and does not stop the others; those of ``done`` are as they were."""
    end = perf_counter() + args.limit_seconds
    for part, rows, measure in _gpu_parts(args):
        if part in args.only:
            known = [done.get((row.figure, row.case)) for row in rows]
            yield from [row for row in known if row] if all(known) else on_gpu(rows, measure, end)
    if "host" in args.only:
        yield ready_row(rank_plans())
        for tokens in args.cpu_tokens:
            for block_size in (512, 1024):
                for world in (1, 4):
                    yield cpu_row(tokens, block_size, world, args.repeat)


def _gpu_parts(args: argparse.Namespace) -> Iterator[tuple[str, list[Row], Measure]]:
    """(part, rows, what measures them)."""
    errors = [("bfloat16", 128, 1)] + [("bfloat16", d, 4) for d in (128, 64, 96, 256)]
    for dtype, head_dim, world in [*errors, ("float16", 128, 4), ("float32", 64, 4)]:
        case = f"{dtype}, head_dim {head_dim}, {world} rank{'s' * (world > 1)}"
        row = Row("error, ours / dense in the same dtype", case, "<= 2")
        yield "errors", [row], _one(partial(gpu.error_ratio, dtype, head_dim, world))
    for kernel, deterministic in (("triton", False), ("flash", True), ("flash", False)):
        case = f"bfloat16, head_dim 128, 4 ranks, {kernel}{'' if deterministic else ', any order'}"
        row = Row("error, ours / dense in the same dtype", case, "<= 2")
        measure = partial(gpu.error_ratio, "bfloat16", 128, 4, kernel=kernel)
        yield "errors", [row], _one(partial(measure, deterministic=deterministic))
    if torch.cuda.is_available() and "tune" in args.only:
        for name, shape in gpu.candidates():
            case = f"{shape.outer}x{shape.inner}, {shape.warps} warps, {shape.stages} stages"
            row = Row(f"tile of {name}: TFLOP/s", case, "")
            yield "tune", [row], _one(partial(gpu.shape_rate, name, shape, args.repeat))
    settings: gpu.Settings = []  # FlexAttention's best, picked when first needed

    def picked() -> gpu.Settings:
        settings.extend([] if settings else gpu.pick_settings(3))
        return settings

    for tokens in args.dense_tokens:
        yield "dense", _dense_rows(tokens), partial(_dense, tokens, picked, args.repeat)
    long = [long_tailed(args.mask_tokens, seed=seed) for seed in range(args.num_batches)]
    cases = [(mask, mask, [[args.mask_tokens]]) for mask in MASKS]
    cases += [("documents", "causal", long[:1]), (f"{len(long)} packed batches", "causal", long)]
    for case, mask, batches in cases:
        rows = [
            Row("mask ready: speed, ours / flex", case, ">= 1.1", ">= 1.5"),
            Row("mask's preparation timed: ours / flex", case, ">= 2"),
        ]
        repeat = args.repeat if len(batches) == 1 else 3
        yield "masks", rows, partial(_masks, mask, batches, picked, repeat)
    row = Row("rank's program / one fused launch", "32 ranks, mean", "<= 1.10", "<= 1.03")
    yield "program", [row], _one(lambda: gpu.program_ratio(rank_plans(), args.repeat))


def _one(measure: Callable[[], Found]) -> Measure:
    return lambda: [measure()]


def _dense_rows(tokens: int) -> list[Row]:
    rivals = [("speed, ours / flex", ">= 1.0", ""), ("speed, ours / cudnn", "", ">= 0.95")]
    kernels = [(f"{kernel}, TFLOP/s", "", "") for kernel in gpu.KERNELS]
    return [
        Row(f"causal {way}: {figure}", f"{tokens} tokens", must, aim)
        for way in ("forward", "backward")
        for figure, must, aim in rivals + kernels
    ]


def _dense(tokens: int, picked: Callable[[], gpu.Settings], repeat: int) -> list[Found]:
    repeat = repeat if tokens <= 32768 else min(repeat, 3)
    found = gpu.dense_ratios(tokens, picked(), repeat)
    others = ("flex", "cudnn", *gpu.KERNELS)
    ways = [(backward, other) for backward in (False, True) for other in others]
    return [found.get(way, (None, "the rival could not run")) for way in ways]


def _masks(
    mask: str, batches: list[list[int]], picked: Callable[[], gpu.Settings], repeat: int
) -> list[Found]:
    found = gpu.mask_ratios(mask, batches, picked(), repeat)
    return [found[False], found[True]]


def on_gpu(rows: list[Row], measure: Measure, end: float) -> list[Row]:
    """The rows with their measurements, or with the reason why there are none."""
    if not torch.cuda.is_available():
        return [replace(row, note=NO_GPU) for row in rows]
    if perf_counter() > end:
        return [replace(row, note="not reached within --limit-seconds") for row in rows]
    try:
        with rivals.compiling():
            found = measure()
        torch.cuda.empty_cache()
    except Exception as error:  # a device may refuse a case: its row says so
        logging.getLogger("dcp").info("a row failed", exc_info=True)
        return [replace(row, note=gpu.first_line(error)) for row in rows]
    return [replace(row, value=v, note=n) for row, (v, n) in zip(rows, found, strict=True)]


# --------------------------------------------------------------------------- host and CPU rows


def ready_row(plans: list[RankPlan]) -> Row:
    """Host time of all that a rank makes of its plan before the first launch."""
    times = []
    for rank_plan in plans * 3:
        began = perf_counter()
        prepared = PreparedPlan(rank_plan)
        for backward in (False, True):
            prepared.instructions(None, torch.device("cpu"), backward=backward)
        place_tables(rank_plan.mask_program(), torch.device("cpu"), SHAPES[90, 128, 2])
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
    cluster = Cluster(devices_per_node=world)
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

    seconds = rivals.host_medians({"ours": ours, "one_shot": one_shot}, repeat)
    note = f"{seconds['ours']:.3f} s against {seconds['one_shot']:.3f} s, forward and backward"
    return replace(row, value=seconds["ours"] / seconds["one_shot"], note=note)


# --------------------------------------------------------------------------- inputs


def long_tailed(tokens: int, *, seed: int) -> list[int]:
    """Document lengths, log-normal, that fill ``tokens``."""
    draws = np.random.default_rng(seed).lognormal(7.5, 1.2, size=4096).astype(int) + 1
    ends = np.minimum(np.cumsum(draws), tokens)
    return [int(n) for n in np.diff(np.append(0, ends)) if n]


def rank_plans() -> list[RankPlan]:
    batch = SequenceBatch(long_tailed(PLAN_TOKENS, seed=0))
    made = plan(batch, gpu.SPEC, PLAN_CLUSTER, strategy=gpu.STRATEGY)
    return [made.rank_plan(rank) for rank in range(PLAN_CLUSTER.num_ranks)]
