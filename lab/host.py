"""``python -m lab host``: what a rank's program costs the host, without kernels and messages.

Programs of 32 ranks run one after the other with a kernel that does nothing and messages that never
travel, on heads of one number: what is left is Python, torch's dispatch and small copies, which on
a GPU the host does while the device computes. Beside it, what launches something on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.bench.alone import Alone
from dcp.bench.conditions import conditions
from dcp.bench.host import PLAN_CLUSTER, PLAN_TOKENS, long_tailed
from dcp.planner import plan
from dcp.program import RankPlan
from lab.operations import NoKernel, count_operations
from lab.results import merge

SPEC = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=1, dtype="float32")
LAYERS = 32  # of the step that is spoken of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--divisions", type=int, default=10, help="of the plan")
    parser.add_argument("--repeat", type=int, default=20, help="timed passes; median kept")
    parser.add_argument("--out", type=Path, help="folder for host.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, time, print, write. Returns the exit status."""
    torch.set_num_threads(1)
    batch = SequenceBatch(long_tailed(PLAN_TOKENS, seed=0))
    made = plan(batch, SPEC, PLAN_CLUSTER, strategy="bisection", num_divisions=args.divisions)
    ranks = [made.rank_plan(rank) for rank in range(made.num_ranks)]
    rows = [row for rank in ranks for row in measure(rank, args.repeat)]
    operations = list(count_operations())
    result = {
        "conditions": conditions(),
        "rows": rows,
        "summary": summarise(rows),
        "operations": operations,
    }
    if args.out:
        merge(args.out / "host.json", f"{args.divisions} divisions", result)
    print(json.dumps(result) if args.json else as_text(result))
    return 0


def measure(rank_plan: RankPlan, repeat: int) -> Iterator[dict[str, Any]]:
    """Microseconds of one rank's passes, what noting their times adds (as where rates are learnt),
    and how many instructions of each kind they have."""
    cpu = torch.device("cpu")
    ways = {
        timed: Alone(
            rank_plan,
            NoKernel(),
            cpu,
            torch.float32,
            timed=timed,
            filled=False,  # memory is allocated, as it is where a rank runs
        )
        for timed in (False, True)
    }
    times: dict[tuple[bool, bool], list[float]] = {}
    for turn in range(repeat + 3):
        for timed, alone in ways.items():
            began = perf_counter()
            found = alone.forward()
            between = perf_counter()
            alone.backward(*found)
            ended = perf_counter()
            if turn >= 3:  # the first make tables, and warm up
                times.setdefault((False, timed), []).append(between - began)
                times.setdefault((True, timed), []).append(ended - between)
    for backward in (False, True):
        instructions = ways[False].prepared.instructions(None, cpu, backward=backward)
        plain, noted = (1e6 * median(times[backward, timed]) for timed in (False, True))
        yield {
            "rank": rank_plan.rank,
            "pass": "backward" if backward else "forward",
            "microseconds": plain,
            "noting_microseconds": noted - plain,
            "instructions": dict(Counter(type(each).__name__ for each in instructions)),
        }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per pass: the median rank's microseconds, in all and by instruction; and of 32 layers."""
    summary: dict[str, Any] = {}
    for name in ("forward", "backward"):
        some = [row for row in rows if row["pass"] == name]
        counts = [sum(row["instructions"].values()) for row in some]
        summary[name] = {
            "microseconds": median(row["microseconds"] for row in some),
            "noting_microseconds": median(row["noting_microseconds"] for row in some),
            "instructions": median(counts),
            "microseconds_each": median(
                row["microseconds"] / count for row, count in zip(some, counts, strict=True)
            ),
        }
    both, noting = (
        sum(each[name] for each in summary.values())
        for name in ("microseconds", "noting_microseconds")
    )
    return summary | {
        "layers": LAYERS,
        "milliseconds": LAYERS * both / 1e3,
        "noting_milliseconds": LAYERS * noting / 1e3,
    }


def as_text(result: dict[str, Any]) -> str:
    summary, where = result["summary"], result["conditions"]
    lines = [
        f"{name:8}: {each['microseconds']:.0f} µs of the host for {each['instructions']:.0f} "
        f"instructions, {each['microseconds_each']:.1f} µs each"
        for name in ("forward", "backward")
        for each in (summary[name],)
    ]
    lines.append(
        f"{summary['layers']} layers: {summary['milliseconds']:.1f} ms a step, and to note times "
        f"{summary['noting_milliseconds']:.2f} ms"
    )
    lines += [
        f"{each['strategy']}, {each['pass']}: {each['operations']:.0f} operations beside the "
        f"kernels, {each['megabytes']:.0f} MB read and written"
        for each in result["operations"]
    ]
    return "\n".join([*lines, f"medians of ranks; {where['processor']}, {where['date']}"])
