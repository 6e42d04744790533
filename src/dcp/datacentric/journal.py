"""What a data-centric job shows and leaves behind: imbalance, predicted and measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcp.datacentric.iteration import epoch_imbalance
from dcp.train.config import TrainConfig
from dcp.train.journal import METRICS, Journal

EPOCHS, FIGURE = "imbalance.json", "imbalance.png"
KINDS = ("predicted", "measured")


class ImbalanceJournal(Journal):
    """The journal of a data-centric job; with ``calculate_imbalance`` it ends with a summary per
    epoch and a figure."""

    def __init__(self, config: TrainConfig, *, first_step: int) -> None:
        super().__init__(config, first_step=first_step)
        self._wanted = config.calculate_imbalance

    def describe(self, metrics: dict[str, Any]) -> str:
        degrees = "+".join(str(group["degree"]) for group in metrics["groups"])
        text = f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
        text += f"groups {degrees}"
        if "measured_imbalance" in metrics:
            text += f", imbalance {metrics['measured_imbalance']:.0%}"
            text += f" ({metrics['predicted_imbalance']:.0%} predicted)"
        return text

    def close(self) -> None:
        super().close()
        if self._wanted:
            lines = (self.folder / METRICS).read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "measured_rank_seconds" in row]
            summary = summarise(rows)
            (self.folder / EPOCHS).write_text(json.dumps(summary, indent=1) + "\n")
            if rows:
                draw(rows, self.folder / FIGURE)


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Imbalance of every epoch, from its steps' metrics."""
    epochs: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        epochs.setdefault(row["epoch"], []).append(row)
    return [
        {"epoch": epoch, "steps": len(steps)}
        | {
            f"{kind}_imbalance": epoch_imbalance(row[f"{kind}_rank_seconds"] for row in steps)
            for kind in KINDS
        }
        for epoch, steps in epochs.items()
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
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
