"""``dcp bench compiled``: what the Triton kernels compile to, for GPUs that need not be there.

A count of instructions is no time. It says which form or tile is worth a measurement.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dcp.bench.conditions import conditions
from dcp.runtime.kernels.triton_compile import (
    KERNELS,
    Figures,
    compile_kernel,
    figures,
    shape_of,
)
from dcp.runtime.kernels.triton_options import DEFAULT, TritonOptions

ARCHITECTURES, HEAD_DIMS = (80, 90, 100), (64, 128, 256)
# By name: the form, programs that share a tile, kernels that differ.
FORMS = {
    "default": (DEFAULT, 1, KERNELS),
    "pack_heads=4": (TritonOptions(pack_heads=4), 1, KERNELS),
    "descriptors": (TritonOptions(descriptors=True), 1, KERNELS),
    "key_programs, 4 parts": (DEFAULT, 4, KERNELS[2:]),
}
BEGIN, END = "<!-- dcp bench compiled: begin -->", "<!-- dcp bench compiled: end -->"


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one architecture; ``figures`` None where it was refused."""

    architecture: int
    head_dim: int
    kernel: str
    form: str
    tile: str
    figures: Figures | None
    refusal: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the table between its marks in this page"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Compile, print, and write the table. Returns the exit status."""
    if args.write:
        around(args.write)  # refused before anything is compiled
    rows = []
    for row in all_rows(args.architectures, args.head_dims, args.forms):
        rows.append(row)
        if not args.json:
            print(as_line(row), flush=True)
    if args.json:
        print(json.dumps({"conditions": conditions(), "rows": [asdict(row) for row in rows]}))
    if args.write:
        before, behind = around(args.write)
        table = "\n".join(as_table(rows))
        args.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{behind}")
    return 0


def around(page: Path) -> tuple[str, str]:
    """What stands before and behind the table of a page."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} does not have the lines {BEGIN!r} and {END!r} once each")
    return text.split(BEGIN)[0], text.split(END)[1]


def all_rows(architectures: list[int], head_dims: list[int], forms: list[str]) -> Iterator[Row]:
    """In bfloat16, with the tiles in use."""
    for form in forms:
        options, parts, kernels = FORMS[form]
        for head_dim in head_dims:
            for kernel in kernels:
                for arch in architectures:
                    shape = shape_of(kernel, arch, head_dim, 2)
                    found, refusal = None, ""
                    try:
                        compiled = compile_kernel(
                            kernel, arch, head_dim, 2, forms=options, parts=parts
                        )
                        found = figures(compiled, shape)
                    except Exception as error:  # the compiler's; the row says so
                        refusal = f"{type(error).__name__}: {error}".splitlines()[0][:80]
                    yield Row(arch, head_dim, kernel, form, str(shape), found, refusal)


def as_line(row: Row) -> str:
    return " ".join(
        f"{cell:{width}}" for cell, width in zip(_cells(row), _WIDTHS, strict=True)
    ).rstrip()


def as_table(rows: list[Row]) -> list[str]:
    """Markdown, with what it was compiled by."""
    lines = [f"Triton {conditions()['versions']['triton']}, bfloat16, `dcp bench compiled`.", ""]
    for form in dict.fromkeys(row.form for row in rows):
        lines += [f"**{form}**", "", f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
        lines += [f"| {' | '.join(_cells(row)[1:])} |" for row in rows if row.form == form]
        lines += [""]
    return lines[:-1]


_HEAD = (
    *("sm", "d", "kernel", "tile, warps, stages", "registers", "stack B", "shared KiB"),
    *("products", "TMA", "cp.async", "full loop (spills)", "masked loop", "per pair"),
)
_WIDTHS = (21, 3, 3, 19, 13, 3, 4, 3, 14, 2, 3, 9, 9, 6)


def _cells(row: Row) -> list[str]:
    cells = [row.form, str(row.architecture), str(row.head_dim), row.kernel.replace("_", " ")]
    cells += [row.tile]
    if (found := row.figures) is None:
        return [*cells, row.refusal, *[""] * (len(_HEAD) - 5)]
    counts = {"wgmma": found.wgmma, "mma.sync": found.mma_sync, "tcgen05": found.tcgen05}
    products = " + ".join(f"{count} {name}" for name, count in counts.items() if count)
    numbers = found.registers, found.stack_bytes, found.shared_bytes >> 10
    cells += [*map(str, numbers), products, str(found.tma), str(found.cp_async)]
    cells += [f"{loop.instructions} ({loop.spills})" if loop else "-" for loop in
              (found.full, found.masked)]  # fmt: skip
    return [*cells, "-" if found.per_pair is None else f"{found.per_pair:.1f}"]
