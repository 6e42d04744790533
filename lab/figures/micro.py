"""Figures 12 and 13: the attention operator under causal and sparse masks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean, mean

from lab.figures.style import (
    BLUE,
    DATA_TITLES,
    MASK_TITLES,
    ORANGE,
    SYSTEM_COLORS,
    Drawing,
    bars,
    legend,
    panels,
    styled,
)
from lab.published import PUBLISHED, PUBLISHED_SPARSE, SYSTEMS
from lab.rows import Row

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
            "simulated_ms": _mean(rows, f"{name}_ms", data=data, scale=scale, system=system),
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
            bars(
                line[column],
                [f"×{s:g}" for s in SCALES],
                series,
                colors=SYSTEM_COLORS,
                hatched=hatched,
            )
        axes[0][column].set_title(f"{SHORT_TITLES[data]}, {kind}")
        axes[1][column].set_xlabel("length scale")
    for line, name in zip(axes, PASSES, strict=True):
        line[0].set_ylabel(f"{name} (ms)")
    legend(figure, axes[0][0], columns=5)
    return figure, table


@styled
def sparse(rows: Sequence[Row]) -> Drawing:
    """Figure 13: TE and ours under sparse masks; below, the ratio beside the published one."""
    table: list[Row] = []
    for data, masks in PUBLISHED_SPARSE.items():
        for mask, published in masks.items():
            for scale, ratio in zip(SCALES, published, strict=True):
                row: Row = {"data": data, "mask": mask, "scale": scale}
                for system in ("TE", "DCP"):
                    for name in PASSES:
                        key = f"{system} {name}"
                        row[key] = _mean(
                            rows, f"{name}_ms", data=data, mask=mask, scale=scale, system=system
                        )
                te, ours = (sum(row[f"{s} {p}"] for p in PASSES) for s in ("TE", "DCP"))
                table.append(row | {"simulated_ratio": te / ours, "published_ratio": ratio})
    figure, axes = panels(2, 2, height=3.4, sharex="col")
    for column, data in enumerate(PUBLISHED_SPARSE):
        chosen = [row for row in table if row["data"] == data]
        groups = [f"×{row['scale']:g}" for row in chosen]
        times = {f"{s} {p}": [r[f"{s} {p}"] for r in chosen] for p in PASSES for s in ("TE", "DCP")}
        shades = {
            "TE forward": ORANGE,
            "DCP forward": BLUE,
            "TE backward": "#F3CF80",
            "DCP backward": "#80B9D8",
        }
        bars(axes[0][column], groups, times, colors=shades)
        ratios = {
            "TE ÷ DCP, simulated": [r["simulated_ratio"] for r in chosen],
            "TE ÷ DCP, published": [r["published_ratio"] for r in chosen],
        }
        both = dict.fromkeys(ratios, BLUE)
        bars(axes[1][column], groups, ratios, colors=both, hatched=list(ratios)[1:])
        axes[1][column].set_yscale("log")
        axes[1][column].set_ylim(1, 80)
        axes[1][column].set_yticks([1, 2, 5, 10, 20, 50], ["1×", "2×", "5×", "10×", "20×", "50×"])
        axes[0][column].set_title(f"{DATA_TITLES[data]}, simulated")
        for index, mask in enumerate(PUBLISHED_SPARSE[data]):
            axes[1][column].text(
                1.5 + 4 * index, -0.36, MASK_TITLES[mask], ha="center", fontsize=7,
                transform=axes[1][column].get_xaxis_transform(),
            )  # fmt: skip
            if index:
                for line in axes:
                    line[column].axvline(4 * index - 0.5, color="black", linewidth=0.4, alpha=0.4)
    axes[0][0].set_ylabel("time (ms)")
    axes[1][0].set_ylabel("speed-up,\nforward + backward")
    legend(figure, axes[0][0], columns=4)
    for each in axes[1]:
        each.legend(loc="upper right", fontsize=6.5)
    return figure, table


def headline(rows: Sequence[Row], *, sparse_rows: Sequence[Row]) -> dict[str, tuple[float, ...]]:
    """Least, geometric mean and most speed-up: causal over the next best system, sparse over TE."""
    over_next = []
    for data in PUBLISHED:
        for scale in SCALES:
            total = {
                system: sum(
                    _mean(rows, f"{name}_ms", data=data, scale=scale, system=system)
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


def _mean(rows: Sequence[Row], value: str, **keys: object) -> float:
    return mean(row[value] for row in rows if all(row[k] == v for k, v in keys.items()))
