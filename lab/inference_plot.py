"""The crossover of pass-KV and pass-Q: measured here, and simulated beside published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = {"pass_kv": "pass-KV", "pass_q": "pass-Q", "planned": "planned"}
COLORS = {"pass_kv": "#1b6ca8", "pass_q": "#d1495b", "planned": "#2e933c"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the panels that ``result`` has figures for."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"{path} needs matplotlib: pip install matplotlib") from None
    panels = [name for name in ("turns", "simulated") if name in result]
    figure = Figure(figsize=(6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for name, axis in zip(panels, axes, strict=True):
        {"turns": _measured, "simulated": _simulated}[name](axis, result[name])
        axis.set_xscale("log")
        axis.set_xlabel("miss rate: new tokens of all, %")
        axis.axhline(1.0, color="#999999", linewidth=0.8)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _measured(axis: Any, found: dict[str, Any]) -> None:
    """Times over those of pass-KV, with the range of the repeats."""
    rows = found["rows"]
    for name, label in NAMES.items():
        base = [row["pass_kv"]["seconds"] for row in rows]
        low, middle, high = (
            [take(row[name]) / of for row, of in zip(rows, base, strict=True)]
            for take in (
                lambda each: min(each["all_seconds"]),
                lambda each: each["seconds"],
                lambda each: max(each["all_seconds"]),
            )
        )
        axis.plot(_percent(rows), middle, marker="o", markersize=3, label=label, color=COLORS[name])
        axis.fill_between(_percent(rows), low, high, color=COLORS[name], alpha=0.12, linewidth=0)
    axis.set_title(f"measured: {found['num_ranks']} ranks, {found['link']}", fontsize=10)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("time of one layer's attention over pass-KV's")


def _simulated(axis: Any, found: dict[str, Any]) -> None:
    rows = found["table_4"]
    keys = [row["pass_kv_ms"] for row in rows]
    for name, label in NAMES.items():
        ratio = [row[f"{name}_ms"] / of for row, of in zip(rows, keys, strict=True)]
        axis.plot(_percent(rows), ratio, label=f"{label}, simulated", color=COLORS[name])
    published = [row["published_ms"]["pass_q"] / row["published_ms"]["pass_kv"] for row in rows]
    label = "pass-Q, published (table 4)"
    axis.plot(_percent(rows), published, "s", markersize=4, color=COLORS["pass_q"], label=label)
    axis.set_title("Llama3-405B, 4 nodes of 8 H100", fontsize=10)
    axis.set_ylabel("time to first token over pass-KV's")


def _percent(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [100 * row["new"] / (row["new"] + row["cached"]) for row in rows]
