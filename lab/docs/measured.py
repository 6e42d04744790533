"""Write the tables of docs/measured.md and its pictures from benchmarks/results/*.json.

Text outside the page's ``<!-- begin NAME -->`` … ``<!-- end NAME -->`` marks is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lab import CHECKOUT
from lab.docs.emulated import draw_emulated, emulated_tables, layers_table, learning_table
from lab.docs.planned import (
    ablation_table,
    draw_limit,
    host_table,
    limit_table,
    overlap_table,
    planner_table,
    rules_table,
)
from lab.docs.tables import COLORS, made_by, met

RESULTS = CHECKOUT / "benchmarks" / "results"


def draw(docs: Path) -> None:
    path = docs / "measured.md"
    page = path.read_text()
    for name, tables, picture in (
        ("attention", each(attention_tables), draw_attention),
        ("emulated", each(emulated_tables), draw_emulated),
        ("emulated_layers", each(layers_table), None),
        ("learn", learning_table, None),
        ("train", each(train_table), draw_losses),
        ("trainer", each(trainer_table), None),
        ("dynamic", each(dynamic_table), None),
        ("planner", each(planner_table), None),
        ("limit", limit_table, draw_limit),
        ("ablation", each(ablation_table), None),
        ("rules", each(rules_table), None),
        ("overlap", each(overlap_table), None),
        ("host", host_table, None),
    ):
        results = RESULTS / f"{name}.json"
        if not results.exists():
            print(f"{results} is not there: run python -m lab {name} --out {RESULTS}")
            continue
        runs = json.loads(results.read_text())
        runs = runs if "conditions" not in runs else {name: runs}
        text = tables(runs)
        if picture is not None:
            text += f"\n\n![{name}](images/measured_{name}.png)"
            picture(runs, docs / "images" / f"measured_{name}.png")
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, rest = page.split(begin)
        page = before + begin + text + "\n" + end + rest.split(end)[1]
    path.write_text(page)


def each(table: Callable[[str, dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """One table after the other, for every run."""
    return lambda runs: "\n\n".join(table(name, run) for name, run in runs.items())


def attention_tables(name: str, run: dict[str, Any]) -> str:
    summary = run["summary"]
    lines = [
        f"### {name}, lengths ÷ {run['scale']}, {run['repeat']} rounds",
        "",
        made_by(run),
        "",
        "| batch | mask | ours ms (lowest–highest) | plan | over the best static (by round) "
        "| over the best of all (by round) | zigzag: compute ÷ transfer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        ours, zigzag = row["strategies"]["auto"], row["strategies"]["zigzag"]
        low, high = (1e3 * seconds for seconds in ours["spread"])
        gains = [
            f"{g['gain']:.2f}× {g['best']} ({g['lowest']:.2f}–{g['highest']:.2f})"
            for g in (row["over_static"], row["over_all"])
        ]
        lines.append(
            f"| {row['batch']} | {row['mask']} | {1e3 * ours['seconds']:.0f} ({low:.0f}–{high:.0f})"
            f" | {ours['chosen']} | {gains[0]} | {gains[1]} "
            f"| {zigzag['compute_seconds'] / zigzag['transfer_seconds']:.2f} |"
        )
    lines += ["", "| figure | measured | target | |", "|---|---|---|---|"]
    lines += [
        f"| {mask}: median gain over the best static strategy (lowest–highest case) "
        f"| {s['median_gain']:.2f} ({s['lowest_gain']:.2f}–{s['highest_gain']:.2f}) "
        f"| {s['target']:g} | {met(s['met'])} |"
        for mask, s in summary["masks"].items()
    ]
    lines += [
        f"| least gain over the best static strategy | {summary['least_gain']:.2f} | 0.97 "
        f"| {met(summary['never_slower'])} |",
        f"| least gain over any strategy | {summary['least_gain_over_all']:.2f} | | |",
        f"| busiest card's bytes against the plan's, worst | {summary['wire_error']:.1%} | 5% "
        f"| {met(summary['wire_met'])} |",
    ]
    return "\n".join(lines)


def train_table(name: str, run: dict[str, Any]) -> str:
    first = next(iter(run["strategies"].values()))
    lines = [
        f"### {name}, {len(first['losses'])} steps, {run['rounds']} rounds",
        "",
        made_by(run),
        "",
        "| strategy | tokens/s, median of steps (lowest–highest) | by round | ÷ ours "
        "| MB between nodes, forward | last loss |",
        "|---|---|---|---|---|---|",
    ]
    ours = first["tokens_per_second"]
    for strategy, each in run["strategies"].items():
        low, high = each["spread"]
        rounds = ", ".join(f"{speed:,.0f}" for speed in each["by_round"])
        lines.append(
            f"| {strategy} | {each['tokens_per_second']:,.0f} ({low:,.0f}–{high:,.0f}) | {rounds} "
            f"| {each['tokens_per_second'] / ours:.2f} | {each['inter_node_bytes'] / 1e6:.1f} "
            f"| {each['losses'][-1]:.6f} |"
        )
    lines += ["", f"Losses differ by at most {run['loss_difference']:.1e} at any step."]
    return "\n".join(lines)


def trainer_table(name: str, run: dict[str, Any]) -> str:
    lines = [
        f"### {name}, {run['tokens_of_a_rank']} tokens a rank, {run['rounds']} rounds",
        "",
        made_by(run),
        "",
        "| documents | system | tokens/s, median of steps (lowest–highest) | by round "
        "| ours ÷ this | CPU s a step | longest row of a rank | peak memory, MB (before training) "
        "| grown, MB | losses differ from ours by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, row in run["cases"].items():
        for system, each in row["systems"].items():
            low, high = each["spread"]
            rounds = ", ".join(f"{speed:,.0f}" for speed in each["by_round"])
            before, peak, grown = (
                each[f"memory_{which}_bytes"] / 1e6 for which in ("before", "peak", "grown")
            )
            lines.append(
                f"| {case} | {system} | {each['tokens_per_second']:,.0f} ({low:,.0f}–{high:,.0f}) "
                f"| {rounds} | {each['ratio']:.2f} | {each['cpu_seconds']:.2f} "
                f"| {each['longest_row']:,} | {peak:,.0f} ({before:,.0f}) | {grown:,.0f} "
                f"| {each['loss_difference']:.1e} |"
            )
    short = run["cases"].get("short")
    if short is not None:
        lines += ["", "| figure | measured | target | |", "|---|---|---|---|"]
        lines += [
            f"| short documents: ours ÷ {system} | {each['ratio']:.2f} | {run['target']} "
            f"| {met(each['ratio'] >= run['target'])} |"
            for system, each in list(short["systems"].items())[1:]
        ]
    return "\n".join(lines)


def dynamic_table(_: str, run: dict[str, Any]) -> str:
    systems = [name for name in run["rows"][0]["layer_seconds"] if name != "auto"]
    lines = [
        f"{made_by(run)} Megatron-Core {run['megatron']}.",
        "",
        "| batches | mask | " + " | ".join(f"{name} ÷ ours" for name in systems) + " |",
        "|---|---|" + "---|" * len(systems),
    ]
    for row in run["summary"]:
        figures = " | ".join(f"{row['slower'][name]:.2f}" for name in systems)
        lines.append(f"| {row['data']} | {row['mask']} | {figures} |")
    return "\n".join(lines)


def draw_attention(runs: dict[str, Any], path: Path) -> None:
    """Every strategy's time over ours, one dot a case, one panel a run."""
    figure = Figure(figsize=(8, 3.6 * len(runs)), layout="constrained")
    for axes, (name, run) in zip(
        figure.subplots(len(runs), squeeze=False)[:, 0], runs.items(), strict=True
    ):
        masks = list(dict.fromkeys(row["mask"] for row in run["rows"]))
        names = list(dict.fromkeys(s for row in run["rows"] for s in row["strategies"]))
        for i, mask in enumerate(masks):
            points = [
                (names.index(strategy) + 0.15 * (i - 1.5), each["seconds"] / ours)
                for row in run["rows"]
                if row["mask"] == mask
                for ours in [row["strategies"]["auto"]["seconds"]]
                for strategy, each in row["strategies"].items()
            ]
            axes.plot(*zip(*points, strict=True), "o", ms=4, color=COLORS[i], label=mask)
        axes.axhline(1, color="#a0aec0", lw=0.8)
        axes.set(title=name, ylabel="time ÷ ours", ylim=(0, None))
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_losses(runs: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8, 3 * len(runs)), layout="constrained")
    for axes, (name, run) in zip(
        figure.subplots(len(runs), squeeze=False)[:, 0], runs.items(), strict=True
    ):
        for i, (strategy, each) in enumerate(run["strategies"].items()):
            width = 2 * (len(run["strategies"]) - i)  # the first drawn shows from under the last
            axes.plot(each["losses"], lw=width, color=COLORS[i], label=strategy)
        axes.set(title=name, xlabel="step", ylabel="loss")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
