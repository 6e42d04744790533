"""Figures 14, 15 and 20 and the decomposition: iterations, their parts, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from matplotlib.axes import Axes

from lab.figures import style
from lab.figures.style import Drawing, panels, styled
from lab.paper.rows import Row, mean_by, mean_of

TOKENS = (16384, 32768, 65536, 131072)
MASKS = ("causal", "streaming", "causal_blockwise", "shared_question")  # order of PUBLISHED
# seconds an iteration, Megatron-LM and DCP: data set -> tokens -> one pair a mask
PUBLISHED = {
    "longalign": {
        16384: ((1.320, 1.297), (1.372, 1.241), (1.372, 1.182), (1.377, 1.226)),
        32768: ((1.438, 1.387), (1.498, 1.233), (1.494, 1.265), (1.495, 1.287)),
        65536: ((1.860, 1.962), (1.872, 1.418), (1.874, 1.491), (1.878, 1.820)),
        131072: ((2.790, 2.830), (2.799, 1.915), (2.801, 2.056), (2.819, 2.446)),
    },
    "ldc": {
        16384: ((1.319, 1.252), (1.392, 1.210), (1.391, 1.165), (1.390, 1.183)),
        32768: ((1.480, 1.312), (1.551, 1.224), (1.550, 1.234), (1.556, 1.231)),
        65536: ((1.965, 1.753), (1.986, 1.536), (1.984, 1.508), (1.980, 1.603)),
        131072: ((3.033, 2.882), (3.060, 2.477), (3.060, 2.427), (3.054, 2.617)),
    },
}
_SHORT = {
    "causal": "causal",
    "streaming": "λ",
    "causal_blockwise": "block-\nwise",
    "shared_question": "shared\nquest.",
}
PARTS = {  # column of a row, its title and colour, from the bottom up
    "others": ("others", "#C8C8C8"),
    "attention_alone": ("attention alone", style.BLUE),
    "overlapped": ("attention and communication at once", style.GREEN),
    "exposed": ("communication and waiting", style.RED),
}
SYSTEMS = {"static": "static (a2a + p2p)", "dcp": "dcp"}


@styled
def end_to_end(rows: Sequence[Row], *, data: str) -> Drawing:
    """Figures 14 and 15: seconds an iteration of one data set, simulated beside published."""
    table = [
        _iteration_row(rows, published, data=data, tokens=tokens, mask=mask)
        for tokens in TOKENS
        for mask, published in zip(MASKS, PUBLISHED[data][tokens], strict=True)
    ]
    figure, axes = panels(1, 4, height=2.4, sharey=True)
    for each, tokens in zip(axes[0], TOKENS, strict=True):
        _iteration_bars(each, [row for row in table if row["tokens"] == tokens])
        each.set_title(f"{tokens // 1024} K tokens")
        each.set_ylim(0, 3.75)
    axes[0][0].set_ylabel(f"{style.DATA_TITLES[data]}\nseconds an iteration")
    style.legend(figure, axes[0][0], columns=4)
    return figure, table


def _iteration_row(rows: Sequence[Row], published: tuple[float, float], **case: object) -> Row:
    row: Row = dict(case)
    static, ours = (mean_of(rows, "seconds", system=system, **case) for system in SYSTEMS)
    for prefix, (a, b) in (("", (static, ours)), ("published_", published)):
        row |= {f"{prefix}static_seconds": a, f"{prefix}dcp_seconds": b, f"{prefix}speedup": a / b}
    return row


def _iteration_bars(axes: Axes, chosen: list[Row]) -> None:
    """Both systems, simulated and published, under each mask; our speed-up stands above ours."""
    titles = {
        "static_seconds": "static, simulated",
        "dcp_seconds": "dcp, simulated",
        "published_static_seconds": "Megatron-LM, published",
        "published_dcp_seconds": "DCP, published",
    }
    names = list(titles.values())
    colors = dict(zip(names, (style.ORANGE, style.BLUE) * 2, strict=True))
    series = {title: [row[key] for row in chosen] for key, title in titles.items()}
    groups = [_SHORT[row["mask"]] for row in chosen]
    middles = style.bars(axes, groups, series, colors=colors, hatched=names[2:])
    for prefix in ("", "published_"):
        for row, middle in zip(chosen, middles[titles[f"{prefix}dcp_seconds"]], strict=True):
            top = max(row[f"{prefix}{system}_seconds"] for system in SYSTEMS)
            shown = f"{row[f'{prefix}speedup']:.2f}×"
            axes.text(
                middle, top + 0.05, shown, ha="center", va="bottom", fontsize=5.5, rotation=90
            )


def headline(rows: Sequence[Row]) -> dict[str, tuple[float, ...]]:
    """Least, geometric mean and most end-to-end speed-up, causal and sparse masks apart."""
    table = [row for data in PUBLISHED for row in end_to_end(rows, data=data)[1]]
    kinds = {
        "causal": [row["speedup"] for row in table if row["mask"] == "causal"],
        "sparse": [row["speedup"] for row in table if row["mask"] != "causal"],
    }
    return {name: (min(v), geometric_mean(v), max(v)) for name, v in kinds.items()}


@styled
def decomposition(simulated: Sequence[Row], measured: Sequence[Row]) -> Drawing:
    """Where an iteration's time goes, simulated; where an attention call's does, measured."""
    figure, axes = panels(1, 2, height=2.5)
    table: list[Row] = []
    kinds = (
        ("simulated", simulated, "8 nodes × 8 A100, simulated", "seconds an iteration", 1.0),
        ("measured", measured, "local processes, measured", "ms, forward + backward", 1e3),
    )
    for each, (kind, rows, title, unit, factor) in zip(axes[0], kinds, strict=True):
        means = mean_by(rows, ("mask", "strategy"), tuple(PARTS))
        table += [{"kind": kind} | row for row in means]
        static = [row for row in means if row["strategy"] != "auto"]
        groups = [row["mask"] for row in static]
        for offset, chosen in (
            (-0.21, static),
            (0.21, [r for r in means if r["strategy"] == "auto"]),
        ):
            bottom = [0.0] * len(groups)
            for part, (name, color) in PARTS.items():
                height = [row[part] * factor for row in chosen]
                label = name if offset < 0 else None
                where = [index + offset for index in range(len(groups))]
                each.bar(where, height, 0.36, bottom=bottom, color=color, label=label)
                bottom = [a + b for a, b in zip(bottom, height, strict=True)]
            for x, top in enumerate(bottom):
                name = "static" if offset < 0 else "dcp"
                each.text(x + offset, top, name, ha="center", va="bottom", fontsize=6)
        each.set_xticks(range(len(groups)), [_SHORT[mask] for mask in groups])
        each.set(title=title, ylabel=unit)
        each.margins(y=0.12)
    style.legend(figure, axes[0][0], columns=4)
    return figure, table


@styled
def loss(rows: Sequence[Row]) -> Drawing:
    """Figure 20: loss of both systems over the steps, and below how far they lie apart."""
    figure, axes = panels(2, len(MASKS), height=2.9, sharex=True, sharey="row")
    table = []
    for column, mask in enumerate(MASKS):
        curves = {
            system: [row["loss"] for row in rows if (row["mask"], row["system"]) == (mask, system)]
            for system in SYSTEMS
        }
        static, ours = curves["static"], curves["dcp"]
        apart = [abs(a - b) for a, b in zip(static, ours, strict=True)]
        axes[0][column].plot(
            static, color=style.ORANGE, linewidth=2.4, alpha=0.7, label="static (zigzag ring)"
        )
        axes[0][column].plot(ours, color=style.BLUE, linewidth=0.9, linestyle="--", label="dcp")
        drawn = [max(each, 1e-9) for each in apart]  # equal to the last bit: at the lower edge
        axes[1][column].plot(drawn, color=style.GREY, linewidth=0.9)
        axes[1][column].set_yscale("log")
        axes[0][column].set_title(style.MASK_TITLES[mask])
        axes[1][column].set_xlabel("step")
        table += [
            {"mask": mask, "step": step, "static_loss": a, "dcp_loss": b, "difference": d}
            for step, (a, b, d) in enumerate(zip(static, ours, apart, strict=True))
        ]
    axes[0][0].set_ylabel("training loss")
    axes[1][0].set_ylabel("|difference|")
    style.legend(figure, axes[0][0], columns=2)
    return figure, table
