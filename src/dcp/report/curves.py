"""The figures of a training job over its steps, as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = {  # figure: its title
    "loss": "loss",
    "eval_loss": "loss of evaluation",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
    "compute_balance": "busiest rank's work over the mean",
    "attention_bytes": "bytes moved by attention, forward",
    "predicted_over_measured": "seconds of attention, predicted over measured",
    "plan_wait_seconds": "seconds of waiting for a plan",
}
WIDTH, HEIGHT = 420, 180
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Training</title>
<style>body{{font:14px system-ui,sans-serif;margin:2em;color:#222}}
figure{{display:inline-block;margin:0 2em 2em 0}}figcaption{{font-weight:600}}
svg{{background:#f7f7f9}}polyline{{fill:none;stroke:#2563eb;stroke-width:1.5}}
text{{font-size:11px;fill:#555}}</style><h1>Training</h1>{figures}</html>"""


def write_curves(lines: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw the lines of a log, each with its ``step``, to ``path``, and return the path."""
    figures = "".join(_figure(name, title, lines) for name, title in SHOWN.items())
    path = Path(path)
    path.write_text(_PAGE.format(figures=figures), encoding="utf-8")
    return path


def _figure(name: str, title: str, lines: Sequence[dict[str, Any]]) -> str:
    """One curve; nothing where no line has a finite value of it."""
    points = np.array(
        [(line["step"], line[name]) for line in lines if line.get(name) is not None], dtype=float
    ).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return ""
    low, high = points.min(axis=0), points.max(axis=0)
    places = (points - low) / np.where(high > low, high - low, 1) * (WIDTH - 20, 20 - HEIGHT)
    places += (10, HEIGHT - 10)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places.tolist())
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}"><polyline points="{line}"/>'
        f'<text x="4" y="12">{high[1]:.4g}</text><text x="4" y="{HEIGHT - 2}">{low[1]:.4g}</text>'
        f'<text x="{WIDTH - 4}" y="{HEIGHT - 2}" text-anchor="end">step {high[0]:.0f}: '
        f"{points[-1, 1]:.4g}</text></svg></figure>"
    )
