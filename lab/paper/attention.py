"""The attention operator on real ranks: times and, from the executed trace, where they go.

A rank of ``python -m lab.paper.attention``, either one of a few local gloo processes that
:func:`measure_local` starts, or, on a cluster, one that torchrun starts::

    torchrun --nnodes 4 --nproc-per-node 8 … -m lab.paper.attention --out DIR --tokens 131072

The documents keep the data sets' shape at any ``--tokens``: lengths, and the masks' windows and
blocks with them, shrink by as much as the batch does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from dcp.batch import DTYPE_BYTES, AttentionSpec, SequenceBatch
from dcp.launch.group import choose_device, joined_group
from dcp.launch.ranks import run_ranks
from dcp.planner import plan
from dcp.runtime import AttentionExecutor
from dcp.simulate import COMPUTE, TRANSFER, Span
from dcp.train.planned import make_cluster
from lab.paper.campaign import Task
from lab.paper.micro import TOKENS
from lab.paper.rows import Row, write_rows
from lab.paper.workbench import MASKS, SCALES, Workbench
from lab.published import PUBLISHED, SYSTEMS

ROWS = "attention_measured"
FIGURES = ("forward_ms", "backward_ms", "others", "attention_alone", "overlapped", "exposed")


@dataclass(frozen=True)
class LocalSize:
    """A run that two cores finish in a minute or two."""

    processes: int = 4
    tokens: int = 4096
    batches: int = 2
    repeat: int = 2
    head_dim: int = 64
    scales: tuple[float, ...] = SCALES


def measure_local(bench: Workbench, size: LocalSize) -> None:
    """Measure on local gloo processes, two of which make a node; rows go to the data folder.

    Raises ``JobFailed`` where a rank fails.
    """
    options = asdict(size)
    processes = options.pop("processes")
    scales = [str(scale) for scale in options.pop("scales")]
    words = ["--out", str(bench.out), "--scales", *scales]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    if bench.files is not None:
        words += ["--files", str(bench.files)]
    _ = bench.lengths  # counted once, before all ranks ask for them
    run_ranks(
        "lab.paper.attention:run_rank",
        {"words": words},
        num_processes=processes,
        ranks_per_node=min(2, processes),
    )


# --------------------------------------------------------------------------- one rank


def run_rank(job: dict[str, Any]) -> None:
    """One of the local processes: :func:`main` with the job's words."""
    main(job["words"], device_name="cpu")


def main(words: list[str] | None = None, *, device_name: str = "auto") -> None:
    """Measure every case; the first rank writes the rows."""
    args = _arguments(words)
    torch.set_num_threads(1)
    device = choose_device(device_name)
    with joined_group(device, timeout_seconds=300):
        dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        spec = AttentionSpec(
            num_heads=args.heads, num_kv_heads=args.kv_heads, head_dim=args.head_dim, dtype=dtype
        )
        bench = Workbench(args.out, files=args.files)
        ran_on = {"tokens": args.tokens, "ranks": dist.get_world_size(), "device": device.type}
        rows = [
            settings | ran_on | measure(settings | ran_on, seqlens, spec, device, args.repeat)
            for settings, seqlens in cases(bench, args.tokens, args.batches, args.scales)
        ]
        if dist.get_rank() == 0:
            write_rows(bench.data / f"{ROWS}.csv", rows)


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab.paper.attention")
    parser.add_argument("--out", type=Path, required=True, help="output folder of lab figures")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a batch")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--repeat", type=int, default=5, help="timed runs; the best kept")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPE_BYTES, help="default: bfloat16 on GPUs")
    parser.add_argument("--files", type=Path, help="folder with local lengths or documents")
    return parser.parse_args(words)


