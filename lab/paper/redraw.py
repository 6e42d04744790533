"""``python -m lab figures``: run what is missing, draw everything, say where numbers are from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from dcp import doctor
from lab.figures import dryrun as draw_dryrun
from lab.figures import measured as draw_measured
from lab.figures import micro as draw_micro
from lab.figures import motivation as draw_motivation
from lab.figures import training as draw_training
from lab.figures.page import Entry, write_page
from lab.figures.style import Drawing, save
from lab.paper import attention, dryrun, loss, micro, motivation, training
from lab.paper.rows import Row, write_rows
from lab.paper.workbench import SHAPED, Workbench

PLANNED = "planned: real plans, timed on this machine, nothing run"
SIMULATED = "simulated: real plans played on the rates of a data sheet (docs/simulator.md)"
MEASURED = "measured: processes of this machine, or of the cluster that attention was run on"
PUBLISHED = "published: read off the SOSP'25 artifact's figures"


@dataclass(frozen=True)
class FigureSpec:
    """A figure: its title, where its numbers are from, how it is drawn, and of which rows."""

    title: str
    sources: tuple[str, ...]
    draw: Callable[..., Drawing]
    rows: Callable[[Workbench], Any]


def _measured(bench: Workbench) -> list[Row]:
    """Measured rows: those that are there, of a cluster perhaps, or a small local run."""
    if not bench.rows(attention.ROWS):
        attention.measure_local(bench, attention.LocalSize(batches=bench.count(2)))
    return bench.rows(attention.ROWS)


def _shaped(bench: Workbench) -> dict[str, Any]:
    """What ``python -m lab attention`` kept: network namespaces need root, so it is run by hand."""
    return json.loads(bench.shaped.read_text())


def _both_parts(bench: Workbench) -> tuple[list[Row], list[Row]]:
    """Parts of an iteration of both systems, simulated, and of the operator, measured."""
    strategies = {"TE": training.STATIC, "DCP": "auto"}
    measured = [
        row | {"strategy": strategies[row["system"]]}
        for row in _measured(bench)
        if row["system"] in strategies
    ]
    return motivation.decomposition_rows(bench), measured


FIGURES = {
    "lengths": FigureSpec(
        "Document lengths of the data sets", ("the lengths' source is in the legend",),
        draw_motivation.lengths, lambda bench: bench.lengths,
    ),
    "motivation_share": FigureSpec(
        "Communication share of static context parallelism, 8 B model, TP 4",
        (SIMULATED, PUBLISHED), draw_motivation.share, motivation.share_rows,
    ),
    "motivation_waste": FigureSpec(
        "Redundant transfers and imbalance of a zigzag ring, 8 nodes, 65,536 tokens",
        (SIMULATED, PUBLISHED), draw_motivation.waste, motivation.waste_rows,
    ),
    "fig12": FigureSpec(
        "Attention operator, causal, 4 nodes × 8 A100, 131,072 tokens",
        (SIMULATED, PUBLISHED), draw_micro.causal, micro.causal_rows,
    ),
    "fig12_measured": FigureSpec(
        "Attention operator, all masks, measured", (MEASURED,), draw_measured.attention, _measured
    ),
    "fig12_shaped": FigureSpec(
        "Attention operator on shaped links, by python -m lab attention",
        (MEASURED,), draw_measured.shaped, _shaped,
    ),
    "fig13": FigureSpec(
        "Attention operator, sparse masks, 4 nodes × 8 A100, 131,072 tokens",
        (SIMULATED, PUBLISHED), draw_micro.sparse, micro.sparse_rows,
    ),
    "fig14": FigureSpec(
        "Training iteration, LongAlign, 8 nodes × 8 A100, TP 4",
        (SIMULATED, PUBLISHED), partial(draw_training.end_to_end, data="longalign"), training.rows,
    ),
    "fig15": FigureSpec(
        "Training iteration, LongDataCollections, 8 nodes × 8 A100, TP 4",
        (SIMULATED, PUBLISHED), partial(draw_training.end_to_end, data="ldc"), training.rows,
    ),
    "fig16": FigureSpec(
        "Inter-node volume over block size, 16 ranks on 8 nodes, 65,536 tokens",
        (PLANNED,), draw_dryrun.communication, dryrun.block_rows,
    ),
    "fig17": FigureSpec(
        "Planning time over block size, masks and blocks included",
        (PLANNED, PUBLISHED), draw_dryrun.planning_time, dryrun.block_rows,
    ),
    "fig18": FigureSpec(
        "Inter-node volume over mask sparsity",
        (PLANNED,), draw_dryrun.sparsity, dryrun.sparsity_rows,
    ),
    "fig19": FigureSpec(
        "Inter-node volume over compute imbalance",
        (PLANNED,), draw_dryrun.balance, dryrun.balance_rows,
    ),
    "fig20": FigureSpec(
        "Training loss, two local processes, a small Llama on Python sources",
        (MEASURED,), draw_training.loss, loss.rows,
    ),
    "fig14_measured": FigureSpec(
        "Seconds a training step, two local processes (the runs of fig20)",
        (MEASURED,), draw_measured.steps, loss.rows,
    ),
    "decomposition": FigureSpec(
        "Where the time goes: an iteration, and the attention operator",
        (SIMULATED, MEASURED), lambda both: draw_training.decomposition(*both), _both_parts,
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/artifact"), help="output folder")
    parser.add_argument(
        "--only", nargs="+", choices=FIGURES, metavar="NAME", help=f"some of {', '.join(FIGURES)}"
    )
    parser.add_argument(
        "--effort",
        type=float,
        default=1.0,
        help="multiplies batches and steps; 0.1 is quick",
    )
    parser.add_argument("--files", type=Path, help="folder with local lengths or documents")
    parser.add_argument("--tokenizer", help="for documents: bytes, or a Hugging Face tokenizer")
    parser.add_argument(
        "--over-long", default="drop", help="documents beyond a batch: drop, truncate or split"
    )
    parser.add_argument("--configs", type=Path, help="best configurations of fig14 and fig15")
    parser.add_argument(
        "--shaped",
        type=Path,
        default=SHAPED,
        help="runs of python -m lab attention (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--no-doctor", action="store_true", help="leave out the sanity check")


def run(args: argparse.Namespace) -> int:
    """Check, run, draw, write. Returns the exit status."""
    if not args.effort > 0:
        raise ValueError(f"--effort must be more than 0, got {args.effort}")
    if not args.no_doctor and (status := doctor.report(doctor.checks(2, None))):
        return status
    bench = Workbench(
        args.out,
        effort=args.effort,
        files=args.files,
        tokenizer=args.tokenizer,
        over_long=args.over_long,
        workers=args.workers,
        configs=args.configs,
        shaped=args.shaped,
    )
    for name in args.only or FIGURES:
        if name == "fig12_shaped" and not bench.shaped.exists():
            remedy = "python -m lab attention --out DIR makes it"
            print(f"{name:17} left out: no {bench.shaped}; {remedy}")
            continue
        started = perf_counter()
        spec = FIGURES[name]
        figure, table = spec.draw(spec.rows(bench))
        save(figure, args.out, name)
        write_rows(args.out / f"{name}.csv", table)
        print(f"{name:17} {spec.title} ({perf_counter() - started:.0f} s)", flush=True)
    print(f"report: {write_report(bench)}")
    return 0


def write_report(bench: Workbench) -> Path:
    """``report.html`` with every figure that has been drawn in the folder."""
    entries = [
        Entry(
            name=name,
            title=spec.title,
            command=f"python -m lab figures --out {bench.out} --only {name}",
            sources=spec.sources,
        )
        for name, spec in FIGURES.items()
        if (bench.out / f"{name}.png").exists()
    ]
    labels = {name: lengths.source for name, lengths in bench.lengths.items()}
    return write_page(bench.out, entries, lengths=labels, headline=headline(bench))


def headline(bench: Workbench) -> list[tuple[str, str, str]]:
    """(what, ours, published) of the numbers that the paper leads with, as far as they were run."""
    lines = []
    causal, sparse = bench.rows("micro_causal"), bench.rows("micro_sparse")
    if causal and sparse:
        found = draw_micro.headline(causal, sparse_rows=sparse)
        lines.append(("attention, causal, simulated", _range(found["causal"]), "1.19–2.45×"))
        lines.append(("attention, sparse, simulated", _range(found["sparse"]), "2.15–3.77×"))
    if iterations := bench.rows("end_to_end"):
        found = draw_training.headline(iterations)
        lines.append(("end to end, causal, simulated", _range(found["causal"]), "0.94–1.16×"))
        lines.append(("end to end, sparse, simulated", _range(found["sparse"]), "1.00–1.46×"))
    dry = [row for row in bench.rows("dryrun_blocks") if row["strategy"] != dryrun.STATIC]
    if plans := [row["planning_seconds"] for row in dry]:
        ours = f"{median(plans):.2f} s median, {max(plans):.2f} s at most"
        lines.append(("planning time, one core", ours, "below 10 s at reasonable block sizes"))
    return lines


def _range(values: tuple[float, ...]) -> str:
    least, middle, most = values
    return f"{least:.2f}–{most:.2f}× (geometric mean {middle:.2f}×)"
