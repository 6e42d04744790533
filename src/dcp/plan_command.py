"""``dcp plan`` and ``dcp compare``: batches planned, and their figures for people and as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from dcp.batch import DTYPE_BYTES, AttentionSpec, SequenceBatch
from dcp.checks import read_json, shown
from dcp.cluster import PRESETS, Cluster
from dcp.launch.progress import working
from dcp.masks import NAMED_MASKS
from dcp.placement import StrategyError, strategy_names
from dcp.planner import plan
from dcp.plans import Plan

WIDTH = 80  # characters of a line for people
_BATCH_KEYS = ("name", "seqlens", "nodes", "devices_per_node")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Options of ``dcp plan``."""
    add_arguments(parser)
    written = parser.add_argument_group("files to write")
    written.add_argument("--save", metavar="FILE", help="the plan, for dcp.Plan.load")
    written.add_argument("--report", metavar="HTML", help="a page that shows the plan")
    written.add_argument("--trace", metavar="JSON", help="the simulated run, for Perfetto")
    parser.set_defaults(run=run_plan)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Options of ``dcp compare``."""
    add_arguments(parser, compare=True)
    parser.set_defaults(run=run_compare)


def add_arguments(parser: argparse.ArgumentParser, *, compare: bool = False) -> None:
    """What is planned, and for what."""
    group = parser.add_argument_group("the batch")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--seqlens", type=_integers, metavar="N,N,…", help="tokens of each sequence"
    )
    source.add_argument(
        "--batches",
        metavar="FILE",
        help="JSON list of batches: name, seqlens and, if they differ, nodes and devices_per_node",
    )
    group.add_argument(
        "--mask",
        default="causal",
        metavar="NAME[:KEY=VALUE,…]",
        help=f"{', '.join(NAMED_MASKS)}; such as streaming:sink=64,window=4096",
    )
    group = parser.add_argument_group("the machines")
    group.add_argument("--nodes", type=int, metavar="N", help="machines (default: 1)")
    group.add_argument(
        "--devices-per-node",
        type=_integers,
        metavar="N",
        help="devices of every node, or N,N,… for each (default: 8)",
    )
    group.add_argument(
        "--cluster",
        default="a100",
        metavar="NAME|FILE",
        help=f"rates of devices and links: {', '.join(PRESETS)} or a cluster file",
    )
    group = parser.add_argument_group("the attention")
    group.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    group.add_argument("--kv-heads", type=int, metavar="N", help="KV heads (default: --heads)")
    group.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    group.add_argument("--value-dim", type=int, help="default: --head-dim")
    group.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPE_BYTES)}")
    group = parser.add_argument_group("the search")
    if not compare:
        group.add_argument(
            "--strategy",
            default="auto",
            metavar="NAME",
            help=f"auto, {', '.join(strategy_names())}",
        )
    group.add_argument(
        "--block-size", default="auto", type=_auto_or_integer, help="tokens of a block, or auto"
    )
    group.add_argument(
        "--num-divisions", type=int, metavar="N", help="divisions of attention (default: chosen)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the planner's search")
    group = parser.add_argument_group("what is printed")
    group.add_argument("--json", action="store_true", help="JSON, one line per batch")
    if compare:
        group.add_argument("--wide", action="store_true", help="all figures, in a wide table")


@dataclass(frozen=True)
class _Job:
    """One batch to plan, and the machine to plan it for."""

    name: str | None
    batch: SequenceBatch
    cluster: Cluster


def run_plan(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    jobs, spec = _jobs(args), _spec(args)
    if len(jobs) > 1 and (args.save or args.report or args.trace):
        raise ValueError(
            f"--save, --report and --trace take one batch, {args.batches} has {len(jobs)}"
        )
    for number, job in enumerate(jobs, start=1):
        with working(f"planning {number}/{len(jobs)}"):
            made = _plan(args, job, spec, args.strategy)
        figures = made.stats.to_json()
        if args.json:
            print(json.dumps(_named(job, figures)), flush=True)
        else:
            print(_heading(job, args.mask), _figures(figures), sep="\n", end="\n\n")
        for path in _write(made, args):
            print(f"written to {path}", file=sys.stderr if args.json else sys.stdout)
    return 0


def _write(made: Plan, args: argparse.Namespace) -> Iterator[str]:
    """Write what was asked for; yields each file."""
    if args.save:
        made.save(args.save)
        yield args.save
    if args.report:
        from dcp.report.plan_page import write_plan_page

        write_plan_page(made, args.report)
        yield args.report
    if args.trace:
        from dcp.report.trace import simulated_spans, write_trace

        write_trace(simulated_spans(made), args.trace)
        yield args.trace


def run_compare(args: argparse.Namespace) -> int:
    """Plan with every strategy, best first."""
    spec = _spec(args)
    for job in _jobs(args):
        rows, chosen = [], ""
        names = ["auto", *strategy_names()]
        for number, strategy in enumerate(names, start=1):
            try:
                with working(f"planning {number}/{len(names)}: {strategy}"):
                    row = _plan(args, job, spec, strategy).stats.to_json()
            except StrategyError as error:  # this one cannot serve the case; the others may
                row = {"strategy": strategy, "error": str(error)}
            if strategy == "auto":
                chosen = row["strategy"]
                row = {**row, "strategy": f"auto ({chosen})"}
            rows.append(_named(job, row))
        rows.sort(key=lambda row: row.get("layer_seconds", float("inf")))
        if args.json:
            print(json.dumps(rows), flush=True)
        else:
            print(_heading(job, args.mask), _table(rows, wide=args.wide), sep="\n", end="\n\n")
    return 0


def _plan(args: argparse.Namespace, job: _Job, spec: AttentionSpec, strategy: str) -> Plan:
    return plan(
        job.batch,
        spec,
        job.cluster,
        strategy=strategy,
        block_size=args.block_size,
        seed=args.seed,
        num_divisions=args.num_divisions,
    )


def _spec(args: argparse.Namespace) -> AttentionSpec:
    return AttentionSpec(
        num_heads=args.heads,
        num_kv_heads=args.heads if args.kv_heads is None else args.kv_heads,
        head_dim=args.head_dim,
        value_dim=args.value_dim,
        dtype=args.dtype,
    )


def _jobs(args: argparse.Namespace) -> list[_Job]:
    def job(title: str | None, seqlens: list[int], nodes: Any, devices: Any) -> _Job:
        shape = {
            "num_nodes": nodes if args.nodes is None else args.nodes,
            "devices_per_node": args.devices_per_node or devices,
        }
        return _Job(title, SequenceBatch(seqlens, args.mask), _cluster(args.cluster, **shape))

    if args.seqlens is not None:
        return [job(None, args.seqlens, 1, 8)]
    jobs = []
    for e in _read_batches(args.batches):
        try:
            one = job(e["name"], e["seqlens"], e.get("nodes", 1), e.get("devices_per_node", 8))
        except ValueError as error:
            raise ValueError(f"{args.batches}: batch {e['name']}: {error}") from None
        jobs.append(one)
    return jobs


def _cluster(name: str, *, num_nodes: int, devices_per_node: Any) -> Cluster:
    is_file = name not in PRESETS and Path(name).exists()
    base = Cluster.load(name) if is_file else Cluster.preset(name)
    if isinstance(devices_per_node, list):
        one = len(devices_per_node) == 1
        devices_per_node = devices_per_node[0] if one else tuple(devices_per_node)
    return base.resized(num_nodes=num_nodes, devices_per_node=devices_per_node)


def _read_batches(path: str) -> list[dict[str, Any]]:
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} does not hold a list of batches")
    for index, entry in enumerate(entries):
        seqlens = entry.get("seqlens") if isinstance(entry, dict) else None
        if not isinstance(seqlens, list) or not all(type(n) is int for n in seqlens):
            raise ValueError(f"{path}: batch {index} has no list of integers 'seqlens'")
        if unknown := sorted(set(entry) - set(_BATCH_KEYS)):
            known = ", ".join(_BATCH_KEYS)
            raise ValueError(f"{path}: batch {index} has {unknown[0]!r}, known are {known}")
        if not isinstance(entry.setdefault("name", str(index)), str):
            raise ValueError(f"{path}: batch {index} has the name {shown(entry['name'])}, no text")
    return entries


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not integers with commas between") from None


def _auto_or_integer(text: str) -> str | int:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor an integer") from None


# --------------------------------------------------------------------------- what is printed

_MS, _MB = 1e3, 1e-6
_COLUMNS = [  # heading, value of one row of figures, whether it stands in a narrow table
    ("strategy", lambda r: r["strategy"], True),
    ("layer\nms", lambda r: f"{r['layer_seconds'] * _MS:.3f}", True),
    ("forward\nms", lambda r: f"{r['simulated']['forward_seconds'] * _MS:.3f}", True),
    ("backward\nms", lambda r: f"{r['simulated']['backward_seconds'] * _MS:.3f}", True),
    ("exposed\nms", lambda r: f"{r['simulated']['exposed_comm_seconds'] * _MS:.3f}", False),
    ("compute\nbalance", lambda r: f"{r['compute_balance']:.3f}", True),
    ("token\nbalance", lambda r: f"{r['token_balance']:.3f}", True),
    ("inter-\nnode MB", lambda r: f"{r['inter_node_bytes'] * _MB:.1f}", True),
    ("intra-\nnode MB", lambda r: f"{r['intra_node_bytes'] * _MB:.1f}", True),
    ("busiest\nrecv MB", lambda r: f"{r['max_rank_recv_bytes'] * _MB:.1f}", False),
    ("buffers\nMB", lambda r: f"{r['max_rank_buffer_bytes'] * _MB:.1f}", False),
    ("block", lambda r: f"{r['block_size']}", False),
    ("divisions", lambda r: f"{r['num_divisions']}", False),
    ("planned\nin ms", lambda r: f"{r['planning_seconds'] * _MS:.0f}", False),
]


def _named(job: _Job, figures: dict[str, Any]) -> dict[str, Any]:
    return figures if job.name is None else {"name": job.name, **figures}


def _heading(job: _Job, mask: str) -> str:
    name = f"{job.name}: " if job.name else ""
    batch, cluster = job.batch, job.cluster
    return fill(
        f"{name}{batch.num_tokens:,} tokens in {_count(len(batch.seqlens), 'sequence')}, "
        f"mask {mask}, {_count(cluster.num_ranks, 'rank')} on {_count(cluster.num_nodes, 'node')} "
        f"({cluster.name})",
        WIDTH,
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _figures(r: dict[str, Any]) -> str:
    """One plan's figures, a line for each thing one asks of it."""
    times = r["simulated"]
    attention = (
        f"{times['forward_seconds'] * _MS:.3f} ms forward, "
        f"{times['backward_seconds'] * _MS:.3f} ms backward, "
        f"{times['exposed_comm_seconds'] * _MS:.3f} ms of waits"
    )
    volume = (
        f"{r['inter_node_bytes'] * _MB:.1f} MB between nodes, "
        f"{r['intra_node_bytes'] * _MB:.1f} MB inside"
    )
    lines = {
        "strategy": f"{r['strategy']}, blocks of {r['block_size']} tokens, "
        + _count(r["num_divisions"], "division"),
        "layer": f"{r['layer_seconds'] * _MS:.3f} ms, simulated",
        "attention": attention,
        "balance": f"compute {r['compute_balance']:.3f}, tokens {r['token_balance']:.3f}",
        "volume": f"{volume}, forward",
        "busiest rank": f"receives {r['max_rank_recv_bytes'] * _MB:.1f} MB, buffers of "
        f"{r['max_rank_buffer_bytes'] * _MB:.1f} MB",
        "planned in": f"{r['planning_seconds'] * _MS:.0f} ms",
    }
    return "\n".join(f"  {name:13} {value}" for name, value in lines.items())


def _table(rows: list[dict[str, Any]], *, wide: bool) -> str:
    """Columns of figures under two-line headings; a row with an error shows that instead."""
    columns = [each for each in _COLUMNS if wide or each[2]]
    heads = [name.split("\n") if "\n" in name else ["", name] for name, *_ in columns]
    cells = [[show(row) for _, show, _ in columns] for row in rows if "error" not in row]
    lines = [list(line) for line in zip(*heads, strict=True)] + cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gap = "  " if wide or sum(widths) + 2 * len(widths) <= WIDTH else " "
    text = []
    for first, *rest in lines:
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        text.append(gap.join([first.ljust(widths[0]), *numbers]))
    text += [_refusal(row, WIDTH) for row in rows if "error" in row]
    return "\n".join(text)


def _refusal(row: dict[str, Any], width: int) -> str:
    return fill(f"{row['strategy']}  cannot: {row['error']}", width, subsequent_indent="    ")
