"""What a data-centric job leaves behind: its imbalance, predicted and measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcp.datacentric.iteration import epoch_imbalance
from dcp.train.record import METRICS

EPOCHS, FIGURE = "imbalance.json", "imbalance.png"
KINDS = ("predicted", "measured")


def write_imbalance(folder: Path) -> None:
    """A summary per epoch and a figure, from the metrics in a job's folder."""
    lines = (folder / METRICS).read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "measured_rank_seconds" in row]
    (folder / EPOCHS).write_text(json.dumps(summarise(rows), indent=1) + "\n")
    if rows:
        draw_imbalance(rows, folder / FIGURE)


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Imbalance of every epoch, from its steps' metrics."""
    epochs: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        epochs.setdefault(row["data_epoch"], []).append(row)
    return [
        {"epoch": epoch, "steps": len(steps)}
        | {
            f"{kind}_imbalance": epoch_imbalance(row[f"{kind}_rank_seconds"] for row in steps)
            for kind in KINDS
        }
        for epoch, steps in epochs.items()
    ]


def draw_imbalance(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted and measured imbalance of every step; without matplotlib there is no figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    for kind, style in zip(KINDS, ("--", "-"), strict=True):
        seen = [(row["step"], 100 * row[f"{kind}_imbalance"]) for row in rows]
        axes.plot(*zip(*seen, strict=True), style, label=kind)
    axes.set(xlabel="step", ylabel="imbalance, %", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
