"""Tables of docs/measured.md about plans: planning time, layers over their limit, parts, rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.docs.tables import made_by, met
from lab.limit import PARTS, plot


def planner_table(_: str, run: dict[str, Any]) -> str:
    lines = [made_by(run), "", "| figure | found | must | |", "|---|---|---|---|"]
    lines += [
        f"| {line['figure']} | {line['value']:.3f} | {line['must']:g} | {met(line['met'])} |"
        for line in run["summary"]
    ]
    lines += [
        "",
        "| scale | planning | compute, token balance | largest program | peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {case['case']} | {case['planning_seconds']:.2f} s (limit {case['limit_seconds']:g}, "
        f"{met(case['met'])}) | {case['compute_balance']:.3f}, {case['token_balance']:.3f} "
        f"| {case['max_program_bytes'] / 1e3:.0f} kB | {case['peak_memory_bytes'] / 1e9:.2f} GB |"
        for case in run.get("scale", [])
    ]
    return "\n".join(lines)


def limit_table(runs: dict[str, Any]) -> str:
    """One line per run, cluster and model."""
    lines = [
        f"| run | cluster | model | ÷ limit, median | worst | {' | '.join(PARTS.values())} "
        "| planning, CPU s, median (worst) |",
        "|---|---|---|---|---|" + "---|" * (len(PARTS) + 1),
    ]
    for name, run in runs.items():
        for line in run["summary"]:
            parts = " | ".join(f"{100 * line['mean_excess'][part]:.1f}%" for part in PARTS)
            lines.append(
                f"| {name} | {line['cluster']} | {line['model']} | {line['median']:.3f} "
                f"| {line['worst']:.3f} | {parts} | {line['cpu_seconds_median']:.2f} "
                f"({line['cpu_seconds_worst']:.2f}) |"
            )
    dates = sorted({run["conditions"]["date"] for run in runs.values()})
    first = next(iter(runs.values()))["conditions"]
    return "\n".join(
        [
            f"`python -m lab limit`, {', '.join(dates)}, {first['processor']}; simulated.",
            "",
            *lines,
        ]
    )


def draw_limit(runs: dict[str, Any], path: Path) -> None:
    """The excess of every case on one cluster, its parts stacked."""
    rows = next(iter(runs.values()))["rows"]
    chosen = next((row for row in rows if row["cluster"] == "h100 4x8"), rows[0])
    plot([row for row in rows if row["cluster"] == chosen["cluster"]], path)


def ablation_table(_: str, run: dict[str, Any]) -> str:
    lines = [
        made_by(run),
        "",
        "| left out | layer ÷ limit, median | worst | layer ÷ the whole planner's, mean | worst "
        "| bytes ÷ its | busiest receiver ÷ its |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s['part']} | {s['median']:.3f} | {s['worst']:.3f} | {s['slower']:.3f} "
        f"| {s['slower_worst']:.3f} | {s['bytes']:.3f} | {s['max_rank_recv_bytes']:.3f} |"
        for s in run["summary"]
    ]
    return "\n".join(lines)


def rules_table(_: str, run: dict[str, Any]) -> str:
    summary = run["summary"]
    lines = [
        made_by(run),
        "",
        "| rule | batches that it serves | layer ÷ auto's, least | median | most |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {r['served']} | {r['least']:.3f} | {r['median']:.3f} | {r['most']:.2f} |"
        for name, r in summary["rules"].items()
    ]
    lines += [
        "",
        f"{summary['batches']} batches; `auto` was slower than a rule in {summary['auto_slower']} "
        f"cases; its layer ÷ limit {summary['layer_over_limit']:.3f} in the median.",
    ]
    return "\n".join(lines)


def overlap_table(_: str, run: dict[str, Any]) -> str:
    names = {"halves": "half-batches in turns", "early": "keys sent while queries are projected"}
    lines = [
        made_by(run),
        "",
        "| what | layer ÷ auto's, median | least | most |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {names[name]} | {r['median']:.3f} | {r['least']:.3f} | {r['most']:.3f} |"
        for name, r in run["summary"].items()
    ]
    return "\n".join(lines)


def host_table(runs: dict[str, Any]) -> str:
    lines = [
        "| plan | pass | instructions of a rank | µs a pass | µs an instruction "
        "| µs more where times are noted |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        for which in ("forward", "backward"):
            s = run["summary"][which]
            lines.append(
                f"| {name} | {which} | {s['instructions']:.0f} | {s['microseconds']:.0f} "
                f"| {s['microseconds_each']:.1f} | {s['noting_microseconds']:.1f} |"
            )
    first = next(iter(runs.values()))
    lines += [
        "",
        "| placement, default divisions | pass | operations of a rank | MB read and written |",
        "|---|---|---|---|",
    ]
    for each in first["operations"]:
        work = f"{each['operations']:.0f} | {each['megabytes']:.0f}"
        lines.append(f"| {each['strategy']} | {each['pass']} | {work} |")
    return "\n".join([made_by(first), "", *lines])