def cases(bench: Workbench, tokens: int, batches: int, scales: Sequence[float]) -> list[Task]:
    """Every system causal, TE and ours under the sparse masks; batches of ``tokens`` tokens."""
    shrink = tokens / TOKENS
    tasks: list[Task] = []
    for data in PUBLISHED:
        for scale in scales:
            drawn = bench.batches(data, tokens=tokens, count=batches, scale=scale * shrink)
            for index, seqlens in enumerate(drawn):
                named = {"lengths": bench.label(data), "data": data, "scale": scale, "batch": index}
                tasks += [
                    (named | {"mask": mask, "system": system}, seqlens)
                    for mask in MASKS
                    for system in (SYSTEMS if mask == "causal" else ("TE", "DCP"))
                ]
    return tasks


def shrunk_mask(mask: str, tokens: int) -> str:
    """A benchmark mask whose windows and blocks are as short as batches of ``tokens`` tokens."""
    shrink = tokens / TOKENS
    parameters = {
        "streaming": {"sink": 64, "window": 4096},
        "causal_blockwise": {"block": 256},
    }.get(mask, {})
    shown = (f"{name}={max(round(value * shrink), 1)}" for name, value in parameters.items())
    return f"{mask}:{','.join(shown)}" if parameters else mask


def measure(
    case: Row, seqlens: list[int], spec: AttentionSpec, device: torch.device, repeat: int
) -> Row:
    """The slowest rank's milliseconds and the mean rank's parts of them, of the fastest run."""
    executor = AttentionExecutor()
    cluster = make_cluster("auto", executor.num_ranks, device)
    batch = SequenceBatch(seqlens, shrunk_mask(case["mask"], case["tokens"]))
    made = plan(batch, spec, cluster, strategy=SYSTEMS[case["system"]])
    like = torch.empty(0, dtype=getattr(torch, spec.dtype), device=device)
    executor.prepare(executor.ready(made, like))
    runs = [_once(executor, like) for _ in range(repeat + 1)][1:]  # the first one warms up
    mine = torch.tensor(runs, dtype=torch.float64, device=device)
    every = [torch.empty_like(mine) for _ in range(executor.num_ranks)]
    dist.all_gather(every, mine)
    found = torch.stack(every).cpu()  # [ranks, repeat, figures]
    slowest, parts = found[..., :2].amax(dim=0), found[..., 2:].mean(dim=0)
    best = int(slowest.sum(dim=1).argmin())
    values = [*(slowest[best] * 1e3).tolist(), *parts[best].tolist()]
    return dict(zip(FIGURES, values, strict=True)) | {"strategy": made.stats.strategy}


def _once(executor: AttentionExecutor, like: torch.Tensor) -> list[float]:
    """Forward and backward seconds of this rank, then the parts of both, as FIGURES names them."""
    mine = executor.plan
    assert mine is not None
    spec, local = mine.spec, mine.num_local_tokens
    q = torch.randn(local, spec.num_heads, spec.head_dim).to(like).requires_grad_()
    kv = torch.randn(local, 2, spec.num_kv_heads, spec.head_dim).to(like).requires_grad_()
    spans: list[Span] = []
    executor.spans = spans
    forward, out = _timed(lambda: executor.attention(q, kv), like.device)
    backward, _ = _timed(lambda: out.backward(torch.ones_like(out)), like.device)
    return [forward, backward, *parts(spans, forward + backward)]


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds from when all ranks are ready until this one is done."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started, result


def parts(spans: Iterable[Span], seconds: float) -> tuple[float, float, float, float]:
    """Seconds of other work, of attention alone, of attention under a transfer, and of waiting.

    Args:
        spans: one rank's executed instructions.
        seconds: how long all of them took, from begin to end.
    """
    spans = list(spans)
    moving = _merged([(s.start, s.end) for s in spans if s.track == TRANSFER])
    attention = [s for s in spans if s.track == COMPUTE and "attention" in s.name]
    total = sum(s.end - s.start for s in attention)
    both = sum(
        max(min(s.end, end) - max(s.start, start), 0.0) for s in attention for start, end in moving
    )
    other = sum(s.end - s.start for s in spans if s.track == COMPUTE) - total
    return other, total - both, both, max(seconds - total - other, 0.0)


def _merged(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, as disjoint ones."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


if __name__ == "__main__":
    main()
