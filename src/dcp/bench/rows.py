"""The rows of ``dcp bench kernels``: what a figure is, how it is written, and what it is for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

# Rows of the README's table of GPU figures, each with the figures that fill it.
README = {
    "errors, beside dense attention": ("error, ours / dense in the same dtype",),
    "dense causal, beside FlexAttention": (
        "causal forward: speed, ours / flex",
        "causal backward: speed, ours / flex",
    ),
    "dense causal, beside cuDNN": (
        "causal forward: speed, ours / cudnn",
        "causal backward: speed, ours / cudnn",
    ),
    "masks and batches, block mask ready": ("mask ready: speed, ours / flex",),
    "masks and batches, built inside": ("mask's preparation timed: ours / flex",),
    "a rank's program beside one launch": ("rank's program / one fused launch",),
    "NCCL on one device": ("NCCL, one rank: time / without a group",),
    "two processes on one device": ("two processes by gloo: error / dense",),
}


@dataclass(frozen=True)
class Row:
    """One figure; ``value`` is None where there is none, for the reason in ``note``."""

    figure: str
    case: str
    must: str
    aim: str = ""
    value: float | None = None
    note: str = ""


def as_line(row: Row) -> str:
    value = "     -" if row.value is None else f"{row.value:6.3f}"
    must = f"must {row.must}" if row.must else f"aim {row.aim}" if row.aim else ""
    return f"{row.figure:42} {row.case:34} {must:12} {value}  {row.note}"


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is none."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


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


def readme_table(rows: Sequence[Row]) -> Iterator[str]:
    """Which rows of the README's GPU table these fill: those of whose every case there is a value,
    measured on a GPU."""
    yield f"{'README, GPU figures':36} {'must':8} {'median':>7} {'worst':>7}  filled"
    for name, figures in README.items():
        some = [row for row in rows if row.figure in figures]
        values = [row.value for row in some if row.value is not None]
        reasons = [row.note for row in some if row.value is None]
        reasons += ["measured on the CPU" for row in some if row.case.endswith("on cpu")]
        must = next((row.must or row.aim for row in some), "")
        worst = max if must.startswith("<") or not must else min
        found = f"{median(values):7.2f} {worst(values):7.2f}" if values else f"{'-':>7} {'-':>7}"
        filled = "yes" if some and not reasons else f"no: {(*reasons, 'not run')[0]}"
        yield f"{name:36} {must:8} {found}  {filled}"
