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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from dcp.bench import kernels_gpu as gpu
from dcp.bench import messages, rivals, tiles
from dcp.bench.conditions import conditions
from dcp.bench.host import cpu_row, long_tailed, rank_plans, ready_row
from dcp.bench.rows import Row, as_line, read_rows, readme_table, summary

PARTS = ("errors", "messages", "tune", "dense", "masks", "program", "host")
MASKS = ("causal", "streaming", "causal_blockwise", "shared_question")
NO_GPU = "no CUDA device on this machine"
Found = tuple[float | None, str]  # value and note of a row
Measure = Callable[[], Sequence[Found]]
# What a part is measured with: --all hands these on to the process of each.
OPTIONS: dict[str, dict[str, Any]] = {
    "--repeat": {"type": int, "default": 7, "help": "timed runs per case; median kept"},
    "--cpu-tokens": {"type": int, "nargs": "*", "default": [4096, 8192, 16384]},
    "--dense-tokens": {"type": int, "nargs": "*", "default": [8192 << n for n in range(5)]},
    "--mask-tokens": {"type": int, "default": 32768},
    "--num-batches": {"type": int, "default": 20, "help": "long-tailed packed batches"},
    "--threads": {"type": int, "help": "CPU threads; torch's default otherwise"},
    "--limit-seconds": {
        "type": float, "default": 480.0, "help": "GPU rows of a part begin within this time",
    },
    "--out": {"type": Path, "help": "file for the JSON result, written row by row"},
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, keywords in OPTIONS.items():
        parser.add_argument(name, **keywords)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=[part for part in PARTS if part != "tune"],
        help="parts to measure; by default all but tune, which times tile shapes",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every part in a process of its own, then what must hold and what the README lacks",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out has measured already"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def words_of(args: argparse.Namespace) -> list[str]:
    """The :data:`OPTIONS` as they were given, for another process."""
    words = []
    for name in OPTIONS:
        value = getattr(args, name.removeprefix("--").replace("-", "_"))
        if value is not None:
            words += [name, *map(str, value if isinstance(value, list) else [value])]
    return words


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


def run_apart(args: argparse.Namespace) -> int:
    """Every part in a process of its own; then what must hold, and which rows of the README are
    filled. Returns the worst exit status."""
    if not args.out:
        raise ValueError("--all needs --out, the file that the parts add their rows to")
    status = 0
    for number, part in enumerate(PARTS):
        command = [sys.executable, "-m", "dcp.cli", "bench", "kernels", "--only", part]
        command += ["--resume"] if args.resume or number else []
        found = subprocess.run([*command, *words_of(args)]).returncode
        if found:
            print(f"the part {part!r} ended with status {found}", file=sys.stderr)
        status = max(status, abs(found))
    rows = read_rows(args.out)
    print("\n".join([*summary(rows), "", *readme_table(rows)]))
    return status


def all_rows(args: argparse.Namespace, done: dict[tuple[str, str], Row]) -> Iterator[Row]:
    """Every row of the parts asked for, most important first; past the limit the GPU's stay empty.
    A row that fails says why and does not stop the others; those of ``done`` are as they were."""
    end = perf_counter() + args.limit_seconds
    for part, rows, measure in _gpu_parts(args):
        if part in args.only:
            known = [done.get((row.figure, row.case)) for row in rows]
            yield from [row for row in known if row] if all(known) else on_gpu(rows, measure, end)
    if "messages" in args.only:
        yield gloo_row(done)
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
    row = Row("NCCL, one rank: time / without a group", "1 rank on cuda", "")
    yield "messages", [row], _one(partial(messages.nccl_ratio, args.repeat))
    if torch.cuda.is_available() and "tune" in args.only:
        for name, shape in tiles.candidates():
            case = f"{shape.outer}x{shape.inner}, {shape.warps} warps, {shape.stages} stages"
            row = Row(f"tile of {name}: TFLOP/s", case, "")
            yield "tune", [row], _one(partial(tiles.shape_rate, name, shape, args.repeat))
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


def gloo_row(done: dict[tuple[str, str], Row]) -> Row:
    """Two processes on this machine's GPU, or where there is none on its CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = Row("two processes by gloo: error / dense", f"2 ranks on {device}", "<= 2")
    if known := done.get((row.figure, row.case)):
        return known
    try:
        value, note = messages.gloo_error(device)
    except Exception as error:  # its row says so
        return replace(row, note=gpu.first_line(error))
    return replace(row, value=value, note=note)


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
