"""How training goes, as one HTML page without a network; while it runs, the page reloads itself."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcp.report.pages import write_page

#: Figures of a line that the page draws over the steps.
SERIES = (
    "loss", "learning_rate", "grad_norm", "seconds", "num_tokens", "tokens_per_second",
    "compute_balance", "token_balance", "plan_wait_seconds", "attention_wait_share",
    "max_rank_attention_wait_share", "predicted_over_measured", "max_rank_memory_bytes",
    "inter_node_bytes", "intra_node_bytes", "measured_imbalance", "predicted_imbalance",
    "num_groups", "idle_ranks",
)  # fmt: skip
MOST_POINTS = 1500  # of a curve; steps beyond are drawn together, as their mean and their range


def write_training_page(
    lines: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "Training",
    max_steps: int = 0,
    reload_seconds: float | None = None,
    ranks: Mapping[str, Sequence[float]] | None = None,
) -> Path:
    """Write the page of a job to ``path``, and return the path.

    Args:
        lines: of the log, each with its ``step``; see :data:`SERIES`.
        max_steps: of the whole job; 0 where nobody knows.
        reload_seconds: how soon the page looks for a newer one; None when the job is over.
        ranks: figures of every rank now, such as ``memory_bytes``.
    """
    data = training_page_data(lines, ranks=ranks)
    data |= {"title": title, "max_steps": max_steps, "reload_seconds": reload_seconds}
    return write_page(path, "training_page.html", ("training_page.js",), data)


def training_page_data(
    lines: Sequence[Mapping[str, Any]], *, ranks: Mapping[str, Sequence[float]] | None = None
) -> dict[str, Any]:
    """All that the page shows: series of the steps, evaluations, the last line, every rank."""
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    columns = {
        name: np.array([_number(line.get(name)) for line in steps], dtype=float)
        for name in ("step", *SERIES)
    }
    of_tokens, of_time = columns["num_tokens"], columns["seconds"]
    return {
        "written": time.time(),
        "num_steps": len(steps),
        "step": _thin(columns.pop("step"))["mean"],
        "series": {
            name: _thin(values) for name, values in columns.items() if np.isfinite(values).any()
        },
        "evaluations": {
            "step": [line["step"] for line in evaluations],
            "eval_loss": [_plain(line["eval_loss"]) for line in evaluations],
        },
        "last": {name: _plain(value) for name, value in (dict(steps[-1]) if steps else {}).items()},
        "tokens": float(np.nansum(of_tokens)),
        "trained_seconds": float(np.nansum(of_time)),
        "recent_seconds": _plain(_median(of_time[-50:])),
        "recent_tokens_per_second": _plain(_median(columns["tokens_per_second"][-50:])),
        "ranks": {name: [_plain(x) for x in of] for name, of in (ranks or {}).items()},
    }


def _thin(values: np.ndarray) -> dict[str, list[float | None]]:
    """A curve of at most :data:`MOST_POINTS`: means of equal runs, and what they lie between."""
    size = math.ceil(len(values) / MOST_POINTS) if len(values) else 1
    padded = np.full(-(-len(values) // size) * size, np.nan)
    padded[: len(values)] = np.where(np.isfinite(values), values, np.nan)
    runs = padded.reshape(-1, size)
    some = np.isfinite(runs).any(axis=1)
    filled = np.where(some[:, None], runs, 0.0)
    found = {"mean": np.nanmean(filled, axis=1)}
    if size > 1:
        found |= {"low": np.nanmin(filled, axis=1), "high": np.nanmax(filled, axis=1)}
    return {
        name: [
            _plain(float(f"{x:.7g}")) if there else None for x, there in zip(of, some, strict=True)
        ]
        for name, of in found.items()
    }


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _number(value: Any) -> float:
    """A figure of a line; what is none, as a foreign line may have, is not drawn."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
