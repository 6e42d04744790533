"""Turns of inference on an emulated cluster: which tensors to pass, executed.

As in :mod:`lab.emulate`, messages are real and kernels sleep. A prompt of new tokens over cached
ones makes a turn; its last step gives the first token. A step of decoding has one new token in each
of many conversations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from dcp.cluster import Cluster
from dcp.inference.turn import plan_turn
from dcp.plans import Plan
from dcp.simulate import simulate
from lab.emulate import LINK_ERROR, MOST_BUSY, busy_shares, problem_of, run_ranks
from lab.planner import SPEC

MISS_PERCENT = (1, 2.5, 5, 10, 20, 50, 100)
CONVERSATIONS, HELD = 32, 4096  # of a step of decoding, tokens of each
STRATEGIES = ("pass_kv", "pass_q", "pass_either", "planned")
WAYS = STRATEGIES[:2]  # the paper's, between which it chooses


def emulate(args: argparse.Namespace) -> dict[str, Any]:
    """Emulated seconds of a layer's attention, by turn and strategy."""
    cluster = Cluster.preset("h100", num_nodes=args.nodes, devices_per_node=args.devices_per_node)
    cases = list(_cases(cluster, args.total_tokens))
    plans = {made.fingerprint: made for _, _, made in cases}
    found = _run(list(plans.values()), cluster, args)
    seconds = {
        each: float(np.median(np.max([rank["passes"][i] for rank in found], axis=0)))
        / args.dilation
        for i, each in enumerate(plans)
    }
    rows: dict[str, dict[str, Any]] = {}
    for turn, strategy, made in cases:
        of = rows.setdefault(turn, {"turn": turn})
        of[strategy] = {
            "chosen": made.stats.strategy,
            "simulated_seconds": made.stats.simulated["forward_seconds"],
            "seconds": seconds[made.fingerprint],
        }
    return {
        "cluster": asdict(cluster),
        "spec": asdict(SPEC),
        "total_tokens": args.total_tokens,
        "dilation": args.dilation,
        "busy": max(busy_shares(found)),
        "rows": list(rows.values()),
        "regret": regret(list(rows.values())),
    }


def _cases(cluster: Cluster, total: int) -> Iterator[tuple[str, str, Plan]]:
    size = cluster.num_ranks
    turns = {}
    for percent in MISS_PERCENT:
        new = max(round(total * percent / 100), 1)
        cached = total - new
        turns[f"{percent:g}%"] = [new], [_dealt(cached, size)]
    turns["decode"] = [1] * CONVERSATIONS, [_dealt(HELD, size)] * CONVERSATIONS
    for turn, (tokens, held) in turns.items():
        for strategy in STRATEGIES:
            made = plan_turn(tokens, np.array(held), SPEC, cluster, strategy=strategy)
            if not made.stats.simulated:
                made.stats.simulated = simulate(made, cluster, backward=False).to_json()
            yield turn, strategy, made


def _dealt(tokens: int, ranks: int) -> list[int]:
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


def _run(plans: list[Plan], cluster: Cluster, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the ranks found, where links and cores were as they should be."""
    alone = argparse.Namespace(layers=0, rounds=args.rounds)
    found = run_ranks(
        plans, cluster, alone, dilation=args.dilation, link_error=LINK_ERROR, backward=False
    )
    if not found[0]["passes"] or max(busy_shares(found)) > MOST_BUSY:
        problem, remedy, slower = problem_of(found, cluster, args.dilation)
        raise ValueError(f"at --dilation {args.dilation:g}, {problem}: {remedy} ({slower:g})")
    return found


def regret(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By how much each rule takes longer than the better of the paper's two, at worst."""
    best = [min(row[way]["seconds"] for way in WAYS) for row in rows]
    return {
        name: max(row[name]["seconds"] / of for row, of in zip(rows, best, strict=True)) - 1
        for name in STRATEGIES
    }


def as_text(found: dict[str, Any]) -> list[str]:
    """A markdown table."""
    size = found["cluster"]
    lines = [
        f"One layer's attention, ms, emulated on {size['num_nodes']} x {size['devices_per_node']} "
        f"{size['name']} at a dilation of {found['dilation']:g} (in brackets simulated):",
        "",
        "| miss of " + f"{found['total_tokens']:,} | " + " | ".join(STRATEGIES) + " | planned as |",
        "|---" * (len(STRATEGIES) + 2) + "|",
    ]
    for row in found["rows"]:
        cells = [
            f"{row[name]['seconds'] * 1e3:.3f} ({row[name]['simulated_seconds'] * 1e3:.3f})"
            for name in STRATEGIES
        ]
        lines.append(f"| {row['turn']} | " + " | ".join(cells) + f" | {row['planned']['chosen']} |")
    worst = ", ".join(f"{name} {share:+.1%}" for name, share in found["regret"].items())
    return [*lines, "", f"At worst against the better of pass-KV and pass-Q: {worst}", ""]
