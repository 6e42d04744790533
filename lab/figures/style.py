"""One look for all figures: sizes of a two-column page, colours that survive grey and colour
blindness, and the pieces that several figures are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.paper.rows import Row

PAGE, COLUMN = 7.16, 3.5  # inches: two columns, one column
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8A8A8A",
)  # fmt: skip
SYSTEM_COLORS = {"Ring": GREY, "ZigZag": PURPLE, "LT": GREEN, "TE": ORANGE, "DCP": BLUE}
MASK_COLORS = {
    "causal": BLUE,
    "streaming": ORANGE,
    "causal_blockwise": GREEN,
    "shared_question": RED,
}
MASK_TITLES = {
    "causal": "causal",
    "streaming": "streaming (λ)",
    "causal_blockwise": "causal blockwise",
    "shared_question": "shared question",
}
DATA_TITLES = {"longalign": "LongAlign", "ldc": "LongDataCollections"}
HATCH = "////"  # of published bars
_LOOK: Any = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}

Drawing = tuple[Figure, list[Row]]  # a figure and the rows it shows


def styled(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
    """A drawing function under the common look, without changing matplotlib's own settings."""

    @wraps(draw)
    def drawn(*args: Any, **options: Any) -> Drawing:
        with matplotlib.rc_context(_LOOK):
            return draw(*args, **options)

    return drawn


def panels(
    rows: int, columns: int, *, height: float, width: float = PAGE, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of panels ``[rows, columns]`` with horizontal grid lines."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for each in axes.flat:
        each.grid(axis="y")
        each.tick_params(length=2.5, width=0.6)
    return figure, axes


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``NAME.pdf`` and ``NAME.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("pdf", "png")]
    with matplotlib.rc_context(_LOOK):
        figure.savefig(paths[0])
        figure.savefig(paths[1], dpi=200)
    return paths


def bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    colors: Mapping[str, str],
    hatched: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Bars of every series side by side in each group; returns the middle of each series' bars."""
    width = 0.82 / max(len(series), 1)
    middles = {}
    for index, (name, values) in enumerate(series.items()):
        middle = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        published = name in hatched
        axes.bar(
            middle,
            values,
            width * 0.94,
            label=name,
            color="white" if published else colors[name],
            edgecolor=colors[name],
            linewidth=0.6,
            hatch=HATCH if published else None,
        )
        middles[name] = middle
    axes.set_xticks(range(len(groups)), groups)
    return middles


def legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """One legend for all panels, from one of them."""
    handles, labels = axes.get_legend_handles_labels()
    # matplotlib's type of a location has no place for a plain string
    placed: Any = {"loc": "outside upper center"}
    figure.legend(handles, labels, ncols=columns, handlelength=1.6, columnspacing=1.4, **placed)
