"""The ``dcp`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dcp import __version__
from dcp.batch import DTYPE_BYTES, AttentionSpec, SequenceBatch
from dcp.checks import read_json, shown
from dcp.cluster import PRESETS, Cluster
from dcp.launch.command import CommandParser, run_command, run_guarded
from dcp.launch.ending import ending_on_sigterm
from dcp.masks import NAMED_MASKS
from dcp.placement import StrategyError, strategy_names
from dcp.planner import plan
from dcp.plans import Plan

_BATCH_KEYS = ("name", "seqlens", "nodes", "devices_per_node")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 on success and 2 for a mistake of the user."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:  # its parser is transformers' own
        return run_guarded("dcp train", lambda: _train(words[1:]))
    return run_command("dcp", lambda: _build_parser(words), words)


def _train(words: list[str]) -> int:
    from dcp.jobs import run

    return ending_on_sigterm(run)(words)


@dataclass(frozen=True)
class _Later:
    """A command whose module is imported only when it is asked for: it may import torch and more.

    SIGTERM ends what it started, too, as Ctrl-C does.
    """

    help: str
    module: str

    def fill(self, parser: argparse.ArgumentParser) -> None:
        module = import_module(self.module)
        module.add_arguments(parser)
        parser.set_defaults(run=ending_on_sigterm(module.run))


_COMMANDS = {
    "generate": _Later("continue prompts over several ranks", "dcp.inference.command"),
    "doctor": _Later("check that everything a run needs works here", "dcp.doctor"),
    "profile": _Later("measure this cluster, write a cluster file", "dcp.profile"),
}
_BENCHES = {
    "kernels": _Later("attention kernels beside torch's", "dcp.bench.kernels"),
}


def _build_parser(words: list[str]) -> argparse.ArgumentParser:
    """All commands; of those that come later, only the one asked for has its options."""
    parser = CommandParser(prog="dcp", description="Planned context parallelism for PyTorch.")
    parser.add_argument("--version", action="version", version=f"dcp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("plan", help="plan attention for a batch and show what it costs")
    _add_plan_arguments(one)
    one.add_argument("--strategy", default="auto", help=f"auto, {', '.join(strategy_names())}")
    one.add_argument("--save", metavar="FILE", help="write the plan, for dcp.Plan.load")
    one.add_argument("--report", metavar="HTML", help="write a page that shows the plan")
    one.add_argument("--trace", metavar="JSON", help="write the simulated run as a Perfetto trace")
    one.set_defaults(run=_run_plan)

    many = commands.add_parser("compare", help="plan a batch with every strategy, side by side")
    _add_plan_arguments(many)
    many.set_defaults(run=_run_compare)

    bench = commands.add_parser("bench", help="measure this machine's kernels")
    benches = bench.add_subparsers(dest="bench", required=True, metavar="WHAT")
    _add_later(benches, _BENCHES, words[1:] if words[:1] == ["bench"] else [])
    commands.add_parser("train", help="train a model on this machine or a cluster")
    _add_later(commands, _COMMANDS, words)
    return parser


def _add_later(commands: Any, known: dict[str, _Later], words: list[str]) -> None:
    for name, later in known.items():
        parser = commands.add_parser(name, help=later.help)
        if words[:1] == [name]:
            later.fill(parser)


# --------------------------------------------------------------------------- plan and compare


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--seqlens", type=_integers, metavar="N,N,…", help="tokens of each sequence"
    )
    source.add_argument(
        "--batches",
        metavar="FILE",
        help="JSON list of batches: name, seqlens and, if they differ, nodes and devices_per_node",
    )
    parser.add_argument(
        "--mask",
        default="causal",
        metavar="NAME[:KEY=VALUE,…]",
        help=f"{', '.join(NAMED_MASKS)}; such as streaming:sink=64,window=4096",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--devices-per-node",
        type=_integers,
        metavar="N",
        help="devices of every node, or N,N,… for each (default: 8)",
    )
    parser.add_argument(
        "--cluster",
        default="a100",
        metavar="NAME|FILE",
        help=f"rates of devices and links: {', '.join(PRESETS)} or a cluster file",
    )
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="KV heads (default: --heads)")
    parser.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--value-dim", type=int, help="default: --head-dim")
    parser.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPE_BYTES)}")
    parser.add_argument(
        "--block-size", default="auto", type=_auto_or_integer, help="tokens of a block, or auto"
    )
    parser.add_argument(
        "--num-divisions", type=int, metavar="N", help="divisions of attention (default: chosen)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the planner's search")
    parser.add_argument("--json", action="store_true", help="print JSON, one line per batch")


@dataclass(frozen=True)
class _Job:
    """One batch to plan, and the machine to plan it for."""

    name: str | None
    batch: SequenceBatch
    cluster: Cluster


def _run_plan(args: argparse.Namespace) -> int:
    jobs, spec = _jobs(args), _spec(args)
    if len(jobs) > 1 and (args.save or args.report or args.trace):
        raise ValueError(
            f"--save, --report and --trace take one batch, {args.batches} has {len(jobs)}"
        )
    for job in jobs:
        made = _plan(args, job, spec, args.strategy)
        if args.json:
            print(json.dumps(_named(job, made.stats.to_json())), flush=True)
        else:
            print(_heading(job, args.mask), _table([made.stats.to_json()]), sep="\n", end="\n\n")
        if args.save:
            made.save(args.save)
        if args.report:
            from dcp.report.plan_page import write_plan_page

            write_plan_page(made, args.report)
        if args.trace:
            from dcp.report.trace import simulated_spans, write_trace

            write_trace(simulated_spans(made), args.trace)
    return 0


def _run_compare(args: argparse.Namespace) -> int:
    spec = _spec(args)
    for job in _jobs(args):
        rows = []
        for strategy in ["auto", *strategy_names()]:
            try:
                row = _plan(args, job, spec, strategy).stats.to_json()
            except StrategyError as error:  # this one cannot serve the case; the others may
                row = {"strategy": strategy, "error": str(error)}
            if strategy == "auto":
                row = {**row, "strategy": f"auto ({row['strategy']})"}
            rows.append(_named(job, row))
        rows.sort(key=lambda row: row.get("layer_seconds", float("inf")))
        if args.json:
            print(json.dumps(rows), flush=True)
        else:
            print(_heading(job, args.mask), _table(rows), sep="\n", end="\n\n")
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
_COLUMNS = [  # heading, value of one row of figures
    ("strategy", lambda r: r["strategy"]),
    ("block", lambda r: f"{r['block_size']}"),
    ("divisions", lambda r: f"{r['num_divisions']}"),
    ("compute\nbalance", lambda r: f"{r['compute_balance']:.3f}"),
    ("token\nbalance", lambda r: f"{r['token_balance']:.3f}"),
    ("inter-node\nMB", lambda r: f"{r['inter_node_bytes'] * _MB:.1f}"),
    ("intra-node\nMB", lambda r: f"{r['intra_node_bytes'] * _MB:.1f}"),
    ("busiest\nrecv MB", lambda r: f"{r['max_rank_recv_bytes'] * _MB:.1f}"),
    ("forward\nms", lambda r: f"{r['simulated']['forward_seconds'] * _MS:.3f}"),
    ("backward\nms", lambda r: f"{r['simulated']['backward_seconds'] * _MS:.3f}"),
    ("exposed\nms", lambda r: f"{r['simulated']['exposed_comm_seconds'] * _MS:.3f}"),
    ("layer\nms", lambda r: f"{r['layer_seconds'] * _MS:.3f}"),
    ("buffers\nMB", lambda r: f"{r['max_rank_buffer_bytes'] * _MB:.1f}"),
    ("planned\nin ms", lambda r: f"{r['planning_seconds'] * _MS:.0f}"),
]


def _named(job: _Job, figures: dict[str, Any]) -> dict[str, Any]:
    return figures if job.name is None else {"name": job.name, **figures}


def _heading(job: _Job, mask: str) -> str:
    name = f"{job.name}: " if job.name else ""
    batch, cluster = job.batch, job.cluster
    return (
        f"{name}{batch.num_tokens:,} tokens in {len(batch.seqlens)} sequences, mask {mask}, "
        f"{cluster.num_ranks} ranks on {cluster.num_nodes} nodes ({cluster.name})"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    """Columns of figures under two-line headings; a row with an error shows that instead."""
    heads = [heading.split("\n") if "\n" in heading else ["", heading] for heading, _ in _COLUMNS]
    cells = [[show(row) for _, show in _COLUMNS] for row in rows if "error" not in row]
    lines = [list(line) for line in zip(*heads, strict=True)] + cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *rest in lines:
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *numbers]))
    text += [f"{row['strategy']}  cannot: {row['error']}" for row in rows if "error" in row]
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
