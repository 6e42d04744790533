"""Figures 16 to 19 and ``python -m lab dryrun``: plans of many iterations, nothing run.

8 nodes of 8 A100 in groups of 4 (tensor parallel), so 16 ranks; 65,536 tokens a batch, 8 query
heads and 2 KV heads a device. Every iteration is a row: volume of the finished plan between nodes,
its balance, the mask's own sparsity in that batch, and the wall time from lengths to plan, masks
and blocks included.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

from dcp.batch import SequenceBatch
from dcp.cluster import Cluster
from dcp.masks import named_mask
from dcp.planner import Planner
from lab.paper.campaign import Task
from lab.paper.end_to_end import sliced_cluster
from lab.paper.lengths import DATASETS
from lab.paper.rows import Row, mean_by
from lab.paper.workbench import MASKS, Workbench
from lab.planner import SPEC

TOKENS = 65536
TENSOR_PARALLEL = 4
ITERATIONS = 200
BLOCK_SIZES = (512, 1024, 2048, 4096)
DEFAULT_BLOCK = 1024
TOLERANCE = 0.03
STRATEGY = "bisection"  # what auto keeps for most batches
OTHERS = ("hypergraph", "auto")  # beside it in Figures 16 and 17, over fewer iterations
STATIC = "a2a_p2p"  # the static baseline's volume, once a batch
SWEPT_MASKS = {  # mask, parameter, its values: as published
    "streaming": ("window", (512, 1024, 2048, 4096, 8192)),
    "shared_question": ("num_answers", (1, 2, 4, 8, 16)),
    "causal_blockwise": ("local_blocks", (1, 2, 4, 8, 16)),
}
TOLERANCES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8)
FIGURES = ("inter_node_mb", "planning_seconds", "sparsity", "compute_balance", "token_balance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/artifact"), help="output folder")
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, help="batches a cell (default: %(default)s)"
    )
    parser.add_argument("--block-sizes", type=int, nargs="+", default=BLOCK_SIZES, metavar="N")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS, metavar="NAME")
    parser.add_argument("--data", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--strategy", default=STRATEGY, help="what plans (default: %(default)s)")
    parser.add_argument("--files", type=Path, help="folder with local lengths or documents")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")


def run(args: argparse.Namespace) -> int:
    """Run what is missing and print the means. Returns the exit status."""
    if args.iterations < 1:
        raise ValueError(f"--iterations must be 1 or more, got {args.iterations}")
    bench = Workbench(
        args.out, effort=args.iterations / ITERATIONS, files=args.files, workers=args.workers
    )
    print(as_text(_block_rows(bench, args), "block_size"))
    print(as_text(sparsity_rows(bench, data=args.data[:1], strategy=args.strategy), "parameter"))
    print(as_text(balance_rows(bench, data=args.data, strategy=args.strategy), "tolerance"))
    print(f"every iteration is a row of {bench.data}/dryrun_*.csv")
    return 0


def _block_rows(bench: Workbench, args: argparse.Namespace) -> list[Row]:
    return block_rows(
        bench,
        data=args.data,
        masks=args.masks,
        block_sizes=args.block_sizes,
        strategy=args.strategy,
    )


# --------------------------------------------------------------------------- experiments


def block_rows(
    bench: Workbench,
    *,
    data: Sequence[str] = tuple(DATASETS),
    masks: Sequence[str] = MASKS,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    strategy: str = STRATEGY,
) -> list[Row]:
    """Block sizes x masks, 200 iterations each; other strategies and the static one beside."""
    tasks: list[Task] = []
    for batch in _batches(bench, data, ITERATIONS):
        tasks.append(_task(batch, STATIC, "causal", block_size=0))
        tasks += [
            _task(batch, strategy, mask, block_size=size) for mask in masks for size in block_sizes
        ]
    for batch in _batches(bench, data[:1], ITERATIONS // 10):
        tasks += [
            _task(batch, other, mask, block_size=size)
            for other in OTHERS
            if other != strategy
            for mask in masks
            for size in block_sizes
        ]
    return bench.run("dryrun_blocks", tasks, measure)


def sparsity_rows(
    bench: Workbench, *, data: Sequence[str] = ("longalign",), strategy: str = STRATEGY
) -> list[Row]:
    """Volume over the sparsity of masks whose parameter is swept."""
    tasks = [
        _task(batch, strategy, mask, parameter=name, value=value)
        for batch in _batches(bench, data, ITERATIONS // 4)
        for mask, (name, values) in SWEPT_MASKS.items()
        for value in values
    ]
    return bench.run("dryrun_sparsity", tasks, measure)


def balance_rows(
    bench: Workbench, *, data: Sequence[str] = tuple(DATASETS), strategy: str = STRATEGY
) -> list[Row]:
    """Volume over the imbalance that the planner is allowed to leave."""
    tasks = [
        _task(batch, strategy, "causal", tolerance=tolerance)
        for batch in _batches(bench, data, ITERATIONS // 2)
        for tolerance in TOLERANCES
    ]
    return bench.run("dryrun_balance", tasks, measure)


def _batches(
    bench: Workbench, data: Sequence[str], iterations: int
) -> Iterator[tuple[Row, list[int]]]:
    """The batches of every data set with the columns that name them."""
    count = bench.count(iterations)
    for name in data:
        for index, seqlens in enumerate(bench.batches(name, tokens=TOKENS, count=count)):
            yield {"lengths": bench.label(name), "data": name, "iteration": index}, seqlens


def _task(
    batch: tuple[Row, list[int]],
    strategy: str,
    mask: str,
    *,
    block_size: int = DEFAULT_BLOCK,
    tolerance: float = TOLERANCE,
    parameter: str = "",
    value: int = 0,
) -> Task:
    settings = {
        "strategy": strategy,
        "mask": mask,
        "block_size": block_size,
        "tolerance": tolerance,
        "parameter": parameter,
        "value": value,
    }
    return batch[0] | settings, batch[1]


def measure(case: Row, seqlens: list[int]) -> Row:
    """Plan one batch; a ``block_size`` of 0 leaves it to the planner."""
    full = Cluster.preset("a100", num_nodes=8, devices_per_node=8)
    planner = Planner(
        SPEC,
        sliced_cluster(full, TENSOR_PARALLEL),
        strategy=case["strategy"],
        block_size=case["block_size"] or "auto",
        tolerance=case["tolerance"],
    )
    planner.plan(SequenceBatch([1]))  # what is compiled or loaded at first use is not planning
    started = perf_counter()
    parameters = {case["parameter"]: case["value"]} if case["parameter"] else {}
    masks = {n: named_mask(case["mask"], n, **parameters) for n in set(seqlens)}
    batch = SequenceBatch(seqlens, [masks[n] for n in seqlens])
    stats = planner.plan(batch).stats
    seconds = perf_counter() - started
    return {
        "chosen": stats.strategy,
        "documents": len(seqlens),
        "tokens": batch.num_tokens,
        "inter_node_mb": stats.inter_node_bytes / 1e6,
        "planning_seconds": seconds,
        "sparsity": 2 * batch.area() / max(sum(n * (n + 1) for n in seqlens), 1),
        "compute_balance": stats.compute_balance,
        "token_balance": stats.token_balance,
    }


def as_text(rows: list[Row], along: str) -> str:
    """Means over iterations as a table."""
    keys = [
        "data",
        "strategy",
        "mask",
        *(["parameter", "value"] if along == "parameter" else [along]),
    ]
    lines = ["".join(f"{key:>17}" for key in (*keys, "n", *FIGURES))]
    for row in mean_by(rows, keys, FIGURES):
        named = "".join(f"{row[key]!s:>17}" for key in (*keys, "batches"))
        lines.append(named + "".join(f"{row[figure]:17.3f}" for figure in FIGURES))
    return "\n".join(lines) + "\n"
