"""The tables and the picture of what was executed on emulated clusters, for docs/measured.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure

from lab.attention import OURS, STATIC
from lab.docs.tables import COLORS, made_by, met
from lab.emulate import MOST_OWN_SHARE, both_passes, long_enough

PASSES = ("forward", "backward")


def emulated_tables(_: str, run: dict[str, Any]) -> str:
    cluster = run["cluster"]
    dilations = sorted({row["dilation"] for row in run["rows"]})
    busy = [row["busy"] for row in run["rows"]]
    short = len(run["rows"]) - len(long_enough(run["rows"]))
    left_out = (
        f" Executed ÷ simulated leaves out {short} plans of passes so short that the cores' own "
        f"work is more than {MOST_OWN_SHARE:.0%} of them."
    )
    return "\n\n".join(
        (
            f"{made_by(run)} {cluster['num_nodes']} × {cluster['devices_per_node']} devices with "
            f"the rates of `{cluster['name']}`, time stretched {dilations[0]:,.0f} to "
            f"{dilations[-1]:,.0f} times, {run['rounds']} round; cores busy for {median(busy):.0%} "
            f"of the time in the median, {max(busy):.0%} at most.{left_out * (short > 0)}",
            strategies_table(long_enough(run["rows"])),
            gains_table(run["rows"]),
            figures_table(run["summary"]),
        )
    )


def strategies_table(rows: Sequence[dict[str, Any]]) -> str:
    """Executed over simulated seconds, by strategy."""
    lines = [
        "| strategy | plans | forward, executed ÷ simulated (least–most) | backward |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["strategy"] for row in rows):
        own = [row for row in rows if row["strategy"] == name]
        ratios = [
            [row[f"executed_{which}_seconds"] / row[f"simulated_{which}_seconds"] for row in own]
            for which in PASSES
        ]
        cells = (f"{median(each):.2f} ({min(each):.2f}–{max(each):.2f})" for each in ratios)
        lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains_table(rows: Sequence[dict[str, Any]]) -> str:
    """``auto`` against the others of each batch and mask."""
    lines = [
        "| batch | mask | auto ms, executed (simulated) | best static ÷ auto, executed (simulated) "
        "| best other by name ÷ auto |",
        "|---|---|---|---|---|",
    ]
    for batch, mask in sorted({(row["batch"], row["mask"]) for row in rows}):
        here = {r["strategy"]: r for r in rows if (r["batch"], r["mask"]) == (batch, mask)}
        ours = here.pop(OURS)
        executed, simulated = (both_passes(ours, way) for way in ("executed", "simulated"))
        cells = []
        for group in ([r for name, r in here.items() if name in STATIC], [*here.values()]):
            best = min(group, key=lambda row: both_passes(row, "executed"), default=None)
            cells.append("not run" if best is None else (
                f"{best['strategy']}: {both_passes(best, 'executed') / executed:.2f} "
                f"({both_passes(best, 'simulated') / simulated:.2f})"
            ))  # fmt: skip
        lines.append(
            f"| {batch} | {mask} | {1e3 * executed:.2f} ({1e3 * simulated:.2f}) "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def figures_table(summary: dict[str, Any]) -> str:
    ratio, gains = summary["executed_over_simulated"], summary["best_other_over_auto"]
    figures = [
        ("executed ÷ simulated, median", ratio["median"], "within 10%",
         abs(ratio["median"] - 1) <= 0.1),
        ("executed ÷ simulated, worst", ratio["most"], "within 25%", ratio["most"] <= 1.25),
    ]  # fmt: skip
    for mask, least in (("causal", 1.5), ("sparse", 2.5)):
        if (gain := gains.get(f"static, {mask}")) is not None:
            figures.append((f"best static ÷ auto, {mask}, median", gain["median"], f"{least}",
                            gain["median"] >= least))  # fmt: skip
            figures.append((f"best static ÷ auto, {mask}, least", gain["least"], "1.0",
                            gain["least"] >= 1))  # fmt: skip
    if "any" in gains:
        least_gain = gains["any"]["least"]
        figures.append(("best of all by name ÷ auto, least", least_gain, "0.97",
                        least_gain >= 0.97))  # fmt: skip
    if summary["num_pairs"]:
        share = summary["pairs_in_order"]
        figures.append((f"of {summary['num_pairs']} pairs that differ by more than 5%, in the "
                        "simulated order", share, "0.95", share >= 0.95))  # fmt: skip
    lines = ["| figure | emulated | target | |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {value:.2f} | {target} | {met(holds)} |"
        for name, value, target, holds in figures
    ]
    return "\n".join(lines)


def layers_table(_: str, run: dict[str, Any]) -> str:
    """Whole layers in a row, executed over simulated."""
    lines = [
        f"{made_by(run)} {run['layers']} layers in a row.",
        "",
        "| batch | mask | strategy | a layer, ms, executed (simulated) | executed ÷ simulated "
        "| attention alone, executed ÷ simulated |",
        "|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        executed, simulated = (row[f"{way}_layer_seconds"] for way in ("executed", "simulated"))
        alone = both_passes(row, "executed") / both_passes(row, "simulated")
        lines.append(
            f"| {row['batch']} | {row['mask']} | {row['strategy']} | {1e3 * executed:.2f} "
            f"({1e3 * simulated:.2f}) | {executed / simulated:.2f} | {alone:.2f} |"
        )
    return "\n".join(lines)


def learning_table(runs: dict[str, Any]) -> str:
    """One line per run of ``python -m lab learn``."""
    lines = [
        "| run | batches | auto ms a layer, first batch, last five | best rule by name "
        "| auto ÷ it | auto ÷ the best of each batch |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        steps = [1e3 * seconds for seconds in run["steps"]]
        lines.append(
            f"| {name} | {len(steps)} | {steps[0]:.1f}, {mean(steps[-5:]):.1f} "
            f"| {run['best_rule']} | {run['auto_over_best_rule']:.2f} "
            f"| {run['auto_over_best_of_each']:.2f} |"
        )
    return "\n".join(lines)


def draw_emulated(runs: dict[str, Any], path: Path) -> None:
    """Executed against simulated milliseconds, a dot a plan and pass."""
    figure = Figure(figsize=(8, 4.2 * len(runs)), layout="constrained")
    for axes, run in zip(
        figure.subplots(len(runs), squeeze=False)[:, 0], runs.values(), strict=True
    ):
        for which, marker in zip(PASSES, "ox", strict=True):
            for ours, color in ((False, COLORS[4]), (True, COLORS[1])):
                points = [
                    (
                        1e3 * row[f"simulated_{which}_seconds"],
                        1e3 * row[f"executed_{which}_seconds"],
                    )
                    for row in long_enough(run["rows"])
                    if (row["strategy"] == OURS) is ours
                ]
                if points:
                    label = f"{'auto' if ours else 'rules by name'}, {which}"
                    axes.plot(*zip(*points, strict=True), marker, ms=5, color=color, label=label)
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="#a0aec0", lw=0.8)
        axes.set(xscale="log", yscale="log", xlabel="simulated ms", ylabel="emulated ms")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
