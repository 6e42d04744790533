"""Figures 12 and 13: the attention operator under causal and sparse masks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import geometric_mean

from matplotlib.axes import Axes

from lab.figures import style
from lab.figures.style import Drawing, panels, styled
from lab.paper.rows import Row, mean_of
from lab.published import PUBLISHED, PUBLISHED_SPARSE, SYSTEMS

SCALES = (0.5, 1, 2, 4)
PASSES = ("forward", "backward")
SHORT_TITLES = {"ldc": "LDC", "longalign": "LongAlign"}


@styled
def causal(rows: Sequence[Row]) -> Drawing:
    """Figure 12: milliseconds of five systems over four length scales, simulated | published."""
    table: list[Row] = [
        {
            "data": data,
            "scale": scale,
            "pass": name,
            "system": system,
            "simulated_ms": mean_of(rows, f"{name}_ms", data=data, scale=scale, system=system),
            "published_ms": PUBLISHED[data][index][system][SCALES.index(scale)],
        }
        for data in PUBLISHED
        for scale in SCALES
        for index, name in enumerate(PASSES)
        for system in SYSTEMS
    ]
    figure, axes = panels(2, 4, height=3.3)
    for column, (data, kind) in enumerate(
        (d, k) for d in PUBLISHED for k in ("simulated", "published")
    ):
        for line, name in zip(axes, PASSES, strict=True):
            chosen = [r for r in table if (r["data"], r["pass"]) == (data, name)]
            series = {
                system: [r[f"{kind}_ms"] for r in chosen if r["system"] == system]
                for system in SYSTEMS
            }
            hatched = tuple(SYSTEMS) if kind == "published" else ()
            style.bars(
                line[column],
                [f"×{s:g}" for s in SCALES],
                series,
                colors=style.SYSTEM_COLORS,
                hatched=hatched,
            )
        axes[0][column].set_title(f"{SHORT_TITLES[data]}, {kind}")
        axes[1][column].set_xlabel("length scale")
    for line, name in zip(axes, PASSES, strict=True):
        line[0].set_ylabel(f"{name} (ms)")
    style.legend(figure, axes[0][0], columns=5)
    return figure, table


@styled
def sparse(rows: Sequence[Row]) -> Drawing:
    """Figure 13: TE and ours under sparse masks; below, the ratio beside the published one."""
    table = [
        _sparse_row(rows, data=data, mask=mask, scale=scale) | {"published_ratio": published}
        for data, masks in PUBLISHED_SPARSE.items()
        for mask, ratios in masks.items()
        for scale, published in zip(SCALES, ratios, strict=True)
    ]
    figure, axes = panels(2, 2, height=3.4, sharex="col")
    for column, data in enumerate(PUBLISHED_SPARSE):
        _sparse_times(axes[0][column], [row for row in table if row["data"] == data])
        _sparse_ratios(axes[1][column], [row for row in table if row["data"] == data])
        axes[0][column].set_title(f"{style.DATA_TITLES[data]}, simulated")
        for line, index in product(axes, range(1, len(PUBLISHED_SPARSE[data]))):
            line[column].axvline(4 * index - 0.5, color="black", linewidth=0.4, alpha=0.4)
    axes[0][0].set_ylabel("time (ms)")
    axes[1][0].set_ylabel("speed-up,\nforward + backward")
    style.legend(figure, axes[0][0], columns=4)
    return figure, table


def _sparse_row(rows: Sequence[Row], **case: object) -> Row:
    times = {
        f"{system} {name}": mean_of(rows, f"{name}_ms", system=system, **case)
        for system in ("TE", "DCP")
        for name in PASSES
    }
    te, ours = (sum(times[f"{system} {name}"] for name in PASSES) for system in ("TE", "DCP"))
    return case | times | {"simulated_ratio": te / ours}


def _sparse_times(axes: Axes, chosen: list[Row]) -> None:
    shades = {
        "TE forward": style.ORANGE,
        "DCP forward": style.BLUE,
        "TE backward": "#F3CF80",
        "DCP backward": "#80B9D8",
    }
    times = {name: [row[name] for row in chosen] for name in shades}
    style.bars(axes, [f"×{row['scale']:g}" for row in chosen], times, colors=shades)


def _sparse_ratios(axes: Axes, chosen: list[Row]) -> None:
    """TE ÷ DCP of every case; the masks' names stand below their scales."""
    ratios = {
        f"TE ÷ DCP, {kind}": [row[f"{kind}_ratio"] for row in chosen]
        for kind in ("simulated", "published")
    }
    groups, both = [f"×{row['scale']:g}" for row in chosen], dict.fromkeys(ratios, style.BLUE)
    style.bars(axes, groups, ratios, colors=both, hatched=list(ratios)[1:])
    axes.set_yscale("log")
    axes.set_ylim(1, 80)
    axes.set_yticks([1, 2, 5, 10, 20, 50], ["1×", "2×", "5×", "10×", "20×", "50×"])
    for index, mask in enumerate(dict.fromkeys(row["mask"] for row in chosen)):
        axes.text(
            1.5 + 4 * index, -0.36, style.MASK_TITLES[mask], ha="center", fontsize=7,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.legend(loc="upper right", fontsize=6.5)


def headline(rows: Sequence[Row], *, sparse_rows: Sequence[Row]) -> dict[str, tuple[float, ...]]:
    """Least, geometric mean and most speed-up: causal over the next best system, sparse over TE."""
    over_next = []
    for data in PUBLISHED:
        for scale in SCALES:
            total = {
                system: sum(
                    mean_of(rows, f"{name}_ms", data=data, scale=scale, system=system)
                    for name in PASSES
                )
                for system in SYSTEMS
            }
            ours = total.pop("DCP")
            over_next.append(min(total.values()) / ours)
    ratios = [row["simulated_ratio"] for row in sparse(sparse_rows)[1]]
    return {
        name: (min(values), geometric_mean(values), max(values))
        for name, values in (("causal", over_next), ("sparse", ratios))
    }
